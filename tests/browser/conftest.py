"""A browser, and an ordinary account to sign in with: what a person who was given access has.

By default the lab. Elsewhere:
  SELFHOST_UI_URL       address of Open WebUI, http://10.213.0.10:8080 by default
  SELFHOST_UI_HOST      host with the admin's account in /etc/open-webui, by its name in .lab/ssh/config; lab by default
  SELFHOST_UI_MODEL     model to pick; the first that the account sees by default
  SELFHOST_UI_EXPECTED  word in the model's answer; Paris by default
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import Page, expect, sync_playwright

if TYPE_CHECKING:
    from collections.abc import Iterator

CHECKOUT = Path(__file__).resolve().parents[2]
ARTIFACTS = CHECKOUT / "artifacts" / "browser"
# For a busy machine; everything goes on as soon as it is there.
TIMEOUT_MS = 60_000
expect.set_options(timeout=TIMEOUT_MS)
# Quiet: no updates, no sync, no calls to its maker. A container's root can't have Chromium's own sandbox.
CHROMIUM = [
    "--no-sandbox",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@dataclass(frozen=True)
class Account:
    """Somebody who may sign in, and the first model that is offered to them."""

    email: str
    password: str
    model: str


@dataclass(frozen=True)
class Ui:
    """Open WebUI's HTTP API, as one signed-in account."""

    url: str
    token: str = ""

    def call(self, path: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
        """Return the decoded answer; an HTTP error is raised."""
        headers = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {self.token}"} if self.token else {}),
        }
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)  # noqa: S310 - given by the tester
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)

    def signed_in(self, email: str, password: str) -> Ui:
        """Return the same place, seen by an account."""
        return Ui(self.url, self.call("/api/v1/auths/signin", {"email": email, "password": password})["token"])


def on_host(command: str) -> str:
    """Return what a command prints on the host of Open WebUI."""
    host = os.environ.get("SELFHOST_UI_HOST", "lab")
    done = subprocess.run(
        ["ssh", "-F", str(CHECKOUT / ".lab" / "ssh" / "config"), host, command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"`{command}` failed on {host}: {done.stderr}"
    return done.stdout.strip()


@pytest.fixture(scope="session")
def ui() -> Ui:
    """Return Open WebUI as a visitor sees it."""
    return Ui(os.environ.get("SELFHOST_UI_URL", "http://10.213.0.10:8080").rstrip("/"))


@pytest.fixture(scope="session")
def admin(ui: Ui) -> Ui:
    """Return Open WebUI as its admin sees it."""
    email = json.loads(on_host("cat /etc/open-webui/admin.json"))["email"]
    return ui.signed_in(email, on_host("cat /etc/open-webui/admin-password"))


@pytest.fixture(scope="session")
def account(ui: Ui, admin: Ui) -> Iterator[Account]:
    """Make an ordinary account for this run, and remove it afterwards."""
    name = f"browser-{secrets.token_hex(4)}"
    email, password = f"{name}@localhost", secrets.token_urlsafe(18)
    added = admin.call("/api/v1/auths/add", {"name": name, "email": email, "password": password, "role": "user"})
    try:
        person = ui.signed_in(email, password)
        models = [model["id"] for model in person.call("/api/models")["data"]]
        # No dice: a tiny model knows the answer, but draws another word now and then.
        person.call("/api/v1/users/user/settings/update", {"ui": {"params": {"temperature": 0}}})
        assert models, "an ordinary account sees no model"
        yield Account(email, password, os.environ.get("SELFHOST_UI_MODEL") or models[0])
    finally:
        admin.call(f"/api/v1/users/{added['id']}", method="DELETE")


@pytest.fixture
def page(request: pytest.FixtureRequest) -> Iterator[Page]:
    """Return a fresh browser window; how it looked at the end is kept under artifacts/browser."""
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        # Debian's own browser; where there is none, the one that playwright brought.
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
        window = browser.new_page(viewport={"width": 1280, "height": 800}, locale="en-US")
        window.set_default_timeout(TIMEOUT_MS)
        try:
            yield window
        finally:
            window.screenshot(path=ARTIFACTS / f"{request.node.name}.png")
            browser.close()
