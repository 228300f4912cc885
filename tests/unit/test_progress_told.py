"""How far a long step is: the words of its line, that the host keeps it, and that a real run shows it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import progress
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.conda_releases import parse_lock
from ansible_collections.selfhost.lmdeploy.plugins.modules import conda_environment, unit_current

ROOT = Path(__file__).parents[2]
HASH = "--hash=sha256:" + 64 * "0"
MODULE = """
#!/usr/bin/python
import time
from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.progress import told
def main():
    module = AnsibleModule(argument_spec={"seconds": {"type": "float"}})
    began = time.monotonic()
    with told("slow", lambda: f"{time.monotonic() - began:.0f} of {module.params['seconds']:.0f} steps", 0.2):
        time.sleep(module.params["seconds"])
    module.exit_json(changed=False)
main()
"""
ACTION = """
from ansible_collections.selfhost.lmdeploy.plugins.plugin_utils.watched import WatchedAction as ActionModule
"""
PLAY = """
- hosts: slow:quick
  gather_facts: false
  tasks:
    - {name: Load, slow: {seconds: "{{ seconds }}"}}
"""
INVENTORY = """
all:
  vars: {{ansible_connection: local, ansible_python_interpreter: {python}}}
  hosts: {{quick: {{seconds: 0}}, slow: {{seconds: 4}}}}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder where a step of this test is told."""
    monkeypatch.setattr(progress, "ROOT_FOLDER", tmp_path / "told")
    monkeypatch.setattr(progress, "place", lambda step: tmp_path / "told" / step)
    return tmp_path / "told"


def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_step_is_told_while_it_runs_and_leaves_nothing(place: Path) -> None:
    with progress.told("step", lambda: " 1 of 2\nfiles ", 0.01):
        until((place / "step").exists)
        assert (place / "step").read_text() == "1 of 2 files"
    assert not place.exists()


def test_what_goes_wrong_with_the_telling_is_no_fault_of_the_step(place: Path) -> None:
    def fail() -> str:
        raise ValueError

    with progress.told("step", fail, 0.01):
        time.sleep(0.05)
    assert not place.exists()
    place.write_text("no folder")
    with progress.told("step", lambda: "x", 0.01):
        time.sleep(0.05)


def test_a_line_of_a_killed_run_is_not_told_again(place: Path) -> None:
    place.mkdir()
    (place / "step").write_text("old")
    with progress.told("step", lambda: "new", 60):
        assert not (place / "step").exists()


@pytest.mark.parametrize(
    ("done", "total", "rate", "text"),
    [
        (10**9, 4 * 10**9, 1e8, "1.0 GB of 4.0 GB, 100.0 MB/s, 30 s left"),
        (10**9, 40 * 10**9, 1e8, "1.0 GB of 40.0 GB, 100.0 MB/s, 6 min left"),
        (10**9, 0, 1e8, "1.0 GB, 100.0 MB/s"),
        (0, 10**9, 0.0, "0 B of 1.0 GB, waiting for data"),
    ],
)
def test_a_flow_tells_bytes_rate_and_time_left(done: int, total: int, rate: float, text: str) -> None:
    assert progress.flow_text(done, total, rate) == text


def test_a_rate_is_that_of_the_last_seconds() -> None:
    now = [0.0]
    flow = progress.Flow(lambda: now[0])
    assert flow.rate(0) == 0
    now[0] = 100.0
    flow.rate(10)
    now[0] = 110.0
    assert flow.rate(1010) == 100


@pytest.mark.parametrize(
    ("status", "weights", "last", "text"),
    [
        ("Loading m: 12 s, 7.5 GB read, 4.0 GB in memory; begun", 30 * 10**9, 41.2,
         "loading for 12 s of 41 s last time, 25% of 30.0 GB read"),
        ("Loading m: 12 s, 7.5 GB read, 4.0 GB in memory; begun", 0, 0, "loading for 12 s, 7.5 GB read"),
        ("Loading m: 90 s, 70.5 GB read, 4.0 GB in memory; x", 30 * 10**9, 0,
         "loading for 90 s, 100% of 30.0 GB read"),
        ("Serving m: ready after 12.0 s", 30 * 10**9, 41.2, "Serving m: ready after 12.0 s"),
    ],
)  # fmt: skip
def test_a_load_tells_its_share_and_the_seconds_of_the_last_one(
    status: str, weights: int, last: float, text: str
) -> None:
    assert progress.load_text(status, weights, last) == text


def test_an_installation_of_packages_tells_how_many_of_all() -> None:
    lines = ["Reading package lists...\n"]
    assert progress.apt_text(lines) == "package lists"
    lines += ["0 upgraded, 3 newly installed, 0 to remove and 2 not upgraded.\n", "Get:1 http://x a 1 [5 kB]\n"]
    assert progress.apt_text(lines) == "1 of 3 packages fetched"
    lines += ["Unpacking a (1) ...\n", "Unpacking b (1) ...\n"]
    assert progress.apt_text(lines) == "2 of 3 packages unpacked"
    assert progress.apt_text([*lines, "Setting up b (1) ...\n"]) == "1 of 3 packages set up"


def test_an_environment_tells_its_packages(tmp_path: Path) -> None:
    wanted = parse_lock(f"a==1.0 {HASH}\nb==2 {HASH}\nc==3 {HASH}\n")
    folder, cache = tmp_path / "release", tmp_path / "cache"
    assert conda_environment.built(folder, cache, wanted) == "Python is put in place"
    (folder / "lib/python3.11/site-packages/pip-1.dist-info").mkdir(parents=True)
    for wheel in ("pypi/a/1.0-abc", "index/0f/b/2-abc", "pypi/c/4-abc"):
        (cache / "wheels-v8" / wheel).mkdir(parents=True)
    (cache / "wheels-v8/pypi/c/3-abc.http").write_text("")
    assert conda_environment.built(folder, cache, wanted) == "2 of 3 packages fetched, 0 in place"
    (folder / "lib/python3.11/site-packages/a-1.0.dist-info").mkdir()
    assert conda_environment.built(folder, cache, wanted) == "2 of 3 packages fetched, 1 in place"
    for name in ("b-2.dist-info", "c-3.dist-info"):
        (folder / "lib/python3.11/site-packages" / name).mkdir()
    assert conda_environment.built(folder, cache, wanted) == "3 of 3 packages in place, being compiled"


def test_a_start_is_compared_with_the_last_one() -> None:
    shown = {"InactiveExitTimestampMonotonic": "1000000", "ActiveEnterTimestampMonotonic": "34000000"}
    assert unit_current.start_seconds(shown) == 33
    assert unit_current.start_seconds({}) == 0
    assert unit_current.start_seconds({**shown, "ActiveEnterTimestampMonotonic": "0"}) == 0


@pytest.mark.parametrize("callback", [True, False])
def test_a_real_run_shows_how_far_a_host_is(tmp_path: Path, callback: bool) -> None:
    """In the callback's own line, or plainly where that is off; and only of the host that takes long."""
    for name, text in (("library/slow.py", MODULE), ("action/slow.py", ACTION), ("play.yml", PLAY)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text.lstrip(), encoding="utf-8")
    (tmp_path / "plain.cfg").write_text(f"[defaults]\ncollections_path = {ROOT}/.collections\n", encoding="utf-8")
    (tmp_path / "hosts.yml").write_text(INVENTORY.format(python=sys.executable), encoding="utf-8")
    environment = {
        **os.environ,
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg" if callback else tmp_path / "plain.cfg"),
        "ANSIBLE_LIBRARY": str(tmp_path / "library"),
        "ANSIBLE_ACTION_PLUGINS": str(tmp_path / "action"),
        "SELFHOST_PROGRESS_SECONDS": "1",
    }
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "hosts.yml", "play.yml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    line = r"Load: \d+ s, waiting for slow \(\d of 4 steps\), 1 done" if callback else r"slow: \d of 4 steps"
    assert re.search(rf"^\.\.\. {line}$", done.stdout, re.MULTILINE), done.stdout + done.stderr
    assert "quick (" not in done.stdout
    assert "quick:" not in re.sub(r"ok: .*|quick +: ok.*", "", done.stdout)
