"""Run a command so that it can be killed with all that it ever started: leash.py COMMAND...

Ansible's workers and SSH's master process leave the group and the session of the command, so killing a group would
leave half a controller. Here they all stay descendants, and SIGTERM to this process kills each with SIGKILL, as a
power cut of the controller would. Nothing is left when the command ends by itself either.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
KILLED = 137


def parents() -> dict[int, int]:
    """Return the parent of every living process."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in parentheses may hold blanks.
            state, parent = entry.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state not in "ZX":
            found[int(entry.parent.name)] = int(parent)
    return found


def descendants(top: int) -> set[int]:
    """Return the living descendants of a process."""
    table = parents()
    found: set[int] = set()
    while True:
        more = {pid for pid, parent in table.items() if (parent in found or parent == top) and pid not in found}
        if not more:
            return found
        found |= more


def kill_all() -> None:
    """Kill until nobody is left; who was started meanwhile is met in the next round."""
    while pids := descendants(os.getpid()):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        reap()
    reap()


def reap() -> None:
    """Take leave of dead children, each orphan among them. Nobody is waited for: some may not have been killed yet."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return


def cut(_signal: int, _frame: object) -> None:
    """End everything, and this process."""
    kill_all()
    os._exit(KILLED)


def main() -> None:
    """Run the command and return its exit code."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no subreaper")
    signal.signal(signal.SIGTERM, cut)
    process = subprocess.Popen(sys.argv[1:])
    code = process.wait()
    kill_all()
    sys.exit(code)


if __name__ == "__main__":
    main()
