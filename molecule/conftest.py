"""What the checks of every scenario share: run a role on the scenario's host, and see how it ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Played:
    """How a play ended."""

    rc: int
    output: str

    def changed(self) -> int:
        """Return the number of tasks that changed something; the play must have ended well."""
        if self.rc != 0:
            pytest.fail(self.output)
        return int(self.output.rsplit("changed=", 1)[1].split()[0])

    def changed_by(self) -> dict[str, int]:
        """Return the number of tasks that changed something on each host; the play must have ended well."""
        self.changed()
        return {
            name: int(count)
            for name, count in re.findall(r"^(\S+) +: ok=\d+ +changed=(\d+)", self.output, re.MULTILINE)
        }

    def message(self) -> str:
        """Return what a failed play said, on one line; the play must have failed."""
        if self.rc == 0:
            pytest.fail(f"This was to fail:\n{self.output}")
        return " ".join(self.output.split())


@pytest.fixture
def play(host: Any, tmp_path: Path) -> Callable[..., Played]:
    """Return a function that runs one entry point of a role with the variables given.

    It runs on the scenario's host, or on the hosts that a pattern names.
    """

    def run(role: str, entry: str = "main", *, check: bool = False, hosts: str = "", **variables: object) -> Played:
        included = {"name": f"selfhost.lmdeploy.{role}", "tasks_from": entry}
        tasks = [{"name": "Run the role", "ansible.builtin.include_role": included}]
        # Scenarios may have underscores, hosts may not.
        name = host.backend.get_hostname().replace("_", "-")
        # Its variables are seen by other roles although nothing of it runs.
        roles = [{"role": "selfhost.lmdeploy.mirrors", "tags": ["never"]}]
        playbook = tmp_path / f"{uuid.uuid4()}.yml"
        document = {"name": "Play", "hosts": hosts or name, "gather_facts": False, "roles": roles, "tasks": tasks}
        playbook.write_text(json.dumps([document]))
        command = [str(Path(sys.executable).with_name("ansible-playbook")), str(playbook)]
        command += ["-i", str(ROOT / "molecule/inventory/hosts.yml"), "-e", json.dumps(variables)]
        command += ["--check"] if check else []
        environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
        return Played(done.returncode, done.stdout + done.stderr)

    return run
