"""The module open_webui_admin: later changes of the admin's account arrive, and what can't is said."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.webui_api import WebuiClient, WebuiError
from ansible_collections.selfhost.lmdeploy.plugins.modules import open_webui_admin


class Accounts(WebuiClient):
    """Stands for Open WebUI with one account; counts what it is asked."""

    def __init__(self, email: str, password: str, role: str = "admin") -> None:
        """Hold one account."""
        super().__init__("http://ui", 1)
        self.account = {"id": "1", "email": email, "name": "Admin", "role": role}
        self.password = password
        self.tries = 0

    def sign_in(self, email: str, password: str) -> dict[str, Any]:
        """Refuse all but the one pair."""
        self.tries += 1
        if (email, password) != (self.account["email"], self.password):
            raise WebuiError(f"Open WebUI refused to sign {email} in (400)")
        return dict(self.account)

    def change_account(self, account: str, fields: dict[str, str]) -> None:
        """Take over the fields."""
        assert account == "1"
        self.password = fields.get("password", self.password)
        self.account.update({key: value for key, value in fields.items() if key != "password"})


def converge(folder: Path, ui: WebuiClient, *, dry: bool = False, **changes: str) -> dict[str, Any]:
    """Run the module's work."""
    params = {
        "email": "admin@localhost",
        "name": "Admin",
        "password": "",
        "password_path": str(folder / "admin-password"),
        "account_path": str(folder / "admin.json"),
        **changes,
    }
    return open_webui_admin.converge(params, ui, dry=dry)


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    """Return a folder with a generated password, as after the first start."""
    (tmp_path / "admin-password").write_text("generated-one\n", encoding="utf-8")
    (tmp_path / "admin-password").chmod(0o600)
    return tmp_path


@pytest.fixture
def ui() -> Accounts:
    """Return Open WebUI with the account that its environment made."""
    return Accounts("admin@localhost", "generated-one")


def test_a_new_account_is_proven_once_and_then_never_asked_again(etc: Path, ui: Accounts) -> None:
    first = converge(etc, ui)
    assert (first["changed"], first["changed_fields"], ui.tries) == (True, [], 1)
    assert stat.S_IMODE((etc / "admin.json").stat().st_mode) == 0o600
    second = converge(etc, ui)
    assert (second["changed"], ui.tries) == (False, 1)


def test_a_given_password_is_carried_into_the_account(etc: Path, ui: Accounts) -> None:
    converge(etc, ui)
    changed = converge(etc, ui, password="given-by-me-now")
    assert (changed["changed"], changed["changed_fields"]) == (True, ["password"])
    assert ui.password == "given-by-me-now"
    assert (etc / "admin-password").read_text(encoding="utf-8") == "given-by-me-now\n"
    assert not converge(etc, ui, password="given-by-me-now")["changed"]
    assert not converge(etc, ui)["changed"]


def test_address_and_name_are_carried_into_the_account(etc: Path, ui: Accounts) -> None:
    converge(etc, ui)
    changed = converge(etc, ui, email="Boss@Example.org", name="Boss")
    assert changed["changed_fields"] == ["email", "name"]
    assert (ui.account["email"], ui.account["name"]) == ("boss@example.org", "Boss")
    assert not converge(etc, ui, email="Boss@Example.org", name="Boss")["changed"]


def test_an_interrupted_change_is_finished_by_the_next_run(etc: Path, ui: Accounts) -> None:
    converge(etc, ui)
    # Open WebUI took both, but the run ended before the files were written.
    ui.account["email"], ui.password = "boss@example.org", "given-by-me-now"
    assert converge(etc, ui, email="boss@example.org", password="given-by-me-now")["changed"]
    assert json.loads((etc / "admin.json").read_text(encoding="utf-8"))["email"] == "boss@example.org"


def test_a_change_in_the_browser_is_left_alone_until_the_variables_change(etc: Path, ui: Accounts) -> None:
    converge(etc, ui)
    ui.password = "chosen in the browser"
    assert not converge(etc, ui)["changed"]
    with pytest.raises(open_webui_admin.AdminError, match="open_webui_admin_password") as failure:
        converge(etc, ui, password="given-by-me-now")
    assert "given-by-me-now" not in str(failure.value)
    assert "generated-one" not in str(failure.value)
    assert converge(etc, ui, password="chosen in the browser")["changed"]


def test_check_mode_asks_nothing_and_writes_nothing(etc: Path, ui: Accounts) -> None:
    assert converge(etc, ui, dry=True)["changed"]
    assert (ui.tries, (etc / "admin.json").exists()) == (0, False)
    converge(etc, ui)
    assert not converge(etc, ui, dry=True)["changed"]
    assert converge(etc, ui, dry=True, password="given-by-me-now")["changed"]


def test_an_ordinary_account_is_refused(etc: Path) -> None:
    with pytest.raises(open_webui_admin.AdminError, match="no admin"):
        converge(etc, Accounts("admin@localhost", "generated-one", role="user"))


def test_a_broken_record_counts_as_none(etc: Path, ui: Accounts) -> None:
    (etc / "admin.json").write_text("not json", encoding="utf-8")
    assert converge(etc, ui)["changed"]
