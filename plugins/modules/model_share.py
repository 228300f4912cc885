#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Give this host's models to other hosts of the fleet while a play runs."""

from __future__ import annotations

DOCUMENTATION = r"""
module: model_share
short_description: Give this host's models to other hosts of the fleet while a play runs
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Runs a small read-only server of the models store as a transient, hardened unit C(model-share.service), for
    M(selfhost.lmdeploy.model_snapshot) on other hosts.
  - Who has not the run's certificate is turned away in TLS's handshake; who is not in O(allowed), by systemd's packet
    filter before that.
  - The unit leaves nothing on disk. It ends when it is stopped, and by itself when nobody took anything for
    O(idle_seconds); it is gone after a restart of the host.
  - Never reports a change, because nothing of it stays.
options:
  state:
    description: Whether the unit runs.
    type: str
    choices: [started, stopped]
    default: started
  path:
    description: Folder of the models.
    type: path
  address:
    description: Address to listen on.
    type: str
  port:
    description: Port to listen on.
    type: int
    default: 8377
  certificate:
    description: Certificate and key of this run, PEM.
    type: str
  allowed:
    description: Addresses, networks or names of the hosts that may connect.
    type: list
    elements: str
    default: []
  program:
    description: The server, Python.
    type: str
  idle_seconds:
    description: Seconds without a request after which the unit ends.
    type: int
    default: 300
attributes:
  check_mode:
    description: Does nothing.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Give what this host has
  selfhost.lmdeploy.model_share:
    path: /var/lib/models
    address: 10.0.0.5
    allowed: [10.0.0.6, 10.0.0.7]
    certificate: "{{ certificate }}"
    program: "{{ lookup('ansible.builtin.file', 'model_share_server.py') }}"

- name: Give nothing any more
  selfhost.lmdeploy.model_share:
    state: stopped
"""

RETURN = r"""
unit:
  description: Name of the unit.
  returned: success
  type: str
  sample: model-share.service
runs:
  description: Whether it runs now. A host that can't give is no fault of the run, which takes from others; a warning
    says why.
  returned: success
  type: bool
"""

import shutil
import socket
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.model_store import STORE

UNIT = "model-share.service"
# Root's own, in memory, and only until systemd has read it.
HANDOVER = Path("/run/model-share")


def addresses(names: list[str]) -> list[str]:
    """Return networks as they are, and the addresses of names."""
    found = []
    for name in names:
        if "/" in name:
            found.append(name)
            continue
        found += sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
    return found


def properties(params: dict[str, Any], allowed: list[str]) -> list[str]:
    """Return the properties of the unit: it reads the store, talks to the fleet, and can do nothing else."""
    store = f"{params['path']}/{STORE}"
    return [
        "Type=notify",
        "DynamicUser=yes",
        f"LoadCredential=run.pem:{HANDOVER}/run.pem",
        f"LoadCredential=server.py:{HANDOVER}/server.py",
        f"BindReadOnlyPaths={store}",
        "TimeoutStartSec=30",
        # It has no open work: whoever takes a piece asks another host, or again.
        "TimeoutStopSec=2",
        "IPAddressDeny=any",
        f"IPAddressAllow={' '.join(allowed)}",
        "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX",
        "SocketBindDeny=any",
        f"SocketBindAllow=tcp:{params['port']}",
        "CapabilityBoundingSet=",
        "NoNewPrivileges=yes",
        "PrivateUsers=yes",
        "PrivateDevices=yes",
        "PrivateTmp=yes",
        "ProtectSystem=strict",
        "ProtectHome=tmpfs",
        "ProtectProc=invisible",
        "ProcSubset=pid",
        "ProtectClock=yes",
        "ProtectHostname=yes",
        "ProtectControlGroups=yes",
        "ProtectKernelLogs=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelTunables=yes",
        "RestrictNamespaces=yes",
        "RestrictRealtime=yes",
        "RestrictSUIDSGID=yes",
        "LockPersonality=yes",
        "MemoryDenyWriteExecute=yes",
        "SystemCallArchitectures=native",
        "SystemCallFilter=@system-service",
        "SystemCallFilter=~@privileged @resources",
        "SystemCallErrorNumber=EPERM",
        "UMask=0077",
        "TasksMax=256",
        "Nice=5",
        "Environment=PYTHONDONTWRITEBYTECODE=1",
    ]


def start(module: AnsibleModule) -> bool:
    """Start the unit and tell whether it runs; what it needs is handed over by root-only files that go at once."""
    params = module.params
    allowed = addresses(params["allowed"])
    command = ["systemd-run", f"--unit={UNIT}", "--collect", "--quiet"]
    command += ["--description=Models for other hosts of the fleet, while they are taken"]
    command += [f"--property={line}" for line in properties(params, allowed)]
    command += ["/usr/bin/python3", "-I", "${CREDENTIALS_DIRECTORY}/server.py", f"{params['path']}/{STORE}"]
    command += [params["address"], str(params["port"]), "${CREDENTIALS_DIRECTORY}/run.pem", str(params["idle_seconds"])]
    Path(params["path"], STORE).mkdir(mode=0o755, parents=True, exist_ok=True)
    HANDOVER.mkdir(mode=0o700, exist_ok=True)
    try:
        for name, content in {"run.pem": params["certificate"], "server.py": params["program"]}.items():
            (HANDOVER / name).touch(mode=0o600)
            (HANDOVER / name).write_text(content, encoding="utf-8")
        code, out, err = module.run_command(command, use_unsafe_shell=False, expand_user_and_vars=False)
    finally:
        shutil.rmtree(HANDOVER)
    if code != 0:
        _code, journal, _err = module.run_command(["journalctl", "--no-pager", "-n", "8", "-o", "cat", "-u", UNIT])
        module.warn(
            f"This host gives no models: {UNIT} did not start on {params['address']}:{params['port']} "
            f"(model_weights_shared_address, model_weights_shared_port). {(err or out).strip()} {journal.strip()}"
        )
    return bool(code == 0)


def stop(module: AnsibleModule) -> None:
    """Stop the unit where it runs."""
    code, out, err = module.run_command(["systemctl", "stop", UNIT])
    if code not in (0, 5):
        # 5: there is no such unit (any more).
        module.fail_json(msg=f"{UNIT} does not stop: {(err or out).strip()}")
    module.run_command(["systemctl", "reset-failed", UNIT])


def main() -> None:
    """Run as a module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["started", "stopped"], "default": "started"},
            "path": {"type": "path"},
            "address": {"type": "str"},
            "port": {"type": "int", "default": 8377},
            "certificate": {"type": "str", "no_log": True},
            "allowed": {"type": "list", "elements": "str", "default": []},
            "program": {"type": "str"},
            "idle_seconds": {"type": "int", "default": 300},
        },
        required_if=[("state", "started", ("path", "address", "certificate", "program"))],
        supports_check_mode=True,
    )
    runs = False
    if not module.check_mode:
        try:
            stop(module)
            runs = module.params["state"] == "started" and start(module)
        except OSError as error:
            module.fail_json(msg=f"{UNIT}: {error}")
    module.exit_json(changed=False, unit=UNIT, runs=runs)


if __name__ == "__main__":
    main()
