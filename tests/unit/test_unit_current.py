"""The module unit_current: when a unit is started, restarted or left alone."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.modules import unit_current

# 2026-11-22 21:10:55.500000 UTC
MOMENT = 1795381855.5
ACTIVE = {
    "LoadState": "loaded",
    "ActiveState": "active",
    "UnitFileState": "enabled",
    "NeedDaemonReload": "no",
    "FragmentPath": "",
    "ExecMainStartTimestamp": "Sun 2026-11-22 21:10:55.500000 UTC",
    "StateChangeTimestamp": "Sun 2026-11-22 21:10:55.500000 UTC",
}


def plan(shown: dict[str, str], **changes: Any) -> tuple[list[str], str]:
    """Return the plan for a unit in the given state."""
    lists = {"files": [], "reloaded_files": [], "restarted": False, "reloaded": False}
    params = {"state": "started", "enabled": True, **lists, **changes}
    return unit_current.plan(params, {**ACTIVE, **shown})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a file as old as the process."""
    path = tmp_path / "app.env"
    path.touch()
    os.utime(path, (MOMENT - 1, MOMENT - 1))
    return path


def test_a_unit_that_runs_with_its_files_is_left_alone(file: Path) -> None:
    assert plan({}, files=[str(file), "/does/not/exist"]) == ([], "")


def test_a_newer_file_restarts_and_is_named(file: Path) -> None:
    os.utime(file, (MOMENT + 0.01, MOMENT + 0.01))
    assert plan({}, files=[str(file)]) == (["restart"], f"{file} is newer than the process")
    assert plan({"FragmentPath": str(file)})[0] == ["restart"]


def test_a_switched_link_restarts_although_its_target_is_old(file: Path) -> None:
    link = file.with_name("current")
    link.symlink_to(file)
    os.utime(link, (MOMENT + 1, MOMENT + 1), follow_symlinks=False)
    assert plan({}, files=[str(link)]) == (["restart"], f"{link} is newer than the process")


def test_what_check_mode_would_write_counts() -> None:
    assert plan({}, restarted=True)[0] == ["restart"]


def test_what_is_read_again_reloads_once(file: Path) -> None:
    assert plan({}, reloaded_files=[str(file)]) == ([], "")
    os.utime(file, (MOMENT + 1, MOMENT + 1))
    assert plan({}, reloaded_files=[str(file)]) == (["reload"], f"{file} is newer than the last reload")
    assert plan({"StateChangeTimestamp": "Sun 2026-11-22 21:10:57.000000 UTC"}, reloaded_files=[str(file)]) == ([], "")
    assert plan({}, reloaded=True)[0] == ["reload"]


def test_a_restart_needs_no_reload(file: Path) -> None:
    os.utime(file, (MOMENT + 1, MOMENT + 1))
    assert plan({}, files=[str(file)], reloaded_files=[str(file)])[0] == ["restart"]


@pytest.mark.parametrize("state", ["inactive", "failed", "deactivating"])
def test_a_unit_that_does_not_run_is_started(state: str) -> None:
    assert plan({"ActiveState": state, "ExecMainStartTimestamp": ""}, restarted=True) == (["start"], "")


def test_a_start_under_way_is_joined() -> None:
    assert plan({"ActiveState": "activating"}) == (["start"], "")


def test_a_new_unit_is_enabled_and_started() -> None:
    shown = {"LoadState": "not-found", "ActiveState": "inactive", "UnitFileState": "", "ExecMainStartTimestamp": ""}
    assert plan(shown) == (["enable", "start"], "")


def test_a_changed_unit_file_is_read_again_first(file: Path) -> None:
    os.utime(file, (MOMENT + 1, MOMENT + 1))
    assert plan({"NeedDaemonReload": "yes", "FragmentPath": str(file)})[0] == ["daemon-reload", "restart"]


def test_a_drop_in_that_systemd_has_not_read_is_read_first(tmp_path: Path) -> None:
    drop_in = tmp_path / "app.service.d/limits.conf"
    drop_in.parent.mkdir()
    drop_in.touch()
    os.utime(drop_in, (MOMENT - 1, MOMENT - 1))
    assert plan({}, files=[str(drop_in)])[0] == ["daemon-reload", "restart"]
    assert plan({"DropInPaths": f"/other.conf {drop_in}"}, files=[str(drop_in)])[0] == []


def test_stopping() -> None:
    assert plan({}, state="stopped", enabled=False) == (["disable", "stop"], "")
    gone = {"LoadState": "not-found", "ActiveState": "inactive", "UnitFileState": ""}
    assert plan(gone, state="stopped", enabled=False) == ([], "")
    assert plan({"ActiveState": "failed"}, state="stopped") == ([], "")


def test_times_are_read_as_systemd_prints_them() -> None:
    assert unit_current.started_at(ACTIVE) == MOMENT
    assert unit_current.started_at({"ExecMainStartTimestamp": ""}) is None
    assert unit_current.started_at({"ExecMainStartTimestamp": "n/a"}) is None


def test_a_failed_start_brings_the_end_of_the_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    def systemctl(*command: str) -> str:
        if command[0] == "journalctl":
            return "Address already in use\n"
        raise unit_current.UnitError("Job for app.service failed.")

    monkeypatch.setattr(unit_current, "run", systemctl)
    assert unit_current.journal("app.service", 5) == "Address already in use"
    with pytest.raises(unit_current.UnitError, match="Job for"):
        unit_current.converge({"name": "app.service", "state": "started"}, dry=False)


@pytest.mark.parametrize(("reload", "actions"), [("yes", ["daemon-reload"]), ("no", [])])
def test_a_changed_service_of_a_timer_is_read(monkeypatch: pytest.MonkeyPatch, reload: str, actions: list[str]) -> None:
    shown = {"app.timer": {**ACTIVE, "Triggers": "app.service"}, "app.service": {**ACTIVE, "NeedDaemonReload": reload}}
    monkeypatch.setattr(unit_current, "properties", lambda name: dict(shown[name]))
    params = {"name": "app.timer", "state": "started", "enabled": True, "files": [], "reloaded_files": []}
    found = unit_current.converge({**params, "restarted": False, "reloaded": False}, dry=True)
    assert found["actions"] == actions


def test_a_file_of_the_future_restarts_once(file: Path) -> None:
    """A clock that was a year ahead: compared with such a file every process would be old for a year."""
    link = file.with_name("current")
    link.symlink_to(file)
    for path in (file, link):
        os.utime(path, (time.time() + 3e7, time.time() + 3e7), follow_symlinks=False)
    unit_current.bring_to_present([str(file), str(link), "", "/does/not/exist"])
    assert all(abs(path.lstat().st_mtime - time.time()) < 60 for path in (file, link))


def test_a_file_of_the_past_keeps_its_time(file: Path) -> None:
    os.utime(file, (1e9, 1e9))
    unit_current.bring_to_present([str(file)])
    assert file.stat().st_mtime == 1e9
