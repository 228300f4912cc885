"""The module config_files: all or nothing, judged first, recognised afterwards."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import engine_releases, owned_files
from ansible_collections.selfhost.lmdeploy.plugins.modules import config_files

FILE: dict[str, Any] = {
    "content": None,
    "hidden_content": None,
    "generated": None,
    "mode": "0644",
    "group": "",
    "check": [],
    "check_silent": False,
}


def converge(*files: dict[str, Any], folders: list[dict[str, Any]] | None = None, dry: bool = False) -> dict[str, Any]:
    """Run the module's work."""
    wanted = [
        {**FILE, **{key: str(value) if key == "path" else value for key, value in file.items()}} for file in files
    ]
    return config_files.converge(
        {"folders": [{"group": "", **folder} for folder in folders or []], "files": wanted}, dry=dry
    )


def test_a_set_is_written_once_and_then_recognised(tmp_path: Path) -> None:
    folder = {"path": str(tmp_path / "etc"), "mode": "0700"}
    files = [
        {"path": tmp_path / "etc/a", "content": "one\n"},
        {"path": tmp_path / "etc/b", "hidden_content": "secret\n", "mode": "0600"},
    ]
    assert converge(*files, folders=[folder], dry=True)["changed"]
    assert not (tmp_path / "etc").exists()
    first = converge(*files, folders=[folder])
    assert first["written"] == [str(tmp_path / name) for name in ("etc", "etc/a", "etc/b")]
    assert (tmp_path / "etc").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "etc/b").stat().st_mode & 0o777 == 0o600
    assert "secret" not in str(first)
    assert first["diff"][0]["after"] == "one\n"
    assert converge(*files, folders=[folder]) == {"changed": False, "written": [], "diff": []}
    assert sorted(path.name for path in (tmp_path / "etc").iterdir()) == ["a", "b"]


def test_wider_permissions_are_mended(tmp_path: Path) -> None:
    file = {"path": tmp_path / "key", "hidden_content": "k", "mode": "0600"}
    converge(file)
    (tmp_path / "key").chmod(0o644)
    assert converge(file)["changed"]
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_a_folder_of_a_user_who_is_not_there_is_named(tmp_path: Path) -> None:
    folder = {"path": str(tmp_path / "a/b"), "mode": "0700", "owner": "nobody-by-this-name"}
    assert converge(folders=[folder], dry=True)["written"] == [str(tmp_path / "a/b")]
    with pytest.raises(OSError, match="there is no user nobody-by-this-name"):
        converge(folders=[folder])


def test_a_generated_secret_stays(tmp_path: Path) -> None:
    file = {"path": tmp_path / "key", "generated": 48, "mode": "0600"}
    first = converge(file)
    secret = (tmp_path / "key").read_text().strip()
    assert len(secret) == 48
    assert secret not in str(first)
    assert not converge(file)["changed"]
    assert (tmp_path / "key").read_text().strip() == secret
    assert converge({"path": tmp_path / "key", "hidden_content": "mine\n", "mode": "0600"})["changed"]


def test_one_refusal_keeps_the_whole_set_as_it_was_and_all_are_told(tmp_path: Path) -> None:
    (tmp_path / "good").write_text("old")
    bad, warned, other = (str(tmp_path / f"{name}.unit") for name in ("bad", "warned", "other"))
    files: list[dict[str, Any]] = [
        {"path": tmp_path / "good", "content": "new"},
        {"path": bad, "content": "x", "check": ["sh", "-c", "echo refused: $(cat $0); exit 3", bad]},
        {"path": warned, "content": "x", "check": ["echo", f"{warned}: odd"], "check_silent": True},
        {"path": other, "content": "x", "check": ["echo", "other thing"], "check_silent": True},
    ]
    for dry in (True, False):
        with pytest.raises(config_files.Refused) as caught:
            converge(*files, dry=dry)
        assert [Path(finding["path"]).name for finding in caught.value.findings] == ["bad.unit", "warned.unit"]
        assert caught.value.findings[0]["output"] == "refused: x"
    assert (tmp_path / "good").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_a_file_is_judged_beside_what_the_others_will_be(tmp_path: Path) -> None:
    program, data = str(tmp_path / "program"), str(tmp_path / "data")
    (tmp_path / "program").write_text("exit 1\n")
    converge(
        {"path": program, "content": 'test "$(cat "$1")" = new\n'},
        {"path": data, "content": "new", "check": ["sh", program, data]},
    )
    assert (tmp_path / "data").read_text() == "new"
    with pytest.raises(config_files.Refused, match="exit code 1"):
        converge({"path": data, "content": "other", "check": ["sh", program, data]})


def test_a_program_that_is_not_there_refuses(tmp_path: Path) -> None:
    with pytest.raises(config_files.Refused, match="did not judge it"):
        converge({"path": tmp_path / "a", "content": "x", "check": [str(tmp_path / "none")]})


def test_what_is_there_already_is_not_judged_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    file = {"path": tmp_path / "a", "content": "x", "check": ["sh", "-c", f"echo judged >> {log}"]}
    converge(file)
    converge(file)
    assert log.read_text() == "judged\n"


@pytest.mark.parametrize(
    "write",
    [
        lambda path: owned_files.write(path, "new", {"mode": "0600", "group": ""}),
        lambda p: engine_releases.write(p, "new"),
    ],
)
def test_a_full_disk_is_told_with_the_file_and_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        write(path)
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {"a": "old"}
