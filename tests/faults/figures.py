"""Figures of the checks, kept in artifacts/trust for `script/bench trust`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "artifacts/trust"


def note(topic: str, **figures: Any) -> None:
    """Keep the figures of a topic in place of its former ones, with the day."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"day": time.strftime("%Y-%m-%d"), **figures}, indent=1, sort_keys=True)
    (FOLDER / f"{topic}.json").write_text(text + "\n", encoding="utf-8")


def noted() -> dict[str, dict[str, Any]]:
    """Return all figures by topic."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
