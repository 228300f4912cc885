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
  - What it does lasts until HAProxy is restarted, which begins with every engine in use. A reload keeps it.
options:
  name:
    description: Name of an engine as C(gateway_engines) has it, or of a host, which stands for every C(HOST-PORT).
      Empty for all, which is only for O(state=present).
    type: str
    default: ""
  state:
    description: V(drained) for no new requests, V(ready) for use, V(present) only to tell.
    type: str
    choices: [drained, ready, present]
    default: present
  for_seconds:
    description: For O(state=drained), seconds after which the gateway takes the engine back by itself, whatever becomes
      of the caller. Above 0, such a drain is a loan; one that a person made is left as it is. 0 for no end.
    type: float
    default: 0
  settled_seconds:
    description: For O(for_seconds), end the loan before its time once the engine has gone and come back since it began
      and has been good for so many seconds, without a request; or when it has not gone at all so long after
      O(timeout_seconds). Longer than a caller that lives leaves an engine alone. 0 for never.
    type: float
    default: 0
  only_lent:
    description: For O(state=ready), take back only what was drained with O(for_seconds), not what a person drained.
    type: bool
    default: false
  served:
    description: For O(state=drained), leave in use an engine that is the only one with its model, and refuse to drain
      the last good one of several.
    type: bool
    default: false
  models:
    description: For O(state=present), the model that each port of the host is to serve. Fails when the gateway would
      send it requests for another one.
    type: dict
    default: {}
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

- name: The same for ten minutes, and never without another engine for its clients
  selfhost.lmdeploy.gateway_server:
    name: "{{ inventory_hostname }}"
    state: drained
    for_seconds: 600
    served: true
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
    is_lent:
      description: Whether it is drained for a while, after which the gateway takes it back by itself.
      type: bool
    is_spared:
      description: Whether it stays in use since no other engine has its model.
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

