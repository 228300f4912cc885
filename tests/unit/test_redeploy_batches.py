"""redeploy.yml: canary and batches come from inventory or command line, and hosts agree on them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
HOSTS = [f"gpu-{number}" for number in range(1, 6)]


def run(folder: Path, variables: dict[str, Any], own: dict[str, Any], *arguments: str) -> tuple[int, str]:
    """Run the part of the playbook that makes the batches; ``own`` are variables of the first host."""
    changing = next(play for play in yaml.safe_load((ROOT / "playbooks/redeploy.yml").read_text()) if "serial" in play)
    show = {"name": "Show", "ansible.builtin.debug": {"msg": "batch {{ ansible_play_batch | join(' ') }}"}}
    checks = {"ansible.builtin.import_tasks": str(ROOT / "playbooks/tasks/redeploy_variables.yml")}
    group = {"ansible.builtin.group_by": {"key": "redeploy_waiting"}}
    plays = [
        {"hosts": "model_servers", "gather_facts": False, "tasks": [checks, group]},
        {**changing, "become": False, "tasks": [{**show, "run_once": True}]},
    ]
    (folder / "play.yml").write_text(json.dumps(plays))
    hosts = {**{name: {} for name in HOSTS}, HOSTS[0]: own}
    groups = {"model_servers": {"hosts": hosts, "vars": {"ansible_connection": "local", **variables}}}
    (folder / "hosts.json").write_text(json.dumps(groups))
    command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(folder / "hosts.json")]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"}
    done = subprocess.run(
        [*command, str(folder / "play.yml"), *arguments], capture_output=True, text=True, check=False, env=environment
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("variables", "arguments", "sizes"),
    [
        ({}, (), [1, 1, 1, 1, 1]),
        ({"redeploy_canary": 2, "redeploy_batch": "60%"}, (), [2, 3]),
        ({"redeploy_canary": 2, "redeploy_batch": 2}, ("-e", "redeploy_batch=1"), [2, 1, 1, 1]),
    ],
)
def test_batches_come_from_the_inventory_and_the_command_line(
    tmp_path: Path, variables: dict[str, Any], arguments: tuple[str, ...], sizes: list[int]
) -> None:
    code, output = run(tmp_path, variables, {}, *arguments)
    assert code == 0, output
    assert [len(found.split()) for found in re.findall(r"msg: batch (.*)", output)] == sizes


def test_hosts_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    code, output = run(tmp_path, {"redeploy_batch": 2}, {"redeploy_batch": 3})
    assert code == 2
    assert "redeploy_batch is 3 and 2, depending on the host" in " ".join(output.split())
