"""The locks of Open WebUI: what each profile is for is in it, and nothing that it promises to spare."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROLE = Path(__file__).parents[2] / "roles/open_webui"
DEFAULTS = yaml.safe_load((ROLE / "defaults/main.yml").read_text(encoding="utf-8"))
VERSION = DEFAULTS["open_webui_version"]


def packages(profile: str) -> dict[str, str]:
    """Return the versions of a profile's lock by package."""
    content = (ROLE / f"files/locks/open-webui-{VERSION}-{profile}.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9._-]+)==(\S+) \\$", content, re.MULTILINE))


@pytest.mark.parametrize("profile", ["full", "slim"])
def test_every_profile_holds_the_version_of_the_defaults(profile: str) -> None:
    assert packages(profile)["open-webui"] == VERSION


def test_full_searches_documents_and_hears() -> None:
    assert {"chromadb", "sentence-transformers", "torch", "faster-whisper", "pypdf"} <= set(packages("full"))


def test_slim_spares_what_is_large() -> None:
    slim = packages("slim")
    assert not {"chromadb", "sentence-transformers", "torch", "transformers"} & set(slim)
    assert [name for name in slim if name.startswith("nvidia-")] == []
    assert len(slim) < len(packages("full"))