import contextlib
import fcntl
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.gateway import TWIN, slug
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.haproxy import (
    BACKEND,
    SOCKET,
    SocketFault,
    ask,
    servers,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

POLL_SECONDS = 0.1
LOCK = Path("/run/gateway-server.lock")
# What the timers of a loan run, by nothing but the system's Python: they take the engine back, when it has settled or
# at last, and stop. Arguments: socket, backend, engine, seconds to settle, seconds of the drain, when the loan began,
# timers. 0 seconds to settle are for the last one, which does not look.
END = """
import csv, socket, subprocess, sys, time
path, backend, engine, settled, drain, began, *timers = sys.argv[1:]
settled, drain, age = float(settled), float(drain), time.time() - float(began)
def ask(command):
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(10)
        s.connect(path)
        s.sendall(command.encode() + bytes([10]))
        return b"".join(iter(lambda: s.recv(65536), b"")).decode()
if settled:
    rows = csv.DictReader(ask("show stat").removeprefix("# ").splitlines())
    row = next(r for r in rows if (r["pxname"], r["svname"]) == (backend, engine))
    changed = float(row["lastchg"] or 0)
    is_free = row["check_status"] == "L7OK" and int(row["scur"] or 0) == 0 and changed >= settled
    # Whoever drains sees that in the engine's last change, too.
    has_gone = changed < age - 5
    if not is_free or not (has_gone or age >= drain + settled):
        raise SystemExit
ask(f"set server {backend}/{engine} state ready")
subprocess.run(["systemctl", "stop", *timers])
"""
LOOK_SECONDS = 5


@contextlib.contextmanager
def turn(path: Path = LOCK) -> Iterator[None]:
    """Look and drain as one step: two callers could each see the other's engine in use, and drain both."""
    with path.open("a", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


class Loans:
    """Drains that end by themselves: a transient timer of systemd for each. No name of an engine has a colon."""

    def __init__(self, socket: str) -> None:
        """Keep where HAProxy listens."""
        self.socket = socket

    def run(self, *command: str) -> str:
        """Run a command and return what it printed; a failure raises with what it said."""
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            message = f"{command[0]}: {(done.stderr or done.stdout).strip()}"
            raise SocketFault(message)
        return done.stdout

    def timers(self, name: str = "*") -> list[str]:
        """Return the timers of an engine, or of all."""
        listed = self.run("systemctl", "list-units", "--plain", "--no-legend", f"gateway-return-{name}:*.timer")
        return [line.split()[0] for line in listed.splitlines() if line.strip()]

    def lent(self) -> set[str]:
        """Return the engines that come back by themselves."""
        return {timer.removeprefix("gateway-return-").partition(":")[0] for timer in self.timers()}

    def lend(self, server: dict[str, Any], seconds: float, settled_seconds: float, drain_seconds: float) -> None:
        """Have an engine taken back in a while, or as soon as it has settled, in place of what was to be before."""
        name, began = server["name"], time.time()
        before = self.timers(name)
        last = f"gateway-return-{name}:{time.time_ns()}"
        looking = f"{last}-settled"

        def timer(unit: str, settled: float, *when: str) -> None:
            words = (self.socket, server["backend"], name, str(settled), str(drain_seconds), str(began))
            self.run(
                # Else the whole program would be the description, and its lines units in lists.
                *("systemd-run", "--quiet", "--collect", f"--unit={unit}", f"--description=Use {name} again"),
                *(*when, "--timer-property=AccuracySec=1s"),
                *("/usr/bin/python3", "-c", END, *words, f"{last}.timer", f"{looking}.timer"),
            )

        timer(last, 0, f"--on-active={seconds:.0f}s")
        if settled_seconds:
            timer(
                looking, settled_seconds, f"--on-active={settled_seconds:.0f}s", f"--on-unit-inactive={LOOK_SECONDS}s"
            )
        if before:
            self.run("systemctl", "stop", *before)

    def end(self, name: str) -> None:
        """Take that back."""
        timers = self.timers(name)
        if timers:
            self.run("systemctl", "stop", *timers)


def told(found: list[dict[str, Any]]) -> str:
    """Return the engines for people."""
    state = {True: "drained", False: "in use"}
    return "".join(f"{server['name']}: {state[server['is_drained']]}\n" for server in found)


def alone(mine: list[dict[str, Any]], everyone: list[dict[str, Any]]) -> set[str]:
    """Return the engines whose model no other host has; raises for one whose others can't take its requests now."""
    names, found = {server["name"] for server in mine}, set()
    for server in mine:
        others = [
            each
            for each in everyone
            if each["backend"] == server["backend"]
            and each["name"] not in names
            # A twin is another engine only while it serves.
            and (each["is_up"] or f"-{TWIN}-" not in each["name"])
        ]
        serves = server["is_up"] and not server["is_drained"]
        if not others:
            found.add(server["name"])
        elif serves and not any(other["is_up"] and not other["is_drained"] for other in others):
            how = ", ".join(
                f"{other['name']} is {'drained' if other['is_drained'] else 'not good'}" for other in others
            )
            message = (
                f"{server['name']} is the last engine that serves {server['backend'].removeprefix(BACKEND)} ({how}); "
                "without it clients get nothing. Mend or take back another one first, or change fewer hosts at once"
            )
            raise SocketFault(message)
    return found


def disagreements(name: str, found: list[dict[str, Any]], models: dict[str, str]) -> list[str]:
    """Return where the gateway would send a host requests for another model, or none at all."""
    backends = {server["name"]: server["backend"].removeprefix(BACKEND) for server in found}
    wanted = {f"{slug(name)}-{port}": slug(model) for port, model in models.items()}
    faults = []
    for engine in sorted({*backends, *wanted}):
        if engine not in wanted:
            faults.append(f"{engine} is to go, and gets requests for {backends[engine]}")
        elif engine not in backends:
            faults.append(f"{engine} is new")
        # Two models whose names become one have backends that differ in underscores at the end.
        elif backends[engine].rstrip("_") != wanted[engine].rstrip("_"):
            faults.append(f"{engine} is to serve {wanted[engine]}, and gets requests for {backends[engine]}")
    return faults


class Call:
    """One call of the module; ``say`` speaks with HAProxy, ``loans`` with systemd."""

    def __init__(self, params: dict[str, Any], say: Callable[[str], str], loans: Any) -> None:
        """Ask for what is lent, and nothing else yet."""
        self.params, self.say, self.loans = params, say, loans
        self.name, self.state = params["name"], params["state"]
        self.lent: set[str] = loans.lent()

    def look(self, name: str) -> list[dict[str, Any]]:
        """Return the engines of a name and how they stand."""
        found = servers(self.say("show stat"), self.say("show servers state"), name)
        return [{**server, "is_lent": server["is_drained"] and server["name"] in self.lent} for server in found]

    def begin(self, *, dry: bool) -> dict[str, Any]:
        """Bring the engines on their way to the wanted state; return the result so far."""
        before = self.look(self.name)
        if self.name and not before:
            message = f"the gateway has no engine called {self.name}, and none of a host of that name"
            raise SocketFault(f"{message}: run site.yml on it first")
        faults = disagreements(self.name, before, self.params["models"]) if self.params["models"] else []
        if faults:
            raise SocketFault(f"the gateway does not know the engines that are to run: {'; '.join(faults)}")
        spared = alone(before, self.look("")) if self.state == "drained" and self.params["served"] else set()
        # What a person drained is no matter of a loan, neither at its begin nor at its end.
        is_loan = self.params["for_seconds"] > 0 or self.params["only_lent"]
        by_hand = {s["name"] for s in before if is_loan and s["is_drained"] and not s["is_lent"]}
        mine = [server for server in before if server["name"] not in spared | by_hand]
        wanted = {"drained": True, "ready": False}.get(self.state)
        differing = [server for server in mine if wanted is not None and server["is_drained"] != wanted]
        if not dry and self.state == "drained":
            self.drain(mine, differing)
        if not dry and self.state == "ready":
            self.take_back(mine, differing)
        will = {server["name"]: bool(wanted) for server in differing}
        after = [{**server, "is_drained": will.get(server["name"], server["is_drained"])} for server in before]
        found = [{**server, "is_spared": server["name"] in spared} for server in before]
        waits = {server["name"] for server in before} - spared - (by_hand if self.state == "ready" else set())
        diff = {"before": told(before), "after": told(after)}
        return {"changed": bool(differing), "servers": found, "waits": waits, "seconds": 0.0, "diff": diff}

    def drain(self, mine: list[dict[str, Any]], differing: list[dict[str, Any]]) -> None:
        """Send the engines no new request."""
        for server in mine if self.params["for_seconds"] > 0 else ():
            # Before the drain, so that no kill of this process leaves one without an end.
            self.loans.lend(
                server, self.params["for_seconds"], self.params["settled_seconds"], self.params["timeout_seconds"]
            )
            self.lent.add(server["name"])
        for server in differing:
            self.set(server, "state drain")

    def take_back(self, mine: list[dict[str, Any]], differing: list[dict[str, Any]]) -> None:
        """Have the engines in use from the next good check on."""
        for server in differing:
            # What the check found before the engine was changed does not count: it is asked again.
            self.set(server, "health down")
            self.set(server, "state ready")
        for name in self.lent & {server["name"] for server in mine}:
            self.loans.end(name)
            self.lent = self.lent - {name}

    def set(self, server: dict[str, Any], words: str) -> None:
        """Have HAProxy change an engine."""
        refusal = self.say(f"set server {server['backend']}/{server['name']} {words}")
        if refusal:
            message = f"HAProxy refuses to set {server['name']} to {words}: {refusal}"
            raise SocketFault(message)

    def is_settled(self, server: dict[str, Any]) -> bool:
        """Tell whether an engine is where it is to be."""
        if self.state == "drained":
            return bool(server["is_drained"]) and server["requests"] == 0
        return self.state == "present" or (bool(server["is_up"]) and not server["is_drained"])

    def end(self, begun: dict[str, Any]) -> dict[str, Any]:
        """Wait until the engines are there; return the whole result."""
        began, limit, waits = time.monotonic(), self.params["timeout_seconds"], begun.pop("waits")
        while True:
            after = self.look(self.name)
            late = [server for server in after if server["name"] in waits and not self.is_settled(server)]
            if not late:
                break
            if time.monotonic() - began > limit:
                how = ", ".join(
                    f"{server['name']} has {server['requests']} requests, check {'good' if server['is_up'] else 'bad'}"
                    for server in late
                )
                message = f"not {self.state} within {limit:.0f} s (timeout_seconds): {how}"
                raise SocketFault(message)
            time.sleep(POLL_SECONDS)
        spared = {server["name"] for server in begun["servers"] if server["is_spared"]}
        found = [{**server, "is_spared": server["name"] in spared} for server in after]
        diff = {**begun["diff"], "after": told(after)}
        return {**begun, "servers": found, "seconds": time.monotonic() - began, "diff": diff}


def converge(params: dict[str, Any], say: Callable[[str], str], loans: Any, *, dry: bool) -> dict[str, Any]:
    """Bring the engines to the wanted state and wait until they are there."""
    call = Call(params, say, loans)
    if dry or params["state"] != "drained":
        begun = call.begin(dry=dry)
    else:
        with turn(LOCK):
            begun = call.begin(dry=False)
    if dry:
        begun.pop("waits")
        return begun
    return call.end(begun)


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "default": ""},
            "state": {"type": "str", "choices": ["drained", "ready", "present"], "default": "present"},
            "for_seconds": {"type": "float", "default": 0.0},
            "settled_seconds": {"type": "float", "default": 0.0},
            "only_lent": {"type": "bool", "default": False},
            "served": {"type": "bool", "default": False},
            "models": {"type": "dict", "default": {}},
            "timeout_seconds": {"type": "float", "default": 300.0},
            "socket": {"type": "path", "default": SOCKET},
        },
        supports_check_mode=True,
    )
    params = module.params
    if params["state"] != "present" and not params["name"]:
        module.fail_json(msg=f"state is {params['state']}, which needs a name: of an engine, or of a host")
    try:
        result = converge(
            params, lambda command: ask(params["socket"], command), Loans(params["socket"]), dry=module.check_mode
        )
    except SocketFault as fault:
        if module.check_mode and not Path(params["socket"]).exists():
            module.exit_json(changed=False, servers=[], seconds=0.0)
        module.fail_json(msg=f"{params['name'] or 'gateway'}: {fault}")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
