"""The module system_packages: one look on a host that has them, patience with locks, and the end of what was cut."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.modules import system_packages
from ansible_collections.selfhost.lmdeploy.plugins.modules.system_packages import PackageError, Packages, Said, converge

LOCK = "E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 42 (unattended-upgr)"
PARAMS = {"names": ["haproxy"], "state": "present", "started": True, "purged": True, "lists_seconds": 86400}


class Host:
    """A host as its programs show it; installing works unless told otherwise."""

    def __init__(self, state: str = "not-installed", answers: list[Said] | None = None) -> None:
        """Take the state of the package, and what apt-get install says before it works."""
        self.state, self.answers = state, answers or []
        self.audit = ""
        self.commands: list[str] = []
        self.now = 0.0
        # What the policy says to the scripts of the package, and to those of another installation meanwhile.
        self.policy: list[int] = []

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    def call(self, command: list[str]) -> Said:
        """Run a program."""
        line = " ".join(command)
        if command[0] == "dpkg-query":
            return Said(0, f"haproxy {self.state}\n") if self.state != "unknown" else Said(1, "no packages found\n")
        self.commands.append(" ".join(word for word in command if not word.startswith("-") and "=" not in word))
        if line == "dpkg --audit":
            return Said(0, self.audit)
        if "--configure" in command:
            self.state, self.audit = "installed", ""
        if command[0] == "apt-get" and "install" in command and "haproxy" in command:
            if self.answers:
                return self.answers.pop(0)
            self.state = "installed"
            self.policy = asked_policy()
        if "purge" in command:
            self.state = "not-installed"
        if "remove" in command:
            self.state = "config-files"
        return Said(0, "")

    def packages(self) -> Packages:
        """Return the code under test before this host."""
        return Packages(60, self.call, lambda: self.now, self.sleep)


def asked_policy() -> list[int]:
    """Ask the policy as dpkg's scripts do: from this module's installation, and from another one."""
    policy = str(system_packages.POLICY)
    if not system_packages.POLICY.exists():
        return [0, 0]
    ours = system_packages.quiet([policy, "haproxy", "start"]).code
    return [ours, subprocess.run([policy, "haproxy", "start"], check=False).returncode]


@pytest.fixture(autouse=True)
def lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the host package lists that are new."""
    (tmp_path / "mirror_Packages.lz4").touch()
    monkeypatch.setattr(system_packages, "LISTS", tmp_path)
    monkeypatch.setattr(system_packages, "STAMPS", (tmp_path,))
    monkeypatch.setattr(system_packages, "UPDATES", tmp_path / "updates")
    kept = tmp_path / "policy-rc.d.before-selfhost"
    text = system_packages.POLICY_TEXT.replace(str(system_packages.KEPT_POLICY), str(kept))
    for name, value in (("POLICY", tmp_path / "policy-rc.d"), ("KEPT_POLICY", kept), ("POLICY_TEXT", text)):
        monkeypatch.setattr(system_packages, name, value)
    return tmp_path


def play(host: Host, *, dry: bool = False, **changes: Any) -> dict[str, Any]:
    """Run the module."""
    return converge({**PARAMS, **changes}, host.packages(), dry=dry)


def test_a_host_that_has_them_is_only_looked_at() -> None:
    host = Host("installed")
    assert play(host)["changed"] is False
    assert host.commands == []


def test_check_mode_says_what_is_missing_and_does_nothing() -> None:
    host = Host("unknown")
    result = play(host, dry=True)
    assert (result["changed"], result["packages"]) == (True, ["haproxy"])
    assert host.commands == []


def test_new_lists_are_not_read_again(lists: Path) -> None:
    host = Host()
    play(host)
    assert "apt-get update" not in host.commands
    (lists / "mirror_Packages.lz4").unlink()
    host = Host()
    play(host)
    assert "apt-get update" in host.commands


def test_what_was_unpacked_and_not_configured_is_finished_first() -> None:
    host = Host("half-configured")
    host.audit = "The following packages are only half configured"
    assert play(host)["repaired"] is True
    assert host.state == "installed"


def test_dpkgs_journal_tells_a_cut_too(lists: Path) -> None:
    (lists / "updates").mkdir()
    (lists / "updates" / "0007").touch()
    host = Host()
    assert play(host)["repaired"] is True


def test_locks_are_waited_for_and_their_holder_is_named() -> None:
    host = Host(answers=[Said(100, LOCK)] * 3)
    assert play(host)["changed"] is True
    assert host.now == 6.0
    with pytest.raises(PackageError, match=r"held the locks of apt for 60 s(.|\n)*unattended-upgr"):
        play(Host(answers=[Said(100, LOCK)] * 100))


def test_lists_that_the_mirror_has_overtaken_are_read_anew() -> None:
    host = Host(answers=[Said(100, "E: Unable to fetch some archives, maybe run apt-get update")])
    assert play(host)["changed"] is True
    assert "apt-get update" in host.commands


def test_a_failure_has_the_last_words_of_apt() -> None:
    with pytest.raises(PackageError, match=r"can't install haproxy(.|\n)*No space left"):
        play(Host(answers=[Said(100, "E: Write error - write (28: No space left on device)")]))


def test_packages_go_with_their_configuration() -> None:
    host = Host("installed")
    assert play(host, state="absent")["changed"] is True
    assert host.state == "not-installed"
    assert play(host, state="absent")["changed"] is False
    assert play(Host("config-files"), state="absent")["changed"] is True


def test_packages_go_and_leave_what_they_were_configured_with() -> None:
    host = Host("installed")
    assert play(host, state="absent", purged=False)["changed"] is True
    assert (host.state, host.commands) == ("config-files", ["dpkg", "apt-get remove haproxy"])
    assert play(host, state="absent", purged=False)["changed"] is False
    assert play(host, state="absent")["changed"] is True


def test_nothing_starts_while_it_is_installed_and_others_start_theirs() -> None:
    host = Host()
    play(host, started=False)
    assert host.policy == [101, 0]
    assert not system_packages.POLICY.exists()
    started = Host()
    play(started)
    assert started.policy == [0, 0]


def test_the_administrators_own_policy_is_asked_and_stays() -> None:
    system_packages.POLICY.write_text("#!/bin/sh\nexit 104\n")
    system_packages.POLICY.chmod(0o755)
    for answers in ([], [Said(100, "E: No space left on device")]):
        host = Host(answers=answers)
        if answers:
            with pytest.raises(PackageError):
                play(host, started=False)
        else:
            play(host, started=False)
            assert host.policy == [101, 104]
        assert system_packages.POLICY.read_text() == "#!/bin/sh\nexit 104\n"
        assert not system_packages.KEPT_POLICY.exists()


def test_a_policy_that_a_kill_left_stops_nobody_and_goes_with_the_next_run() -> None:
    killed = system_packages.policy()
    killed.__enter__()
    assert asked_policy() == [101, 0]
    host = Host("installed")
    assert play(host, started=False, dry=True)["changed"] is True
    assert play(host, started=False)["repaired"] is True
    assert not system_packages.POLICY.exists()
    assert play(host, started=False)["changed"] is False
