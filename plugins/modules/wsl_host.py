#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Tell whether the host is Linux on Windows, and have settings in its wsl.conf."""

from __future__ import annotations

DOCUMENTATION = r"""
module: wsl_host
short_description: Look at a host of the Windows Subsystem for Linux, and change its wsl.conf
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Tells whether the host runs on WSL and whether systemd is process 1. On any other host nothing else happens.
  - Changes single keys of C(/etc/wsl.conf); other keys, sections and comments stay.
options:
  conf:
    description: Wanted values by section and key.
    type: dict
    default: {}
  folder:
    description: A folder of the host, to learn how Windows names it.
    type: path
    default: /
attributes:
  check_mode:
    description: Says what would change, and changes nothing.
    support: full
  diff_mode:
    description: Shows wsl.conf before and after.
    support: full
"""

EXAMPLES = r"""
- name: Have systemd on WSL
  selfhost.lmdeploy.wsl_host:
    conf:
      boot: {systemd: "true"}
"""

RETURN = r"""
wsl:
  description: Whether the host runs on WSL.
  type: bool
  returned: success
systemd:
  description: Whether process 1 is systemd.
  type: bool
  returned: success
windows_folder:
  description: O(folder) as Windows names it. Where WSL doesn't tell, the word DISTRIBUTION stands for its name.
  type: str
  returned: on WSL
  sample: \\wsl.localhost\Ubuntu\srv
"""

import os
import subprocess
import tempfile
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.wsl import is_wsl, with_settings

CONF = Path("/etc/wsl.conf")
VERSION = Path("/proc/version")
INIT = Path("/proc/1/comm")


def read(path: Path) -> str:
    """Return a file's text, empty where there is none."""
    return path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else ""


def windows_folder(folder: str) -> str:
    """Return Windows' name of a folder; a shell that came by SSH may not be told the distribution's name."""
    root = "\\\\wsl.localhost\\DISTRIBUTION"
    try:
        done = subprocess.run(["wslpath", "-w", "/"], capture_output=True, text=True, timeout=10, check=False)
        said = done.stdout.strip()
        root = said.rstrip("\\") if done.returncode == 0 and said.startswith("\\\\wsl") else root
    except (OSError, subprocess.TimeoutExpired):
        pass
    return root + folder.replace("/", "\\")


def write(text: str) -> None:
    """Replace wsl.conf in one step."""
    handle, name = tempfile.mkstemp(dir=CONF.parent, prefix=f".{CONF.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(CONF)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={"conf": {"type": "dict", "default": {}}, "folder": {"type": "path", "default": "/"}},
        supports_check_mode=True,
    )
    if not is_wsl(read(VERSION)):
        module.exit_json(changed=False, wsl=False, systemd=read(INIT).strip() == "systemd")
    before = read(CONF)
    after = with_settings(before, module.params["conf"])
    if before != after and not module.check_mode:
        write(after)
    module.exit_json(
        changed=before != after,
        wsl=True,
        systemd=read(INIT).strip() == "systemd",
        windows_folder=windows_folder(module.params["folder"]),
        diff={"before_header": str(CONF), "after_header": str(CONF), "before": before, "after": after},
    )


if __name__ == "__main__":
    main()
