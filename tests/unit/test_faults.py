"""What tests/faults stands on: moments that repeat, a comparison that sees, a leash that leaves nobody."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mirror
import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.conda_releases import parse_lock
from campaign import latest, summary, survived
from comparison import Moment, differences, moments
from harness import Run, watch
from leash import KILLED

LEASH = Path(__file__).parents[1] / "faults/leash.py"


def state(**changes: Any) -> dict[str, Any]:
    """Return a host."""
    files = {
        "/etc/api-server/api-key": ["0o100600", "root", "root", "secret"],
        "/etc/gateway/haproxy.cfg": ["0o100640", "root", "haproxy", "hash"],
        "/opt/miniconda3/bin/conda": ["0o100755", "root", "root", "hash"],
    }
    whole = {
        "files": files,
        "units": {"api-server.service": "enabled active"},
        "packages": ["a 1 installed"],
        "accounts": ["user api-server"],
        "servers": {"host": "up"},
        "answer": "P",
    }
    return {**whole, **changes}


def changed(path: str, place: int, word: str) -> dict[str, Any]:
    """Return a host on which one file differs."""
    files: dict[str, list[str]] = {name: list(entry) for name, entry in state()["files"].items()}
    files[path][place] = word
    return state(files=files)


def test_moments_repeat_and_cover_the_whole_run() -> None:
    starts = [1.0, 50.0, 119.0]
    found = moments(60, 120.0, starts, 7)
    assert found == moments(60, 120.0, starts, 7)
    assert found != moments(60, 120.0, starts, 8)
    assert found[0].task in (0, 1)
    assert all(moment.seconds >= 0 for moment in found)
    seconds = [moment.seconds + (starts[moment.task - 1] if moment.task else 0) for moment in found]
    assert [int(second // 2) for second in seconds] == list(range(60))


def test_a_run_is_cut_some_time_after_a_task_began(tmp_path: Path) -> None:
    """However slow the tasks before it are."""
    log = tmp_path / "log"
    script = "for n in 1 2 3; do echo; echo 'TASK [a]'; sleep 0.3; done; exec sleep 60"
    with log.open("wb") as stream, subprocess.Popen(["sh", "-c", script], stdout=stream) as process:
        starts = watch(process, log, Moment(2, 0.1), time.monotonic())
        process.kill()
    assert len(starts) == 2
    with log.open("wb") as stream, subprocess.Popen(["true"], stdout=stream) as process:
        assert watch(process, log, Moment(2, 0.1), time.monotonic()) == []


def test_a_moment_that_was_lost_stays_in_the_figures() -> None:
    """Also where it is met again after its fault was mended; then only the last time says what is lost."""
    entry = {"series": "site", "kind": "power", "of": 2, "seed": 5, "number": 0, "differences": ["x"]}
    entries = [entry, {**entry, "number": 1, "differences": []}]
    assert summary(entries) == {"site": {"power": {"tried": 2, "survived": 1}}}
    again = [*entries, {**entry, "differences": []}]
    assert summary(again) == {"site": {"power": {"tried": 3, "survived": 2}}}
    assert [survived(one) for one in latest(again)] == [True, True]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (changed("/opt/miniconda3/bin/conda", 3, "other"), "content other, wanted hash"),
        (changed("/etc/api-server/api-key", 0, "0o100644"), "mode 0o100644"),
        (changed("/etc/gateway/haproxy.cfg", 2, "root"), "group root, wanted haproxy"),
        (state(files={}), "is missing"),
        (state(files={**state()["files"], "/opt/x": ["0o100644", "root", "root", ""]}), "/opt/x is there"),
        (state(units={"api-server.service": "disabled"}), "unit api-server.service: disabled, wanted enabled active"),
        (state(packages=["a 1 unpacked"]), "package a 1 installed is missing"),
        (state(answer="London"), "answer: 'London'"),
        (state(servers={"host": "held back"}), "server host of the gateway: held back, wanted up"),
        (state(accounts=[]), "account user api-server is missing"),
        (changed("/etc/gateway/haproxy.cfg", 3, "other"), "content other, wanted hash"),
    ],
)
def test_a_difference_is_seen(found: dict[str, Any], words: str) -> None:
    assert any(words in line for line in differences(state(), found)), differences(state(), found)


def test_a_key_may_be_another_and_a_service_writes_its_folder() -> None:
    assert differences(state(), changed("/etc/api-server/api-key", 3, "another")) == []
    more = {**state()["files"], "/var/lib/open-webui/data/webui.db": ["0o100600", "open-webui", "open-webui", "x"]}
    assert differences(state(), state(files=more)) == []
    more = {**state()["files"], "/opt/miniconda3/pkgs/.python-3.11_x/bin": ["0o40755", "root", "root", ""]}
    assert differences(state(), state(files=more)) == []
    assert differences(state(), state(units={**state()["units"], "apt-daily.service": "static active"})) == []
    lock = "/opt/miniconda3/pkgs/python-3.11_0.lock"
    once, twice = ({**state()["files"], lock: ["0o100644", "root", "root", count]} for count in ("once", "twice"))
    assert differences(state(files=once), state(files=twice)) == []
    assert differences(state(files=once), state()) == [f"{lock} is missing"]


def test_the_leash_also_ends_who_was_started_while_it_killed(tmp_path: Path) -> None:
    """A master of SSH that leaves its session at that moment was waited for without an end."""
    begun = tmp_path / "begun"
    script = f"while :; do setsid setsid sleep 600 & echo >{begun}; done"
    with subprocess.Popen([sys.executable, str(LEASH), "sh", "-c", script], stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 20
            while not begun.exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.terminate()
            assert process.wait(30) == KILLED
        finally:
            process.kill()


def test_the_leash_kills_those_who_left_their_session(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = (
        f"setsid sh -c 'echo $$ >>{pids}; sleep 60' & (setsid setsid sh -c 'echo $$ >>{pids}; sleep 60' &); sleep 60"
    )
    with subprocess.Popen([sys.executable, str(LEASH), "sh", "-c", script]) as process:
        deadline = time.monotonic() + 20
        while not pids.exists() or len(pids.read_text().split()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        assert process.wait(20) == KILLED
    assert [pid for pid in pids.read_text().split() if Path("/proc", pid).exists()] == []


def test_a_run_tells_its_last_task_and_its_failure() -> None:
    output = """\
TASK [a : b] ***
ok: [h]

TASK [c : d] ***
fatal: [h]: FAILED! =>
    msg: no
      room

PLAY RECAP ***
"""
    run = Run(2, output, 1.0)
    assert run.task() == "c : d"
    assert run.failure() == "fatal: [h]: FAILED! => msg: no room"


def test_the_mirrors_lock_is_one() -> None:
    (requirement,) = parse_lock(mirror.lock())
    assert (requirement.name, requirement.version) == ("faultless", "1.0")


def test_the_figures_are_printed_and_what_is_missing_is_said() -> None:
    root = LEASH.parents[2]
    output = subprocess.run(["script/bench", "trust"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert output.startswith("trust of version ")
    for topic in ("moments", "faults", "inputs", "units", "secrets", "rotation", "ports", "firewall"):
        assert re.search(rf"^{topic} +\S", output, re.MULTILINE), output
    assert (root / "artifacts/bench/trust.json").exists()
