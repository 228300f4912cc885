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
wsl:
  description: Whether the host is a WSL machine.
  returned: always
  type: bool
release:
  description: Folder of the release that the environment's link points to; empty when there is none.
  returned: always
  type: str
models:
  description: The real path of each given model that is there.
  returned: always
  type: dict
units:
  description: Engine units of the role api_server that are installed, without their suffix.
  returned: always
  type: list
  elements: str
"""

import shutil
import subprocess
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

# WSL puts the driver's programs there, outside of a service's PATH.
WSL_PROGRAMS = "/usr/lib/wsl/lib"
NVIDIA_VENDOR = "0x10de"
DISPLAY_CLASS = "0x03"
UNITS = Path("/etc/systemd/system")
# In the first line of each unit of the role; a unit of the same name by another hand is not ours.
MARK = "selfhost.lmdeploy.api_server"


def count_gpus(listing: str) -> int:
    """Return the number of GPUs in the output of `nvidia-smi -L`; the lines of MIG slices are not GPUs."""
    return sum(line.startswith("GPU ") for line in listing.splitlines())


def listed_gpus() -> int:
    """Return how many GPUs the driver lists, 0 where there is no driver."""
    program = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=WSL_PROGRAMS)
    if program is None:
        return 0
    try:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return count_gpus(done.stdout)


def has_nvidia_hardware(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Tell whether an NVIDIA display device is on the bus, with a working driver or not."""
    for device in devices.glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            continue
        if vendor == NVIDIA_VENDOR and kind.startswith(DISPLAY_CLASS):
            return True
    return False


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


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "environment": {"type": "path", "default": ""},
            "models": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    gpus = listed_gpus()
    module.exit_json(
        changed=False,
        engine="lmdeploy" if gpus or has_nvidia_hardware() else "llama_cpp",
        gpus=gpus,
        wsl=is_wsl(),
        release=real(module.params["environment"]),
        models={path: real(path) for path in module.params["models"] if real(path)},
        units=own_units(),
    )


if __name__ == "__main__":
    main()
