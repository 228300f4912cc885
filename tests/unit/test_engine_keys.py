"""The module engine_keys: which keys are valid after a step, and what is done to engines for it."""

from __future__ import annotations

import json
import os
import time
from hashlib import sha256
from pathlib import Path

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.modules import engine_keys
from ansible_collections.selfhost.lmdeploy.plugins.modules.engine_keys import KeyFault, converge, wanted_keys
from fake_engine import FakeEngine

OLD, NEW = "o" * 32, "n" * 32


def test_a_new_key_comes_first_and_the_old_one_stays() -> None:
    made, kept = wanted_keys([OLD], "open", "")
    assert kept == OLD
    assert len(made) == engine_keys.KEY_CHARACTERS
    assert wanted_keys([OLD], "open", NEW) == [NEW, OLD]
    # A step that is taken twice makes no third key, and a key that is there already is no new one.
    assert wanted_keys([NEW, OLD], "open", "") == [NEW, OLD]
    assert wanted_keys([OLD], "open", OLD) == [OLD]
    assert wanted_keys([NEW, OLD], "close", "") == [NEW]


class Host:
    """A host with one running engine and a systemctl that does what it is told."""

    def __init__(self, folder: Path, *, reloads: bool, deaf: bool = False) -> None:
        """Start the engine."""
        self.folder, self.reloads, self.deaf = folder, reloads, deaf
        self.engine = FakeEngine(key=OLD)
        self.engine.doorman = self
        self.api_tokens: list[bytes] = []
        self.started = time.time() - 100
        self.done: list[str] = []
        (folder / "api-key").write_text(f"{OLD}\n")
        os.utime(folder / "api-key", (self.started - 50, self.started - 50))
        (folder / "api-server.json").write_text(json.dumps({"host": "127.0.0.1", "port": self.engine.port}))
        self.take()

    def take(self) -> None:
        """Have the engine take the file's keys."""
        if not self.deaf or not self.done:
            keys = (self.folder / "api-key").read_text().split()
            self.api_tokens = [digest(key) for key in keys]

    def systemctl(self, *arguments: str) -> str:
        """Stand in for systemctl."""
        if arguments[0] == "show":
            word = "yes" if self.reloads else "no"
            return f"ActiveState=active\nCanReload={word}\nExecMainStartTimestamp=@{int(self.started)}\n"
        self.done.append(arguments[0])
        if arguments[0] == "restart":
            self.started = time.time()
        self.take()
        return ""


def digest(key: str) -> bytes:
    """Return what LMDeploy keeps of a key."""
    return sha256(key.encode()).digest()


def step(host: Host, name: str, *, key: str = "", dry: bool = False) -> dict[str, object]:
    """Do one step on a host."""
    return converge({"step": name, "key": key, "config_dir": str(host.folder)}, dry=dry)


def test_an_engine_that_reloads_serves_on_and_no_later_run_restarts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path, reloads=True)
    monkeypatch.setattr(engine_keys, "systemctl", host.systemctl)
    with host.engine:
        assert step(host, "open", key=NEW, dry=True)["changed"]
        assert (tmp_path / "api-key").read_text() == f"{OLD}\n"
        assert step(host, "open", key=NEW) == {
            "changed": True, "reloaded": ["api-server.service"], "restarted": [], "valid": 2,
        }  # fmt: skip
        assert not step(host, "open", key=NEW)["changed"]
        assert step(host, "close")["valid"] == 1
        assert not step(host, "close")["changed"]
    assert host.done == ["reload", "reload"]
    assert (tmp_path / "api-key").read_text() == f"{NEW}\n"
    assert (tmp_path / "api-key").stat().st_mtime <= host.started
    assert (tmp_path / "api-key").stat().st_mode & 0o777 == 0o600


def test_an_engine_that_can_not_is_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tmp_path, reloads=False)
    monkeypatch.setattr(engine_keys, "systemctl", host.systemctl)
    with host.engine:
        assert step(host, "open", key=NEW)["restarted"] == ["api-server.service"]
    assert host.done == ["restart"]


def test_a_step_that_was_cut_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tmp_path, reloads=True)
    monkeypatch.setattr(engine_keys, "systemctl", host.systemctl)
    # Written, and then the controller died.
    (tmp_path / "api-key").write_text(f"{NEW}\n{OLD}\n")
    with host.engine:
        assert step(host, "open")["reloaded"] == ["api-server.service"]
        assert not step(host, "open")["changed"]


def test_an_engine_that_keeps_its_old_keys_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tmp_path, reloads=True, deaf=True)
    monkeypatch.setattr(engine_keys, "systemctl", host.systemctl)
    monkeypatch.setattr(engine_keys, "PROOF_SECONDS", 0.3)
    with host.engine, pytest.raises(KeyFault, match="with 401, 200, not 200, 200"):
        step(host, "open", key=NEW)


def test_a_host_without_a_key_is_told(tmp_path: Path) -> None:
    with pytest.raises(KeyFault, match=r"run site\.yml"):
        converge({"step": "open", "key": "", "config_dir": str(tmp_path)}, dry=False)
