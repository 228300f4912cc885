#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Tell everything about a host that helps to find a fault, and no secret."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_report
short_description: Tell what helps to find a fault on a host, without secrets
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - System, GPUs, disks, memory, services with versions and releases, what listens, units that failed, and the last
    lines of the journals, as Markdown for an issue. Changes nothing, and goes on where something can't be read.
  - Every key, password and token that the roles of this collection keep on the host is taken out of the text, wherever
    it stands, and so is what looks like one.
options:
  services:
    description: What M(selfhost.lmdeploy.host_status) returned on this host.
    type: list
    elements: dict
    default: []
  journal_lines:
    description: Last lines of each unit's journal.
    type: int
    default: 25
attributes:
  check_mode:
    description: It only reads.
    support: full
"""

EXAMPLES = r"""
- name: Learn what is wrong
  selfhost.lmdeploy.host_report:
    services: "{{ status.services }}"
  register: report
"""

RETURN = r"""
report:
  description: The report.
  returned: always
  type: str
"""

import functools
import os
import platform
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import host_look, host_report

SECONDS = 10.0
# Everything here is a secret, or has secrets among its words.
SECRET_FILES = (
    "etc/api-server/api-key*",
    "etc/open-webui/*-password",
    "etc/open-webui/*-key",
    "etc/open-webui/*.env",
    "etc/gateway/private/*",
    "etc/gateway/keys.map",
    "etc/monitoring/keys/*",
)
UNITS = (
    "api-server*.service",
    "open-webui*.service",
    "haproxy.service",
    "keepalived.service",
    "prometheus*.service",
    "monitoring-collector.service",
)
SECTIONS = {
    "GPUs": ["nvidia-smi"],
    "Disks": ["df", "-hT", "-x", "tmpfs", "-x", "devtmpfs", "-x", "overlay", "-x", "squashfs"],
    "Memory": ["free", "-h"],
    "Listening": ["ss", "--listening", "--tcp", "--numeric", "--no-header"],
    "Failed units": ["systemctl", "--failed", "--plain", "--no-legend", "--no-pager"],
    "Kernel about GPUs and memory": [
        "journalctl", "--dmesg", "--grep=NVRM|Xid|Out of memory|oom-kill", "--lines=20", "--no-pager",
        "--output=short-iso",
    ],
}  # fmt: skip


def said(command: list[str]) -> str:
    """Return what a program said; nothing where it isn't there or found nothing."""
    status, text = host_look.run(command, SECONDS)
    return text if status == 0 else ""


def about() -> dict[str, str]:
    """Return the host's system in a few words."""
    release = dict(line.split("=", 1) for line in host_look.read("/etc/os-release").splitlines() if "=" in line)
    return {
        "system": release.get("PRETTY_NAME", "").strip('"'),
        "kernel": f"{platform.release()} {platform.machine()}",
        "runs in": said(["systemd-detect-virt"]),
        "cores": str(os.cpu_count()),
        "load": host_look.read("/proc/loadavg").strip(),
        "up since": said(["uptime", "--since"]),
        "clock": said(["date", "--iso-8601=seconds"]),
        "systemd": said(["systemctl", "--version"]).partition("\n")[0],
        "systemd says": host_look.run(["systemctl", "is-system-running"], SECONDS)[1],
        "Python": platform.python_version(),
    }


def journals(lines: int) -> dict[str, str]:
    """Return the end of the journal of each unit of the collection that is there."""
    listed = said(["systemctl", "list-units", "--all", "--plain", "--no-legend", "--no-pager", *UNITS])
    units = [line.split()[0] for line in listed.splitlines() if line.strip() and " not-found " not in line]
    shape = ["--lines", str(lines), "--no-pager", "--output", "short-iso"]
    return {unit: said(["journalctl", "--unit", unit, *shape]) for unit in units}


def secrets(root: Path = Path("/")) -> list[str]:
    """Return every secret that the roles keep on this host."""
    paths = [path for pattern in SECRET_FILES for path in root.glob(pattern) if path.is_file()]
    return host_report.secrets_of({str(path): host_look.read(path) for path in paths})


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "services": {"type": "list", "elements": "dict", "default": []},
            "journal_lines": {"type": "int", "default": 25},
        },
        supports_check_mode=True,
    )
    jobs: dict[str, Callable[[], str]] = {
        title: functools.partial(said, command) for title, command in SECTIONS.items()
    }
    sections = host_look.in_parallel(jobs, SECONDS)
    found: dict[str, Any] = {
        "about": about(),
        "services": module.params["services"],
        "sections": {title: sections.get(title, "") for title in SECTIONS},
        "journals": journals(module.params["journal_lines"]),
    }
    module.exit_json(changed=False, report=host_report.render(socket.gethostname(), found, secrets()))


if __name__ == "__main__":
    main()
