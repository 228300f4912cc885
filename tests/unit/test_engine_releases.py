"""Releases of an engine: what the host does when a gate passes, fails, or is cut, with systemd played by a stand-in."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.lookup.data_url import data_url
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import engine_releases, openai_api
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.engine_releases import (
    BOOT_UNIT,
    TOKEN,
    Manager,
    ReleaseFault,
    Releases,
    gate_text,
    identity,
    locked,
)
from fake_engine import FakeEngine

KEY = "k" * 32
UNIT = f"# Made by selfhost.lmdeploy.api_server: x\n# Release {TOKEN}\n[Service]\nExecStart=/x/{TOKEN}/launcher.py\n"


class FakeManager(Manager):
    """A systemd that starts what it is told to, unless the unit is one that does not start."""

    def __init__(self, unit_file: Path) -> None:
        """Nothing runs."""
        self.unit_file = unit_file
        self.active, self.enabled = "inactive", "disabled"
        self.started = 0.0
        self.broken = ""
        self.done: list[str] = []
        self.killed_at = ""
        self.failed: set[str] = set()

    def run(self, *command: str) -> str:
        """Do what systemd would."""
        words = [word for word in command if not word.startswith("--")]
        action = words[1] if words[0] == "systemctl" else words[0]
        self.done.append(action)
        if action == self.killed_at:
            raise KeyboardInterrupt
        if action in ("start", "restart"):
            if self.broken and self.broken in self.unit_file.read_text():
                self.active = "failed"
                message = "Job for the unit failed."
                raise ReleaseFault(message)
            if action == "restart" or self.active != "active":
                self.started = time.time()
            self.active = "active"
        elif action == "stop" and "timer" not in words[-1]:
            self.active = "inactive"
        elif action == "reset-failed":
            self.failed.discard(words[-1])
        elif action in ("enable", "disable"):
            self.enabled = f"{action}d"
        elif action == "show":
            moment = time.strftime("%a %Y-%m-%d %H:%M:%S", time.gmtime(self.started))
            stamp = f"{moment}.{int(self.started % 1 * 1e6):06d} UTC" if self.started else ""
            return f"ActiveState={self.active}\nUnitFileState={self.enabled}\nExecMainStartTimestamp={stamp}\n"
        return "the journal"


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    """An engine that answers Paris."""
    with FakeEngine(model="m", key=KEY) as made:
        yield made


@pytest.fixture
def host(tmp_path: Path, engine: FakeEngine) -> Releases:
    """A host without an engine, and where its one will listen."""
    config, units = tmp_path / "etc", tmp_path / "units"
    units.mkdir()
    config.mkdir()
    (config / "api-key").write_text(f"{KEY}\n")
    (tmp_path / "model").touch()
    found = Releases("api-server", config, units)
    found.manager = FakeManager(found.unit_file)
    return found


def systemd(host: Releases) -> FakeManager:
    """Return the host's stand-in for systemd."""
    assert isinstance(host.manager, FakeManager)
    return host.manager


def build(host: Releases, engine: FakeEngine, number: int, expected: str = "paris") -> str:
    """Build a release."""
    top = host.config.parent
    settings = {"host": "127.0.0.1", "port": engine.port, "model_name": "m", "number": number, "engine": "llama_cpp"}
    about = {"environment": str(top / "env"), "model_path": str(top / "model"), "gate": {"expected": expected}}
    return host.build(UNIT, settings, "launch", about)


def switch(host: Releases, release: str, awaits: str = "gate", seconds: float = 60) -> dict[str, Any]:
    """Switch."""
    return host.switch(release, confirm_seconds=seconds, awaits=awaits)


def test_equal_content_is_one_release_and_any_other_is_another(host: Releases, engine: FakeEngine) -> None:
    one = build(host, engine, 1)
    assert build(host, engine, 1) == one
    assert build(host, engine, 2) != one
    assert len(one) == 12
    assert identity("a", {}, "b") != identity("a", {}, "c")
    assert one in (host.folder(one) / host.unit).read_text()
    assert (host.folder(one) / "instance.json").stat().st_mode & 0o777 == 0o600
    assert (host.folder(one) / "model").readlink().name == "model"


def test_a_release_that_lost_a_file_is_built_again(host: Releases, engine: FakeEngine) -> None:
    one = build(host, engine, 1)
    (host.folder(one) / "launcher.py").write_text("half of i")
    assert not host.is_whole(one)
    assert build(host, engine, 1) == one
    assert host.is_whole(one)


def test_a_switch_that_serves_makes_good_a_boot_that_failed(host: Releases, engine: FakeEngine) -> None:
    """The unit that ends a cut switch at boot is not called failed any more; it is as long as nothing serves."""
    systemd(host).failed.add(BOOT_UNIT)
    wrong = build(host, engine, 1, expected="london")
    with pytest.raises(ReleaseFault):
        switch(host, wrong)
    assert systemd(host).failed == {BOOT_UNIT}
    switch(host, build(host, engine, 2))
    assert systemd(host).failed == set()


