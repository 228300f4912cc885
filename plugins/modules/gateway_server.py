#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Take an engine out of a gateway's balancing, or back into it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gateway_server
short_description: Take an engine out of a gateway's balancing, or back into it
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Speaks with the runtime socket of HAProxy on the gateway. A drained engine gets no new request; those that it has go
    on.
  - A drain waits until the last one has ended. A return waits until the gateway's own check has found the engine good.
  - What it does lasts until HAProxy is restarted or reloaded, which both begin with every engine in use.
options:
  name:
    description: Name of an engine as C(gateway_engines) has it, or of a host, which stands for every C(HOST-PORT).
    type: str
    required: true
  state:
    description: V(drained) for no new requests, V(ready) for use, V(present) only to tell.
    type: str
    choices: [drained, ready, present]
    default: present
  timeout_seconds:
    description: Seconds to wait for the end of the last request, or for the gateway to find the engine good.
    type: float
    default: 300
  socket:
    description: Runtime socket of HAProxy.
    type: path
    default: /run/gateway/admin.sock
attributes:
  check_mode:
    description: Tells what would change, and waits for nothing. A gateway that does not run has nothing to drain then.
    support: full
  diff_mode:
    description: Shows the states before and after.
    support: full
"""

EXAMPLES = r"""
- name: Send no new request to this host
  selfhost.lmdeploy.gateway_server:
    name: "{{ inventory_hostname }}"
    state: drained
  delegate_to: gateway
"""

RETURN = r"""
servers:
  description: The engines and how they stand.
  returned: success
  type: list
  elements: dict
  contains:
    backend:
      description: Name of the model's backend.
      type: str
    name:
      description: Name of the engine.
      type: str
    is_drained:
      description: Whether it gets no new requests.
      type: bool
    is_up:
      description: Whether the gateway's check finds it good.
      type: bool
    requests:
      description: Requests that it works on now.
      type: int
seconds:
  description: How long it waited.
  returned: success
  type: float
"""

import csv
import re
import socket
import time
from io import StringIO
from typing import TYPE_CHECKING, Any

from ansible.module_utils.basic import AnsibleModule

if TYPE_CHECKING:
    from collections.abc import Callable

POLL_SECONDS = 0.1
REPLY_SECONDS = 10.0
# The backends of models; those of the interface are no engines.
BACKEND = "model_"
# Bits and values of `show servers state` (HAProxy's management guide).
FORCED_MAINTENANCE = 0x01
FORCED_DRAIN = 0x08
STOPPED = "0"


class SocketFault(Exception):
    """HAProxy does not answer, or refuses."""


def ask(path: str, command: str) -> str:
    """Return what HAProxy answers to a command."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(REPLY_SECONDS)
            connection.connect(path)
            connection.sendall(f"{command}\n".encode())
            pieces = []
            while piece := connection.recv(65536):
                pieces.append(piece)
    except OSError as error:
        message = f"HAProxy does not answer at {path}: {error}"
        raise SocketFault(message) from error
    return b"".join(pieces).decode(errors="replace").strip()


def servers(stat: str, state: str, name: str) -> list[dict[str, Any]]:
    """Return the engines of a name, or of a host's name, from HAProxy's tables of figures and of states."""
    pattern = re.compile(rf"{re.escape(name)}(-\d+)?")
    figures = {(row["pxname"], row["svname"]): row for row in csv.DictReader(StringIO(stat.removeprefix("# ")))}
    header, *lines = [line for line in state.splitlines() if " " in line]
    columns = header.removeprefix("# ").split()
    found = []
    for line in lines:
        row = dict(zip(columns, line.split(), strict=False))
        figure = figures.get((row["be_name"], row["srv_name"]))
        if figure is None or not row["be_name"].startswith(BACKEND) or not pattern.fullmatch(row["srv_name"]):
            continue
        found.append(
            {
                "backend": row["be_name"],
                "name": row["srv_name"],
                "is_drained": bool(int(row["srv_admin_state"]) & (FORCED_MAINTENANCE | FORCED_DRAIN)),
                "is_up": row["srv_op_state"] != STOPPED,
                "requests": int(figure["scur"] or 0) + int(figure["qcur"] or 0),
            }
        )
    return found


def is_settled(server: dict[str, Any], state: str) -> bool:
    """Tell whether an engine is where it is to be."""
    if state == "drained":
        return bool(server["is_drained"]) and server["requests"] == 0
    return state == "present" or (bool(server["is_up"]) and not server["is_drained"])


def told(found: list[dict[str, Any]]) -> str:
    """Return the engines for people."""
    state = {True: "drained", False: "in use"}
    return "".join(f"{server['name']}: {state[server['is_drained']]}\n" for server in found)


def converge(params: dict[str, Any], say: Callable[[str], str], *, dry: bool) -> dict[str, Any]:
    """Bring the engines to the wanted state and wait until they are there; ``say`` speaks with HAProxy."""
    name, state = params["name"], params["state"]

    def look() -> list[dict[str, Any]]:
        return servers(say("show stat"), say("show servers state"), name)

    before = look()
    if not before:
        message = f"the gateway has no engine called {name}, and none of a host of that name: run site.yml on it first"
        raise SocketFault(message)
    wanted = {"drained": True, "ready": False}.get(state)
    differing = [] if wanted is None else [server for server in before if server["is_drained"] != wanted]
    if dry:
        after = [{**server, "is_drained": server["is_drained"] if wanted is None else wanted} for server in before]
        diff = {"before": told(before), "after": told(after)}
        return {"changed": bool(differing), "servers": before, "seconds": 0.0, "diff": diff}
    for server in differing:
        word = "drain" if wanted else "ready"
        refusal = say(f"set server {server['backend']}/{server['name']} state {word}")
        if refusal:
            message = f"HAProxy refuses to set {server['name']} to {word}: {refusal}"
            raise SocketFault(message)
    began = time.monotonic()
    after = look()
    while not all(is_settled(server, state) for server in after):
        if time.monotonic() - began > params["timeout_seconds"]:
            late = ", ".join(
                f"{server['name']} has {server['requests']} requests, check {'good' if server['is_up'] else 'bad'}"
                for server in after
                if not is_settled(server, state)
            )
            message = f"not {state} within {params['timeout_seconds']:.0f} s (timeout_seconds): {late}"
            raise SocketFault(message)
        time.sleep(POLL_SECONDS)
        after = look()
    diff = {"before": told(before), "after": told(after)}
    return {"changed": bool(differing), "servers": after, "seconds": time.monotonic() - began, "diff": diff}


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["drained", "ready", "present"], "default": "present"},
            "timeout_seconds": {"type": "float", "default": 300.0},
            "socket": {"type": "path", "default": "/run/gateway/admin.sock"},
        },
        supports_check_mode=True,
    )
    try:
        result = converge(module.params, lambda command: ask(module.params["socket"], command), dry=module.check_mode)
    except SocketFault as fault:
        if module.check_mode:
            module.exit_json(changed=False, servers=[], seconds=0.0)
        module.fail_json(msg=f"{module.params['name']}: {fault}")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
