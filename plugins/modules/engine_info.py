#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Tell what a host has for a model engine: GPUs, the built environment, models, units."""

from __future__ import annotations

DOCUMENTATION = r"""
module: engine_info
short_description: Tell what a host has for a model engine
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Finds NVIDIA GPUs, the release that an environment's link points to, where models really lie, and the engine units
    that are installed, all in one call. Changes nothing.
options:
  environment:
    description: Path of the environment's link, for example C(/opt/miniconda3/envs/lmdeploy).
    type: path
    default: ""
  models:
    description: Paths of models, links or not.
    type: list
    elements: path
    default: []
  user:
    description: Name of a system user to look for.
    type: str
    default: ""
attributes:
  check_mode:
    description: It only reads.
    support: full
  diff_mode:
    description: Nothing changes.
    support: none
"""

EXAMPLES = r"""
- name: Learn what the host has
  selfhost.lmdeploy.engine_info:
    environment: /opt/miniconda3/envs/lmdeploy
    models: [/var/lib/models/OpenGVLab--InternVL3-14B-Instruct]
"""

RETURN = r"""
engine:
  description: C(lmdeploy) where there is an NVIDIA GPU, C(llama_cpp) elsewhere.
  returned: always
  type: str
gpus:
  description: How many GPUs nvidia-smi lists.
  returned: always
  type: int
gpu:
  description:
    - The GPUs, how they are joined, on which NUMA node each hangs, and what computes on them; see C(GpuFacts) in
      C(plugins/module_utils/preflight_survey.py).
  returned: always
  type: dict
addresses:
  description: The host's own IPv4 addresses.
  returned: always
  type: list
  elements: str
interfaces:
  description: The network interface of each address.
  returned: always
  type: dict
wsl:
  description: Whether the host is a WSL machine.
  returned: always
  type: bool
release:
  description: Folder of the release that the environment's link points to; empty when there is none.
  returned: always
  type: str
user:
  description: C(home) and C(shell) of the user that was asked for; empty when there is none.
  returned: always
  type: dict
models:
  description: The real path of each given model that is there.
  returned: always
  type: dict
model_facts:
  description: Weights, layers and heads of each given model that is there, as C(ModelFacts) in the same file.
  returned: always
  type: dict
units:
  description: Engine units of the role api_server that are installed, without their suffix.
  returned: always
  type: list
  elements: str
"""

import pwd
import re
import subprocess
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.host_look import survey_gpus, survey_model

UNITS = Path("/etc/systemd/system")
# In the first line of each unit of the role; a unit of the same name by another hand is not ours.
MARK = "selfhost.lmdeploy.api_server"


def is_wsl(release: Path = Path("/proc/sys/kernel/osrelease")) -> bool:
    """Tell whether the kernel is WSL's."""
    return "microsoft" in release.read_text().lower()


def own_units(folder: Path = UNITS) -> list[str]:
    """Return the names of the role's units, without their suffix."""
    found = []
    for path in sorted(folder.glob("api-server*.service")):
        with path.open(encoding="utf-8", errors="replace") as unit:
            if MARK in unit.readline():
                found.append(path.stem)
    return found


def real(path: str) -> str:
    """Return where a path really leads, or nothing when nothing is there."""
    return str(Path(path).resolve()) if path and Path(path).exists() else ""


def account(name: str) -> dict[str, str]:
    """Return home and shell of a system user, or nothing when there is none."""
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        return {}
    return {"home": found.pw_dir, "shell": found.pw_shell}


def interfaces() -> dict[str, str]:
    """Return the IPv4 addresses of the host with their interfaces, loopback left out."""
    found = subprocess.run(["ip", "-4", "-o", "addr"], capture_output=True, text=True, check=False).stdout
    pairs = re.findall(r"^\d+: (\S+) +inet ([0-9.]+)/", found, re.MULTILINE)
    return {address: name for name, address in pairs if not address.startswith("127.")}


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "environment": {"type": "path", "default": ""},
            "models": {"type": "list", "elements": "path", "default": []},
            "user": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    gpu = survey_gpus()
    module.exit_json(
        changed=False,
        engine="lmdeploy" if gpu["cards"] or gpu["pci_devices"] else "llama_cpp",
        gpus=len(gpu["cards"]),
        gpu=gpu,
        addresses=list(interfaces()),
        interfaces=interfaces(),
        wsl=is_wsl(),
        release=real(module.params["environment"]),
        models={path: real(path) for path in module.params["models"] if real(path)},
        model_facts={path: survey_model(path) for path in module.params["models"] if real(path)},
        units=own_units(),
        user=account(module.params["user"]),
    )


if __name__ == "__main__":
    main()