def test_a_release_that_serves_stays(host: Releases, engine: FakeEngine) -> None:
    one = build(host, engine, 1)
    assert host.needs(one) == ["release none is in use"]
    done = switch(host, one)
    assert done["changed"]
    assert done["gate"]["passed"]
    assert (host.confirmed(), host.running(), host.pending()) == (one, one, {})
    assert (host.config / "api-server.json").resolve() == host.folder(one) / "instance.json"
    assert host.needs(one) == []
    assert not switch(host, one)["changed"]
    assert "passed" in gate_text(host.manifest(one)["result"])


def test_a_release_that_does_not_start_gives_way_to_the_one_before(host: Releases, engine: FakeEngine) -> None:
    one, two = build(host, engine, 1), build(host, engine, 2)
    switch(host, one)
    systemd(host).broken = two
    with pytest.raises(ReleaseFault) as caught:
        switch(host, two)
    for part in (two, "did not become active", "the journal", f"Release {one} serves again", "Paris"):
        assert part in str(caught.value)
    assert (host.confirmed(), host.running(), host.pending()) == (one, one, {})
    assert "failed" in gate_text(host.manifest(two)["result"])
    systemd(host).broken = ""
    assert host.needs(two), "it is attempted again when asked for"
    assert switch(host, two)["changed"]


def test_a_wrong_answer_gives_way_too(host: Releases, engine: FakeEngine) -> None:
    one, two = build(host, engine, 1), build(host, engine, 2, expected="London")
    switch(host, one)
    with pytest.raises(ReleaseFault, match=r"does not match api_server_gate_expected, 'London'(.|\n)* serves again"):
        switch(host, two)
    assert host.running() == one


def test_an_image_must_be_read(host: Releases, engine: FakeEngine, tmp_path: Path) -> None:
    picture = tmp_path / "sign.png"
    picture.write_bytes(b"\x89PNG and so on")
    release = build(host, engine, 1)
    for text, passes in (("open", True), ("closed", False)):
        gate = {"image": data_url(picture), "image_expected": text}
        engine_releases.write_json(host.folder(release) / "release.json", {**host.manifest(release), "gate": gate})
        if passes:
            assert host.ask(release)["answer"]
        else:
            with pytest.raises(engine_releases.GateFault, match="read api_server_gate_image as 'OPEN', which does not"):
                host.ask(release)
    picture.write_text("no picture")
    with pytest.raises(ValueError, match="is no PNG"):
        data_url(picture)


def test_a_first_release_that_fails_is_stopped_and_can_be_tried_again(host: Releases, engine: FakeEngine) -> None:
    one = build(host, engine, 1)
    systemd(host).broken = one
    with pytest.raises(ReleaseFault, match="no release to go back to: the unit is stopped"):
        switch(host, one)
    assert host.manager.show(host.unit)["ActiveState"] == "inactive"
    assert host.manager.show(host.unit)["UnitFileState"] == "disabled"
    systemd(host).broken = ""
    assert switch(host, one)["gate"]["passed"]


@pytest.mark.parametrize("moment", ["daemon-reload", "enable", "restart", "journalctl"])
def test_a_switch_that_is_cut_anywhere_is_finished_by_the_host(host: Releases, engine: FakeEngine, moment: str) -> None:
    one, two = build(host, engine, 1), build(host, engine, 2)
    switch(host, one)
    systemd(host).killed_at = moment
    if moment == "journalctl":
        systemd(host).broken = two
    with pytest.raises(KeyboardInterrupt):
        switch(host, two)
    assert host.pending()["to"] == two
    assert "systemd-run" in systemd(host).done
    systemd(host).killed_at = ""
    if moment == "journalctl":
        with pytest.raises(ReleaseFault, match=f"Release {one} serves again"):
            host.resume()
    else:
        assert "passed" in host.resume()
    assert host.running() == (one if moment == "journalctl" else two)
    assert (host.confirmed(), host.pending()) == (host.running(), {})
    assert host.resume() == ""


def test_no_switch_is_pending_without_a_timer(host: Releases, engine: FakeEngine) -> None:
    one, two = build(host, engine, 1), build(host, engine, 2)
    switch(host, one)
    systemd(host).killed_at = "systemd-run"
    with pytest.raises(KeyboardInterrupt):
        switch(host, two)
    assert host.pending() == {}


def test_a_switch_that_nobody_confirms_goes_back(host: Releases, engine: FakeEngine) -> None:
    one, two = build(host, engine, 1), build(host, engine, 2)
    switch(host, one)
    switch(host, two, "caller", 60)
    assert (host.running(), host.confirmed()) == (two, one)
    with pytest.raises(ReleaseFault, match=f"release {two} of another run waits"):
        switch(host, build(host, engine, 3))
    assert host.resume(booted=False) == "", "a timer that comes early leaves it alone"
    assert "passed" in host.resume(), "before its time is over only the gate is asked again"
    assert host.pending()
    switch_file = host.home / "pending.json"
    switch_file.write_text(json.dumps({**json.loads(switch_file.read_text()), "until": 0}))
    with pytest.raises(ReleaseFault, match=f"was not confirmed within 60 s(.|\n)*Release {one} serves again"):
        host.resume()
    with pytest.raises(ReleaseFault, match="does not wait for a confirmation"):
        host.confirm(two)


