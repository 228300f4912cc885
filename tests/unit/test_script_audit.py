"""The bill of materials of a lock: every package of it, with its hashes, and the same each time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted(ROOT.glob("roles/*/files/locks/*.txt"))


def test_a_release_has_a_bill_of_every_lock(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "script/audit"), "--sbom", "--into", str(tmp_path / "bills")]
    subprocess.run(command, check=True)
    found = {path.name for path in (tmp_path / "bills").iterdir()}
    version = re.search(r"^version: (\S+)$", (ROOT / "galaxy.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version
    assert found == {f"selfhost-lmdeploy-{version[1]}-{lock.stem}.cdx.json" for lock in LOCKS}
    assert len(found) == len(LOCKS)


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: str(path.stem))
def test_a_bill_names_every_package_of_a_lock(lock: Path) -> None:
    command = [sys.executable, str(ROOT / "script/audit"), "--sbom", str(lock)]
    said = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert said[0] == said[1]
    content = json.loads(said[0])
    assert (content["bomFormat"], content["specVersion"]) == ("CycloneDX", "1.5")
    text = lock.read_text(encoding="utf-8")
    assert len(content["components"]) == len(re.findall(r"^[A-Za-z0-9][^\s=]*==", text, re.MULTILINE)) > 0
    hashes = [entry for component in content["components"] for entry in component["properties"]]
    assert len(hashes) == text.count("--hash=sha256:")
    assert all(component["properties"] for component in content["components"])
