#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Have packages of the distribution, also after an installation that was cut off."""

from __future__ import annotations

DOCUMENTATION = r"""
module: system_packages
short_description: Have packages of the distribution, also after an installation that was cut off
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - A host that has the packages is recognised by one call of C(dpkg-query); nothing needs python3-apt, so check mode is
    true on a bare host too.
  - A package counts as there when it is unpacked and configured. What a power cut or a kill left between the two is
    finished first, which C(apt-get) alone refuses to do.
  - Waits while another program, unattended upgrades for example, holds the locks of apt or dpkg.
options:
  names:
    description: Names of the packages.
    type: list
    elements: str
    required: true
  state:
    description: Whether the packages are there, or removed.
    type: str
    choices: [present, absent]
    default: present
  started:
    description:
      - Whether services of the packages may start while they are installed, as the distribution has it.
      - When false nothing starts or restarts by itself, and whoever calls starts what is configured. Other
        installations on the host go on as ever, also when this one is killed.
    type: bool
    default: true
  purged:
    description:
      - Whether O(state=absent) takes the packages' configuration, and the data that they call their own, with them.
      - When false those stay, as C(apt-get remove) leaves them.
    type: bool
    default: true
  lists_seconds:
    description: Package lists older than this are read anew before something is installed.
    type: int
    default: 86400
  timeout_seconds:
    description: How long the whole may take, waiting for locks included.
    type: int
    default: 900
attributes:
  check_mode:
    description: Says what would be installed or removed.
    support: full
  diff_mode:
    description: Shows the packages that change.
    support: full
"""

EXAMPLES = r"""
- name: Have HAProxy
  selfhost.lmdeploy.system_packages:
    names: [haproxy]

- name: Have Prometheus, and start it later
  selfhost.lmdeploy.system_packages:
    names: [prometheus]
    started: false
"""

RETURN = r"""
packages:
  description: What was installed, finished or removed.
  returned: success
  type: list
  elements: str
  sample: [haproxy]
repaired:
  description: Whether an installation that was cut off before was finished.
  returned: success
  type: bool
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.progress import apt_text, told
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.settled import parse_states, states_command

LISTS = Path("/var/lib/apt/lists")
STAMPS = (LISTS, Path("/var/lib/apt/periodic/update-success-stamp"))
# dpkg's journal: whoever finds entries here is to run `dpkg --configure -a` before anything else.
UPDATES = Path("/var/lib/dpkg/updates")
# What dpkg's scripts ask before they start a service. Ours knows its own installation by a word in the environment, so
# one that a kill leaves behind stops nobody else; the administrator's own is kept beside it and asked as before.
POLICY = Path("/usr/sbin/policy-rc.d")
KEPT_POLICY = POLICY.with_name("policy-rc.d.before-selfhost")
QUIET = "SELFHOST_STARTS_NOTHING"
POLICY_TEXT = f"""#!/bin/sh
# Written by selfhost.lmdeploy.system_packages for the time of an installation; see policy-rc.d(8).
[ -z "${QUIET}" ] || exit 101
[ ! -x {KEPT_POLICY} ] || exec {KEPT_POLICY} "$@"
exit 0
"""
ENVIRONMENT = {"DEBIAN_FRONTEND": "noninteractive", "DEBIAN_PRIORITY": "critical", "LC_ALL": "C"}
LOCKED = (
    "Could not get lock",
    "Unable to lock",
    "Unable to acquire",
    "is another process using it",
    "locked by another",
)
# The lists no longer say what the mirror has.
OUTDATED = (
    "Unable to locate package",
    "has no installation candidate",
    "Unable to fetch some archives",
    "404  Not Found",
)
SHOWN_LINES = 12
WAIT_SECONDS = 2.0


class PackageError(Exception):
    """The packages can't be had; the text says why and what to do."""


@dataclass(frozen=True)
class Said:
    """How a program ended."""

    code: int
    text: str


Runner = Callable[[list[str]], Said]


# What the program that runs now has said so far.
HEARD: list[str] = []


def run(command: list[str]) -> Said:
    """Run a program to its end."""
    HEARD.clear()
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **ENVIRONMENT},
    ) as process:
        for line in process.stdout or ():
            HEARD.append(line)
    return Said(process.returncode, "".join(HEARD))


def quiet(command: list[str]) -> Said:
    """Run a program whose packages start nothing."""
    return run(["env", f"{QUIET}=1", *command])


def is_ours(policy: Path) -> bool:
    """Tell whether a policy is what this module wrote."""
    return policy.is_file() and policy.read_text(encoding="utf-8", errors="replace") == POLICY_TEXT


def end_policy() -> None:
    """Have the administrator's policy, or none, in place again."""
    if is_ours(POLICY) and KEPT_POLICY.exists():
        KEPT_POLICY.replace(POLICY)
    elif is_ours(POLICY):
        POLICY.unlink()


@contextlib.contextmanager
def policy() -> Iterator[None]:
    """Have a policy under which services start unless `quiet` runs the installation."""
    end_policy()
    new = POLICY.with_name(f".{POLICY.name}.new")
    new.write_text(POLICY_TEXT, encoding="utf-8")
    new.chmod(0o755)
    if POLICY.exists():
        # Both names for a moment, so that a kill leaves one of the two in place.
        KEPT_POLICY.unlink(missing_ok=True)
        KEPT_POLICY.hardlink_to(POLICY)
    new.replace(POLICY)
    try:
        yield
    finally:
        end_policy()


def last_lines(text: str) -> str:
    """Return the end of an output, without empty lines."""
    return "\n".join([line for line in text.splitlines() if line.strip()][-SHOWN_LINES:])