def test_a_confirmed_switch_stays_and_can_be_taken_back(host: Releases, engine: FakeEngine) -> None:
    one, two = build(host, engine, 1), build(host, engine, 2)
    with pytest.raises(ReleaseFault, match="no release before"):
        host.rollback("", 60)
    switch(host, one)
    switch(host, two, "caller")
    assert host.confirm(two)
    assert not host.confirm(two)
    assert host.rollback("", 60)["release"] == one
    assert host.confirmed() == one
    assert host.rollback(two, 60)["release"] == two
    with pytest.raises(ReleaseFault, match="no whole release 000000000000"):
        host.rollback("000000000000", 60)


def test_a_changed_key_or_a_stopped_unit_needs_the_same_release_again(host: Releases, engine: FakeEngine) -> None:
    one = build(host, engine, 1)
    switch(host, one)
    assert host.needs(one, key="x" * 32) == ["the key is another"]
    engine.key = "n" * 32
    time.sleep(0.01)
    host.have_key(engine.key)
    assert host.needs(one) == ["the process is older than its files"]
    assert switch(host, one)["changed"]
    host.manager.have(host.unit, "stop")
    assert host.needs(one) == ["the unit is inactive"]
    assert host.needs(one, started=False) == ["it starts at boot"]
    host.switch(one, confirm_seconds=1, started=False)
    assert host.needs(one, started=False) == []


def test_old_releases_go_and_the_one_before_stays(host: Releases, engine: FakeEngine) -> None:
    made = [build(host, engine, number) for number in range(4)]
    for release in made:
        switch(host, release)
    untried, failed = build(host, engine, 8), build(host, engine, 9)
    host.note(failed, {"passed": False, "at": "now", "fault": "x"})
    assert host.prune(2) == sorted([*made[:2], failed])
    assert host.all() == sorted([*made[2:], untried])
    assert host.previous() == made[2]


def test_an_engine_from_before_there_were_releases_is_adopted(host: Releases, engine: FakeEngine) -> None:
    file, top = host.config / "api-server.json", host.config.parent
    old = {
        "host": "127.0.0.1",
        "port": engine.port,
        "model_name": "m",
        "engine": "llama_cpp",
        "release": str(top),
        "model_path": "/m",
    }
    file.write_text(json.dumps(old))
    host.unit_file.write_text(
        "# Made by selfhost.lmdeploy.api_server: x\n[Service]\n"
        f"ExecStart=/python {engine_releases.OLD_LAUNCHER}\nLoadCredential=instance.json:{file}\n"
    )
    two = build(host, engine, 2)
    done = switch(host, two)
    assert done["from"]
    assert host.previous() == done["from"]
    unit = (host.folder(done["from"]) / host.unit).read_text()
    assert f"LoadCredential=instance.json:{host.folder(done['from'])}/instance.json" in unit
    assert file.is_symlink()
    host.rollback("", 60)
    assert host.running() == done["from"]


def test_people_activate_what_runs(host: Releases, engine: FakeEngine, tmp_path: Path) -> None:
    releases, envs = tmp_path / "releases/x", tmp_path / "envs"
    (releases / "old").mkdir(parents=True)
    envs.mkdir()
    (envs / "x").symlink_to("../releases/x/new")
    settings = {"host": "127.0.0.1", "port": engine.port, "model_name": "m", "engine": "llama_cpp"}
    about = {"environment": str(releases / "old"), "environment_link": str(envs / "x"), "model_path": "/m"}
    host.activate(host.build(UNIT, settings, "launch", about))
    assert str((envs / "x").readlink()) == "../releases/x/old"


def test_two_runs_take_turns(tmp_path: Path) -> None:
    lock, order = tmp_path / "lock", []

    def second() -> None:
        with locked(lock):
            order.append("second")

    with locked(lock):
        thread = threading.Thread(target=second)
        thread.start()
        with pytest.raises(ReleaseFault, match="Another run"), locked(lock, wait_seconds=0.3):
            pass
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_the_program_stands_alone(tmp_path: Path) -> None:
    for module in (engine_releases, openai_api):
        source = Path(str(module.__file__))
        (tmp_path / source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    # Without site-packages, so that only the two files are there.
    command = [sys.executable, "-S", str(tmp_path / "engine_releases.py"), "switch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "needs an instance and a release" in done.stderr


def test_what_a_power_cut_left_of_a_file_goes_with_the_next_run(
    host: Releases, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = build(host, engine, 1)
    folder = host.folder(release)
    with monkeypatch.context() as power:
        # The last step is not reached, and nobody cleans up.
        power.setattr(Path, "replace", lambda *_: None)
        engine_releases.write_json(folder / "release.json", {"half": True})
    assert [path.name for path in folder.glob(".*")]
    assert build(host, engine, 1) == release
    assert not list(folder.glob(".*"))
    assert host.is_whole(release)
