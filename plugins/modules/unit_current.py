#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Have a systemd unit run with its present files."""

from __future__ import annotations

DOCUMENTATION = r"""
module: unit_current
short_description: Have a systemd unit run with its present files
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Starts a unit that is not active, and restarts one whose process is older than a file it was started from. So a
    change is applied even when the run that wrote it was interrupted before its handlers, which a handler can't do.
  - Has systemd read changed files of the unit, and of the units that a timer, socket or path unit starts.
  - Waits until systemd calls the unit active. What that means is the unit's own word (C(Type=), C(ExecStartPost=)).
  - A start that fails ends with the state of the unit and the last lines of its journal.
options:
  name:
    description: Name of the unit, with its suffix.
    type: str
    required: true
  state:
    description: Whether the unit runs.
    type: str
    choices: [started, stopped]
    default: started
  enabled:
    description: Whether the unit starts at boot.
    type: bool
    default: true
  files:
    description:
      - What the process was started from, beside the unit's own file, such as environment files, or the link to its
        program's release. A link counts by its own time, so switching it counts as a change.
    type: list
    elements: path
    default: []
  restarted:
    description:
      - Restarts a running unit whatever the times say. Give it the results of the tasks that write the files, so that
        check mode, which writes none, tells the truth.
    type: bool
    default: false
  reloaded_files:
    description:
      - What the process reads again when it is reloaded. A running unit is reloaded when one of them is newer than the
        last time that the unit started or was reloaded, unless it is restarted anyway.
    type: list
    elements: path
    default: []
  reloaded:
    description: Reloads a running unit whatever the times say; O(restarted) for what needs no restart.
    type: bool
    default: false
  journal_lines:
    description: Lines of the journal in a failure message.
    type: int
    default: 20
attributes:
  check_mode:
    description: Says what would be done.
    support: full
  diff_mode:
    description: Shows the state before and after.
    support: full
"""

EXAMPLES = r"""
- name: Have Open WebUI run as configured
  selfhost.lmdeploy.unit_current:
    name: open-webui.service
    files:
      - /etc/open-webui/open-webui.env
      - /opt/miniconda3/envs/open-webui
"""

RETURN = r"""
actions:
  description: What was done, in order.
  returned: success
  type: list
  elements: str
  sample: [daemon-reload, enable, restart]
reason:
  description: Why a running unit was restarted or reloaded; empty when it was not.
  returned: success
  type: str
  sample: /etc/open-webui/open-webui.env is newer than the process
"""

import datetime as dt
import os
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.progress import told

PROPERTIES = (
    "LoadState",
    "ActiveState",
    "SubState",
    "UnitFileState",
    "NeedDaemonReload",
    "FragmentPath",
    "DropInPaths",
    "Triggers",
    "StatusText",
    "InactiveExitTimestampMonotonic",
    "ActiveEnterTimestampMonotonic",
)
STARTED_AT = "ExecMainStartTimestamp"
# A start changes the state of a unit, and so does a reload.
SETTLED_AT = "StateChangeTimestamp"


class UnitError(Exception):
    """systemd refused, or the unit failed."""


def run(*command: str) -> str:
    """Run a command and return what it printed; a failure raises with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=ENVIRONMENT)
    if done.returncode != 0:
        raise UnitError((done.stderr or done.stdout).strip())
    return done.stdout


# Times and messages in one form whatever the host's language and zone are.
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "TZ": "UTC", "SYSTEMD_COLORS": "0"}


def properties(name: str) -> dict[str, str]:
    """Return what systemd knows about a unit."""
    wanted = ",".join((*PROPERTIES, STARTED_AT, SETTLED_AT))
    lines = run("systemctl", "show", name, f"--property={wanted}", "--timestamp=us+utc").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def started_at(shown: dict[str, str], name: str = STARTED_AT) -> float | None:
    """Return when the unit's process started, in seconds since 1970, or None where there is no process."""
    try:
        text = shown.get(name, "").replace("UTC", "+0000")
        return dt.datetime.strptime(text, "%a %Y-%m-%d %H:%M:%S.%f %z").timestamp()
    except ValueError:
        return None


def newer_file(files: list[str], moment: float) -> str:
    """Return the first file that changed after a moment, or nothing."""
    for name in files:
        path = Path(name)
        if path.exists() and path.lstat().st_mtime > moment:
            return name
    return ""


def unseen_drop_in(files: list[str], shown: dict[str, str]) -> bool:
    """Tell whether systemd has not read a drop-in; it does not notice one whose folder is new."""
    drop_ins = [name for name in files if Path(name).parent.name.endswith(".service.d") and Path(name).exists()]
    return not set(drop_ins) <= set(shown.get("DropInPaths", "").split())


def plan(params: dict[str, Any], shown: dict[str, str]) -> tuple[list[str], str]:
    """Return what to do, in order, and why a running unit must restart."""
    actions: list[str] = []
    missing = shown.get("LoadState") == "not-found"
    if shown.get("NeedDaemonReload") == "yes" or unseen_drop_in(params["files"], shown):
        actions.append("daemon-reload")
    # systemd reports 'linked' or 'static' for units that take no enabling; both are left alone.
    is_enabled = shown.get("UnitFileState", "") in ("enabled", "linked", "static", "alias", "generated")
    if is_enabled != params["enabled"] and not (missing and not params["enabled"]):
        actions.append("enable" if params["enabled"] else "disable")
    if params["state"] == "stopped":
        running = shown.get("ActiveState") in ("active", "activating", "reloading", "deactivating")
        return [*actions, *(["stop"] if running else [])], ""
    if shown.get("ActiveState") not in ("active", "activating", "reloading"):
        return [*actions, "start"], ""
    reason = stale(params, shown)
    if reason:
        actions.append("restart")
    elif shown["ActiveState"] != "active":
        # A start is under way; joining it waits for its end.
        actions.append("start")
    else:
        reason = outdated(params, shown)
        actions += ["reload"] if reason else []
    return actions, reason


