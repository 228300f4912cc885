"""The page of a fleet: complete, escaped, and by itself."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.filter.status_page import status_page

SERVICE: dict[str, Any] = {
    "unit": "api-server.service",
    "program": "lmdeploy",
    "version": "0.18.0",
    "release": "0123456789ab",
    "model": "InternVL3-14B-Instruct",
    "model_path": "/var/lib/models/OpenGVLab--InternVL3-14B-Instruct",
    "url": "http://127.0.0.1:23333",
    "state": "active",
    "since": "Wed 2026-11-25 04:00:00 UTC",
    "restarts": 0,
    "enabled": True,
    "healthy": True,
    "gate": "Serving InternVL3-14B-Instruct: ready after 41.2 s",
}
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Reader(HTMLParser):
    """Checks that tags are closed in order, and keeps text and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(page: str) -> str:
    """Return the text of a page that is well formed and fetches nothing."""
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert reader.addresses == []
    assert "url(" not in page
    assert "<script" not in page
    return "\n".join(reader.words)


def test_a_page_tells_what_runs() -> None:
    text = read(status_page({"gpu-1": [SERVICE]}, "2026-11-25 04:50"))
    for word in ("gpu-1", "2026-11-25 04:50", "InternVL3-14B-Instruct", "LMDeploy 0.18.0 · api-server", "0123456789ab"):
        assert word in text
    assert "ready after 41.2 s" in text
    assert "1 of 1" in text


def test_what_hosts_say_is_text() -> None:
    spiteful = "<script>alert(1)</script>\"'&"
    page = status_page({spiteful: [dict.fromkeys(SERVICE, spiteful)]}, spiteful)
    assert spiteful in read(page)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, "good"),
        ({"state": "failed"}, "failed"),
        ({"healthy": False}, "no answer"),
        ({"enabled": False}, "not at boot"),
        ({"restarts": 3}, "3 restarts"),
    ],
)
def test_a_service_has_one_word_for_how_it_is(change: dict[str, Any], word: str) -> None:
    marks = re.findall(r"</span>([^<]*)</span></header>", status_page({"a": [{**SERVICE, **change}]}))
    assert marks[1] == word


def test_hosts_with_faults_come_first() -> None:
    page = status_page({"fine": [SERVICE], "bare": [], "off": None, "ill": [{**SERVICE, "state": "failed"}]})
    assert re.findall(r"<h2>([^<]*)", page) == ["off", "ill", "bare", "fine"]
    text = read(page)
    assert "could not be asked" in text
    assert "nothing installed" in text
    assert re.search(r"<b[^>]*>2</b><span[^>]*>faults", page)


def test_what_is_not_known_yet_is_shown_and_what_is_missing_does_no_harm() -> None:
    text = read(status_page({"a": [{**SERVICE, "engine_release": {"id": "77aa", "kept": [1, 2]}}, {}]}))
    assert "engine release\nid 77aa, kept 1, 2" in text
    assert "unknown" in text


def test_an_empty_fleet_is_a_page() -> None:
    assert "0 of 0" in read(status_page({}))
