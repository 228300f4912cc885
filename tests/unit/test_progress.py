"""The callback progress: the words of its lines, and that a real run prints them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from ansible_collections.selfhost.lmdeploy.plugins.callback.progress import closing_line, waiting_line

ROOT = Path(__file__).parents[2]

PLAYBOOK = """
- hosts: quick:slow
  gather_facts: false
  tasks:
    - name: Wait for the engine
      ansible.builtin.command: sleep {{ seconds }}
    - name: Skip this
      ansible.builtin.command: "false"
      when: false
"""
INVENTORY = """
all:
  vars: {{ansible_connection: local, ansible_python_interpreter: {python}}}
  hosts: {{quick: {{seconds: 0}}, slow: {{seconds: 3}}}}
"""


def test_a_waiting_line_names_task_hosts_and_time() -> None:
    assert waiting_line("Load", 20.4, ["a", "b"], 3, {}) == "... Load: 20 s, waiting for a, b, 3 done"
    assert waiting_line("Load", 20.4, ["a"], 0, {"a": "1 of 2"}) == "... Load: 20 s, waiting for a (1 of 2)"


def test_a_waiting_line_counts_hosts_that_are_too_many_to_name() -> None:
    assert waiting_line("Load", 10, [f"h{i}" for i in range(7)], 0, {}).endswith("h0, h1, h2, h3, h4 and 2 more")


def test_the_closing_line_counts_and_names_the_slowest() -> None:
    line = closing_line(3, 1, 12.34, {"A": 1.0, "B": 9.0, "C": 2.0}, 2)
    assert line == "3 tasks ran, 1 skipped, in 12.3 s; slowest: B 9.0 s, C 2.0 s"
    assert closing_line(0, 0, 0.5, {}, 3) == "0 tasks ran, 0 skipped, in 0.5 s"


def test_a_real_run_tells_what_it_waits_for(tmp_path: Path) -> None:
    (tmp_path / "play.yml").write_text(PLAYBOOK, encoding="utf-8")
    (tmp_path / "hosts.yml").write_text(INVENTORY.format(python=sys.executable), encoding="utf-8")
    environment = {**os.environ, "SELFHOST_PROGRESS_SECONDS": "1", "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "hosts.yml", "play.yml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert re.search(r"^\.\.\. Wait for the engine: \d s, waiting for slow, 1 done$", done.stdout, re.MULTILINE)
    assert "Skip this: " not in done.stdout
    last = done.stdout.strip().splitlines()[-1]
    assert re.fullmatch(r"2 tasks ran, 2 skipped, in \d+\.\d s; slowest: Wait for the engine \d+\.\d s", last)
