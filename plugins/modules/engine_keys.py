#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Change the key of a host's engines in two steps, between which the old one and the new one are valid."""

from __future__ import annotations

DOCUMENTATION = r"""
module: engine_keys
short_description: Change the key of a host's engines without refusing anybody
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - The first step, C(open), puts a new key before the old one in the engines' key file, and every running engine takes
    both. Clients get the new one then. The second step, C(close), leaves the new one alone.
  - LMDeploy takes keys while it serves, by C(systemctl reload). llama.cpp is restarted, one engine after the other.
  - Every engine is asked afterwards. It must let in each valid key, and refuse the one that was taken away.
  - A step that was cut is finished by the same step; a second C(open) before C(close) makes no third key.
options:
  step:
    description: The step.
    type: str
    choices: [open, close]
    required: true
  key:
    description: The new key. When empty, one is generated.
    type: str
    default: ''
  config_dir:
    description: Folder that the role C(api_server) keeps its files in.
    type: path
    default: /etc/api-server
attributes:
  check_mode:
    description: Says what would be done.
    support: full
  diff_mode:
    description: Keys are never shown.
    support: none
"""

EXAMPLES = r"""
- name: Let a new key in beside the old one
  selfhost.lmdeploy.engine_keys:
    step: open
"""

RETURN = r"""
reloaded:
  description: Units that took the keys while they served.
  returned: success
  type: list
  elements: str
restarted:
  description: Units that were restarted for it.
  returned: success
  type: list
  elements: str
valid:
  description: How many keys are valid now.
  returned: success
  type: int
"""

import http.client
import json
import os
import secrets
import string
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.engine import url
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.openai_api import ApiFault, OpenAI
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.private_files import PrivateFiles

KEY_CHARACTERS = 48
PROOF_SECONDS = 15.0


class KeyFault(Exception):
    """The keys can't be changed, or an engine does not do what its key file says."""


@dataclass(frozen=True)
class Engine:
    """A running engine: its unit, where it listens, whether it takes keys while it serves, and since when it runs."""

    unit: str
    url: str
    reloads: bool
    started: float


def systemctl(*arguments: str) -> str:
    """Return what systemctl printed; a failure raises with what it said."""
    done = subprocess.run(
        ["systemctl", *arguments], capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"}
    )
    if done.returncode:
        raise KeyFault(f"systemctl {' '.join(arguments)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def running(folder: Path) -> list[Engine]:
    """Return the engines of the host that run; one that is stopped reads the file when it starts."""
    found = []
    for path in sorted(folder.glob("*.json")):
        instance = json.loads(path.read_text(encoding="utf-8"))
        unit = f"{path.stem}.service"
        names = "ActiveState,CanReload,ExecMainStartTimestamp"
        shown = dict(
            line.split("=", 1)
            for line in systemctl("show", unit, f"--property={names}", "--timestamp=unix").splitlines()
            if "=" in line
        )
        if shown.get("ActiveState") in ("active", "reloading"):
            started = float(shown.get("ExecMainStartTimestamp", "").lstrip("@") or 0)
            base = url(instance["host"], int(instance["port"]))
            found.append(Engine(unit, base, shown.get("CanReload") == "yes", started))
    return found


def wanted_keys(keys: list[str], step: str, given: str) -> list[str]:
    """Return the keys that are to be valid, the one for clients first."""
    if step == "close":
        return keys[:1]
    if given:
        return [given, *(key for key in keys if key != given)]
    if len(keys) > 1:
        return keys
    letters = string.ascii_letters + string.digits
    return ["".join(secrets.choice(letters) for _position in range(KEY_CHARACTERS)), *keys]


def answer(engine: Engine, key: str) -> int:
    """Return the status that an engine answers a key with, 0 where it does not answer."""
    try:
        return OpenAI(engine.url, key, timeout_seconds=5.0).request("/v1/models").status
    except ApiFault:
        return 0


def prove(engine: Engine, valid: list[str], gone: list[str]) -> None:
    """Wait until an engine lets in each valid key and refuses the others."""
    wanted = [*((key, http.client.OK) for key in valid), *((key, http.client.UNAUTHORIZED) for key in gone)]
    limit = time.monotonic() + PROOF_SECONDS
    while True:
        answers = [answer(engine, key) for key, _status in wanted]
        if answers == [status for _key, status in wanted]:
            return
        if time.monotonic() > limit:
            expected = ", ".join(str(int(status)) for _key, status in wanted)
            said = ", ".join(map(str, answers))
            raise KeyFault(
                f"{engine.unit} at {engine.url} answers its keys, the new one first, with {said}, not {expected}"
            )
        time.sleep(0.2)


def converge(params: dict[str, Any], *, dry: bool) -> dict[str, Any]:
    """Do one step; with ``dry`` only say so."""
    folder = Path(params["config_dir"])
    path = folder / "api-key"
    files = PrivateFiles(dry=dry)
    keys = [line.strip() for line in (files.read(path) or "").splitlines() if line.strip()]
    if not keys:
        raise KeyFault(f"{path} holds no key: run site.yml on this host first")
    wanted = wanted_keys(keys, params["step"], params["key"])
    engines = running(folder)
    files.have(path, "".join(f"{key}\n" for key in wanted))
    # An engine that has run since before the file changed has not read it: this step was cut before.
    written = path.stat().st_mtime
    behind = [engine for engine in engines if files.changed or engine.started < int(written)]
    if not dry:
        gone = [key for key in keys if key not in wanted]
        for engine in behind:
            systemctl("reload" if engine.reloads else "restart", engine.unit)
            prove(engine, wanted, gone)
        kept = [engine.started for engine in behind if engine.reloads]
        if kept:
            # The file is no news for a process that took it by a reload; a restart for its sake would be idle.
            os.utime(path, (min(kept), min(kept)))
    return {
        "changed": bool(files.changed or behind),
        "reloaded": [engine.unit for engine in behind if engine.reloads],
        "restarted": [engine.unit for engine in behind if not engine.reloads],
        "valid": len(wanted),
    }


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "step": {"type": "str", "choices": ["open", "close"], "required": True},
            "key": {"type": "str", "default": "", "no_log": True},
            "config_dir": {"type": "path", "default": "/etc/api-server"},
        },
        supports_check_mode=True,
    )
    try:
        result = converge(module.params, dry=module.check_mode)
    except (KeyFault, OSError, ValueError, KeyError) as fault:
        module.fail_json(
            msg=f"The engines' key is not changed as wanted, and the same step again goes on with it: {fault}"
        )
    module.exit_json(**result)


if __name__ == "__main__":
    main()
