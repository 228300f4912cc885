"""The module environment_file: what it writes, how closed it is, and what it says about it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import environment_file as syntax
from ansible_collections.selfhost.lmdeploy.plugins.modules import environment_file


def secret(path: Path, name: str = "KEY", **changes: Any) -> dict[str, Any]:
    """Return one entry of secret_files as Ansible would fill it in."""
    return {"name": name, "path": str(path), "value": "", "bytes": 32, "replaced": True, **changes}


def converge(
    folder: Path, *entries: dict[str, Any], dry: bool = False, keys: str = "sk-1", **variables: str
) -> dict[str, Any]:
    """Run the module's work on a folder."""
    params = {
        "path": str(folder / "app.env"),
        "variables": variables,
        "secrets": {"API_KEYS": keys},
        "secret_files": list(entries),
    }
    return environment_file.converge(params, dry=dry)


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    """Return a folder that doesn't exist yet."""
    return tmp_path / "etc"


def read(folder: Path) -> dict[str, str]:
    """Return the environment that was written."""
    return syntax.parse((folder / "app.env").read_text(encoding="utf-8"))


def mode(path: Path) -> int:
    """Return the permission bits of a path."""
    return stat.S_IMODE(path.stat().st_mode)


def test_the_first_run_writes_everything_closed_and_the_second_nothing(etc: Path) -> None:
    entry = secret(etc / "key")
    first = converge(etc, entry, DATA_DIR="/d")
    key = (etc / "key").read_text(encoding="utf-8").strip()
    assert read(etc) == {"DATA_DIR": "/d", "API_KEYS": "sk-1", "KEY": key}
    assert len(key.encode()) >= 32
    assert first["changed"]
    assert first["altered_variables"] == ["API_KEYS", "DATA_DIR", "KEY"]
    assert [mode(etc), mode(etc / "key"), mode(etc / "app.env")] == [0o700, 0o600, 0o600]
    second = converge(etc, entry, DATA_DIR="/d")
    assert (second["changed"], second["altered_variables"], second["altered_files"]) == (False, [], [])


def test_a_changed_value_is_named_once(etc: Path) -> None:
    entry = secret(etc / "key")
    converge(etc, entry, A="1", B="2")
    changed = converge(etc, entry, A="1", B="3", C="4")
    assert changed["altered_variables"] == ["B", "C"]
    assert changed["altered_files"] == [str(etc / "app.env")]
    assert not converge(etc, entry, A="1", B="3", C="4")["changed"]
    assert converge(etc, entry, A="1")["altered_variables"] == ["B", "C"]
    assert "B" not in read(etc)


def test_nothing_that_it_returns_holds_a_secret(etc: Path) -> None:
    result = converge(etc, secret(etc / "key", value="given-secret"), keys="sk-hidden", DATABASE_URL="user:word@db")
    assert not any(word in str(result) for word in ("given-secret", "sk-hidden", "user:word"))


def test_check_mode_says_the_same_and_writes_nothing(etc: Path) -> None:
    entry = secret(etc / "key")
    planned = converge(etc, entry, dry=True, A="1")
    assert not etc.exists()
    done = converge(etc, entry, A="1")
    assert planned == done
    assert not converge(etc, entry, dry=True, A="1")["changed"]
    before = (etc / "app.env").read_text(encoding="utf-8")
    assert converge(etc, entry, dry=True, A="2")["altered_variables"] == ["A"]
    assert (etc / "app.env").read_text(encoding="utf-8") == before


def test_a_given_secret_replaces_the_stored_one(etc: Path) -> None:
    converge(etc, secret(etc / "key"))
    changed = converge(etc, secret(etc / "key", value="mine"))
    assert changed["altered_variables"] == ["KEY"]
    assert (etc / "key").read_text(encoding="utf-8") == "mine\n"
    assert not converge(etc, secret(etc / "key"))["changed"]


def test_a_secret_that_the_service_must_accept_first_stays_in_its_file(etc: Path) -> None:
    converge(etc, secret(etc / "key", value="old", replaced=False))
    changed = converge(etc, secret(etc / "key", value="new", replaced=False))
    assert changed["differing"] == ["KEY"]
    assert (etc / "key").read_text(encoding="utf-8") == "old\n"
    assert read(etc)["KEY"] == "new"
    # The difference stays until somebody writes the file: an interrupted run doesn't lose it.
    again = converge(etc, secret(etc / "key", value="new", replaced=False))
    assert (again["changed"], again["differing"]) == (False, ["KEY"])


def test_an_opened_file_is_closed_again(etc: Path) -> None:
    converge(etc, secret(etc / "key"))
    for path in (etc, etc / "key", etc / "app.env"):
        path.chmod(0o755)
    changed = converge(etc, secret(etc / "key"))
    assert sorted(changed["altered_files"]) == sorted([str(etc), str(etc / "app.env"), str(etc / "key")])
    assert changed["altered_variables"] == []
    assert [mode(etc), mode(etc / "key"), mode(etc / "app.env")] == [0o700, 0o600, 0o600]


def test_a_failed_write_leaves_the_old_file_and_no_rest(etc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converge(etc, A="1")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        converge(etc, A="2")
    assert read(etc)["A"] == "1"
    assert [path.name for path in etc.iterdir()] == ["app.env"]
