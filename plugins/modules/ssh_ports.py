#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Find the ports that SSH comes in by."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ssh_ports
short_description: Find the ports that SSH comes in by
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Returns the port of the connection that the module itself was started through, and the ports that sshd listens on,
    also where systemd listens for it. So whoever closes ports knows which must stay open.
  - Fails where there is none, rather than have the host closed to everybody. Changes nothing.
options:
  ports:
    description: Ports that are returned in any case.
    type: list
    elements: int
    default: []
attributes:
  check_mode:
    description: Only looks.
    support: full
  diff_mode:
    description: Changes nothing.
    support: none
"""

EXAMPLES = r"""
- name: Find the ports of SSH
  selfhost.lmdeploy.ssh_ports:
  register: ssh
"""

RETURN = r"""
ports:
  description: The ports, in order.
  returned: success
  type: list
  elements: int
  sample: [22]
"""

import os
import re
import subprocess
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

SOCKET_UNITS = ("ssh.socket", "sshd.socket")


def connection_port(proc: Path, pid: int) -> int | None:
    """Return the port that an SSH connection came in by; become has removed it from our own environment."""
    while pid > 1:
        try:
            environ = (proc / str(pid) / "environ").read_bytes()
            parent = int(
                (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]
            )
        except (OSError, ValueError, IndexError):
            return None
        found = re.search(rb"(?:^|\0)SSH_CONNECTION=\S+ \d+ \S+ (\d+)", environ)
        if found:
            return int(found[1])
        pid = parent
    return None


def listening_ports(sockets: str, units: str) -> set[int]:
    """Return the ports of sshd from what `ss` shows, and those of its socket units from what systemctl shows."""
    found = {
        int(match[1]) for match in re.finditer(r'^LISTEN\s+\d+\s+\d+\s+\S+:(\d+)\s.*\("sshd"', sockets, re.MULTILINE)
    }
    return found | {int(match[1]) for match in re.finditer(r"(?:^|:)(\d+) \(Stream\)", units, re.MULTILINE)}


def printed(*command: str) -> str:
    """Return what a command prints; nothing where it is missing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={"ports": {"type": "list", "elements": "int", "default": []}}, supports_check_mode=True
    )
    active = [unit for unit in SOCKET_UNITS if printed("systemctl", "is-active", unit).strip() == "active"]
    listens = "".join(printed("systemctl", "show", "--property=Listen", "--value", unit) for unit in active)
    ports = set(module.params["ports"]) | listening_ports(printed("ss", "-Hltnp"), listens)
    port = connection_port(Path("/proc"), os.getpid())
    if port is not None:
        ports.add(port)
    if not ports:
        module.fail_json(msg="No port of SSH was found on this host: name it in firewall_ssh_ports.")
    module.exit_json(changed=False, ports=sorted(ports))


if __name__ == "__main__":
    main()