def outdated(params: dict[str, Any], shown: dict[str, str]) -> str:
    """Return why the unit must read its files again, or nothing."""
    if params["reloaded"]:
        return "its files were changed in this run"
    moment = started_at(shown, SETTLED_AT)
    newer = newer_file(params["reloaded_files"], moment) if moment is not None else ""
    return f"{newer} is newer than the last reload" if newer else ""


def stale(params: dict[str, Any], shown: dict[str, str]) -> str:
    """Return why the unit's process does not stand for its files, or nothing."""
    if params["restarted"]:
        return "its files were changed in this run"
    if unseen_drop_in(params["files"], shown):
        return "systemd has not read its drop-in"
    moment = started_at(shown)
    files = [shown.get("FragmentPath", ""), *params["files"]]
    newer = newer_file([name for name in files if name], moment) if moment is not None else ""
    return f"{newer} is newer than the process" if newer else ""


def bring_to_present(files: list[str]) -> None:
    """Give files of the future the present time: a clock that was ahead would have them newer than every process."""
    for path in (Path(name) for name in files if name):
        if os.path.lexists(path) and path.lstat().st_mtime > time.time():
            os.utime(path, follow_symlinks=False)


def start_seconds(shown: dict[str, str]) -> float:
    """Return how long the unit's last start took, in seconds; 0 where that is not known."""
    begun, active = (int(shown.get(f"{word}TimestampMonotonic") or 0) for word in ("InactiveExit", "ActiveEnter"))
    return (active - begun) / 1e6 if active > begun else 0.0


def under_way(name: str, action: str, began: float, last_seconds: float) -> str:
    """Return how far an action is: its seconds, those of the last start, and what the unit says of itself."""
    shown = properties(name)
    before = f" of {last_seconds:.0f} s last time" if last_seconds and action != "stop" else ""
    said = shown.get("StatusText") or f"{shown.get('ActiveState')} ({shown.get('SubState')})"
    return f"{action} for {time.monotonic() - began:.0f} s{before}, {said}"


def act(name: str, action: str) -> None:
    """Do one step; a unit that failed before may start again."""
    if action == "daemon-reload":
        run("systemctl", "daemon-reload")
        return
    if action in ("start", "restart"):
        # Fails only where the unit has never failed, which is no fault.
        subprocess.run(["systemctl", "reset-failed", name], capture_output=True, check=False, env=ENVIRONMENT)
    run("systemctl", action, name)


def journal(name: str, lines: int) -> str:
    """Return the end of the unit's journal, or why it can't be read."""
    try:
        # What a process said last may still be on its way.
        run("journalctl", "--sync")
        return run("journalctl", "--unit", name, "--lines", str(lines), "--no-pager", "--output", "cat").strip()
    except (UnitError, OSError) as fault:
        return f"(the journal can't be read: {fault})"


def converge(params: dict[str, Any], *, dry: bool) -> dict[str, Any]:
    """Bring the unit to the wanted state and return what was done; with ``dry`` only say so."""
    name = params["name"]
    before = properties(name)
    if any(properties(unit).get("NeedDaemonReload") == "yes" for unit in before.get("Triggers", "").split()):
        # Else the timer would go on to start what the file of its service said before.
        before["NeedDaemonReload"] = "yes"
    if before.get("LoadState") == "not-found" and not dry and params["state"] == "started":
        # A file that was written since systemd last looked is found by a reload.
        run("systemctl", "daemon-reload")
        before = properties(name)
    actions, reason = plan(params, before)
    if not dry:
        if actions:
            bring_to_present([before.get("FragmentPath", ""), *params["files"], *params["reloaded_files"]])
        seconds = start_seconds(before)
        for action in actions:
            began = time.monotonic()
            with told("unit_current", partial(under_way, name, action, began, seconds)):
                act(name, action)
    return {
        "changed": bool(actions),
        "actions": actions,
        "reason": reason,
        "diff": {
            "before": f"{name}: {before.get('ActiveState', 'unknown')}\n",
            "after": f"{name}: {', '.join(actions) or before.get('ActiveState', 'unknown')}\n",
        },
    }


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["started", "stopped"], "default": "started"},
            "enabled": {"type": "bool", "default": True},
            "files": {"type": "list", "elements": "path", "default": []},
            "restarted": {"type": "bool", "default": False},
            "reloaded_files": {"type": "list", "elements": "path", "default": []},
            "reloaded": {"type": "bool", "default": False},
            "journal_lines": {"type": "int", "default": 20},
        },
        supports_check_mode=True,
    )
    name = module.params["name"]
    try:
        result = converge(module.params, dry=module.check_mode)
    except (UnitError, OSError) as fault:
        module.fail_json(
            msg=f"{name} did not get to {module.params['state']}: {fault}\n"
            f"The end of its journal (journalctl -u {name}):\n{journal(name, module.params['journal_lines'])}"
        )
    module.exit_json(**result)


if __name__ == "__main__":
    main()
