"""The page of a fleet on a phone and on a screen: everything fits, faults come first, nothing is fetched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.filter.status_page import status_page
from playwright.sync_api import Page, expect

if TYPE_CHECKING:
    from pathlib import Path

GOOD: dict[str, Any] = {
    "unit": "api-server.service",
    "program": "lmdeploy",
    "version": "0.18.0",
    "release": "0123456789ab",
    "model": "InternVL3-14B-Instruct",
    "model_path": "/var/lib/models/OpenGVLab--InternVL3-14B-Instruct",
    "url": "http://127.0.0.1:23333",
    "state": "active",
    "restarts": 0,
    "enabled": True,
    "healthy": True,
    "gate": "ready after 41.2 s; gate passed: ready in 41.9 s, answer in 0.4 s, 88 tokens/s",
}
ILL = {**GOOD, "state": "failed", "healthy": False, "model": "a-model-with-a-name-that-is-far-too-long-for-a-phone" * 2}
FLEET = {**{f"gpu-{number:02}": [GOOD] for number in range(1, 8)}, "gpu-08": [ILL], "gpu-09": None}


@pytest.mark.parametrize(("width", "height"), [(360, 740), (1440, 900)])
def test_a_fleet_fits_a_phone_and_a_screen(page: Page, tmp_path: Path, width: int, height: int) -> None:
    file = tmp_path / "fleet.html"
    file.write_text(status_page(FLEET, "2026-11-25 04:50 UTC"), encoding="utf-8")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.set_viewport_size({"width": width, "height": height})
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # What is wrong is seen without a finger.
    for host in ("gpu-08", "gpu-09"):
        expect(page.get_by_role("heading", name=host)).to_be_in_viewport()
    details = page.locator("summary").first
    details.click()
    expect(page.get_by_text("0123456789ab").first).to_be_visible()
    box = details.bounding_box()
    assert box
    assert box["height"] >= 24
    assert asked == [file.as_uri()]