class Packages:
    """Packages of one host. ``call`` starts programs, ``clock`` and ``sleep`` tell and pass the time."""

    def __init__(
        self,
        timeout_seconds: int,
        call: Runner = run,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Nothing is looked at yet."""
        self.call, self.clock, self.sleep = call, clock, sleep
        self.deadline = clock() + timeout_seconds
        self.timeout_seconds = timeout_seconds

    def states(self, names: list[str]) -> dict[str, str]:
        """Return dpkg's word for each package: `installed`, `unpacked`, `half-configured` and so on."""
        return parse_states(names, self.call(states_command(names)).text)

    def patiently(self, command: list[str]) -> Said:
        """Run a program again while somebody else holds the locks."""
        while True:
            said = self.call(command)
            if said.code == 0 or not any(word in said.text for word in LOCKED):
                return said
            if self.clock() > self.deadline:
                raise PackageError(
                    f"Another program has held the locks of apt for {self.timeout_seconds} s: wait until it is done "
                    f"(`fuser -v /var/lib/dpkg/lock-frontend` names it), then run again.\n{last_lines(said.text)}"
                )
            self.sleep(WAIT_SECONDS)

    def apt(self, *words: str) -> Said:
        """Run apt-get without questions; configuration files that were changed stay."""
        options = ["-o", "Acquire::Retries=3", "-o", "DPkg::Lock::Timeout=60"]
        options += ["-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold"]
        return self.patiently(["apt-get", "--quiet", "--yes", *options, *words])

    def was_cut(self) -> bool:
        """Tell whether an installation on this host was cut off."""
        entries = UPDATES.iterdir() if UPDATES.is_dir() else iter(())
        return any(entry.name.isdigit() for entry in entries) or bool(self.call(["dpkg", "--audit"]).text.strip())

    def repair(self) -> None:
        """Finish what was cut off. What this can't mend the installation after it names."""
        self.patiently(["dpkg", "--force-confdef", "--force-confold", "--configure", "-a"])
        self.apt("--fix-broken", "install")

    def install(self, names: list[str], lists_seconds: int) -> None:
        """Install packages, with lists that are new enough."""
        words = ["--no-install-recommends", "install", *names]
        update = Said(0, "")
        is_updated = lists_age() > lists_seconds
        if is_updated:
            update = self.apt("update")
        said = self.apt(*words)
        if said.code != 0 and not is_updated and any(word in said.text for word in OUTDATED):
            update = self.apt("update")
            said = self.apt(*words)
        if said.code != 0:
            advice = "see that this host reaches the mirrors in /etc/apt and has room on its disk, then run again"
            parts = [f"apt-get can't install {', '.join(names)}: {advice}. It said:", last_lines(said.text)]
            if update.code != 0 or "Failed to fetch" in update.text:
                parts += ["Before that its lists could not be read:", last_lines(update.text)]
            raise PackageError("\n".join(parts))


def lists_age() -> float:
    """Return how old the package lists are, in seconds; without any they are infinitely old."""
    times = [path.stat().st_mtime for path in STAMPS if path.exists()]
    if not times or not any(LISTS.glob("*Packages*")):
        return float("inf")
    return time.time() - max(times)


def change(params: dict[str, Any], packages: Packages, due: list[str]) -> bool:
    """Install or remove packages; return whether an installation that was cut off was finished first."""
    repaired = packages.was_cut()
    if repaired:
        packages.repair()
    if params["state"] == "present":
        packages.install(due, params["lists_seconds"])
        return repaired
    said = packages.apt("purge" if params["purged"] else "remove", *due)
    if said.code != 0:
        raise PackageError(f"apt-get can't remove {', '.join(due)}:\n{last_lines(said.text)}")
    return repaired


def converge(params: dict[str, Any], packages: Packages, *, dry: bool) -> dict[str, Any]:
    """Have or remove the packages; with ``dry`` only say so."""
    names = list(dict.fromkeys(params["names"]))
    before = packages.states(names) if names else {}
    if params["state"] == "present":
        good: tuple[str, ...] = ("installed",)
    else:
        good = ("not-installed",) if params["purged"] else ("not-installed", "config-files")
    due = [name for name in names if before[name] not in good]
    # An earlier installation that was killed at its end.
    repaired = not params["started"] and is_ours(POLICY)
    if repaired and not dry:
        end_policy()
    if due and not dry:
        quietly = contextlib.nullcontext() if params["started"] else policy()
        with quietly, told("system_packages", lambda: apt_text([*HEARD])):
            repaired = change(params, packages, due) or repaired
        left = {name: state for name, state in packages.states(due).items() if state not in good}
        if left:
            shown = ", ".join(f"{name} is {state}" for name, state in left.items())
            raise PackageError(f"apt-get ended well, but {shown}: `dpkg --audit` says more.")
    after = {name: good[-1] if name in due else state for name, state in before.items()}
    lines = ["".join(f"{name}: {state}\n" for name, state in told.items()) for told in (before, after)]
    return {
        "changed": bool(due) or repaired,
        "packages": due,
        "repaired": repaired,
        "diff": {"before": lines[0], "after": lines[1]},
    }


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "names": {"type": "list", "elements": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "started": {"type": "bool", "default": True},
            "purged": {"type": "bool", "default": True},
            "lists_seconds": {"type": "int", "default": 86400},
            "timeout_seconds": {"type": "int", "default": 900},
        },
        supports_check_mode=True,
    )
    try:
        packages = Packages(module.params["timeout_seconds"], run if module.params["started"] else quiet)
        result = converge(module.params, packages, dry=module.check_mode)
    except (PackageError, OSError) as fault:
        module.fail_json(msg=str(fault))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
