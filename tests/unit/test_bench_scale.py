"""script/bench scale: what it tells of figures, and that it counts all processes of a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/bench"))

import scale  # noqa: E402  # found by the line above

COST = {"seconds": 2.04, "processor_seconds": 1.0, "memory_mb": 128.3, "rss_mb": 300.0}
FOUND = {
    1: {"first run": COST, "ping": COST, "nothing to do": {**COST, "seconds": 9.96, "times_ping": 4.88}},
    10: {"ping": COST, "nothing to do": {**COST, "times_ping": 1.0}},
}


def test_the_table_has_a_line_for_each_figure() -> None:
    lines = scale.table(FOUND).splitlines()
    assert "| 1 | nothing to do | 10.0 | 1.0 | 128 | 4.88 |" in lines
    assert len(lines) == 2 + 5


def test_the_picture_has_a_line_for_each_kind_of_run() -> None:
    picture = scale.picture(FOUND)
    assert picture.count("<polyline") == 2 * 3
    assert ">hosts<" in picture


def test_memory_and_time_are_those_of_all_processes(tmp_path: Path) -> None:
    eater = "import time; kept = b'x' * 60_000_000; time.sleep(1.5)"
    command = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {eater!r}])"]
    cost = scale.measured(command, tmp_path / "log")
    assert 60 < cost.memory_mb <= cost.rss_mb
    assert cost.seconds >= 1.5


def test_a_run_that_changed_something_is_seen(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("scale-1 : ok=3 changed=0\nscale-2 : ok=3 changed=0\n")
    assert scale.is_unchanged(log)
    log.write_text("scale-1 : ok=3 changed=0\nscale-2 : ok=3 changed=2\n")
    assert not scale.is_unchanged(log)


def test_hosts_that_were_left_alone_are_counted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("    msg: 'As wanted already: 11 of 12 hosts (scale-1, scale-2 and 9 more). To have'\n")
    assert scale.left_alone(log) == 11
    log.write_text("scale-1 : ok=3 changed=0\n")
    assert scale.left_alone(log) == 0


def test_its_command_line_is_told() -> None:
    done = subprocess.run(["script/bench", "scale", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--hosts" in done.stdout
