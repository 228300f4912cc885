"""Runs in place of a unit's program and tries what the unit must not be able to do; prints how each try ended.

Use: probe.py FOLDER ADDRESS. The folder is the unit's own; at the address, outside of this host, port 22 is open.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

FOREIGN = (
    "/etc/probe",
    "/usr/local/probe",
    "/opt/miniconda3/probe",
    "/var/lib/models/probe",
    "/var/lib/probe",
    "/root/probe",
    "/proc/sys/kernel/hostname",
    "/sys/fs/cgroup/probe",
)
SECRET = (
    "/etc/shadow",
    "/etc/api-server/api-key",
    "/etc/gateway/private/api-key",
    "/etc/open-webui/open-webui.env",
    "/etc/open-webui/admin-password",
)
CLONE_NEWUSER = 0x10000000
LIBC = ctypes.CDLL(None, use_errno=True)


def system_call(function: str, *arguments: object) -> None:
    """Call the C library; a failure raises."""
    if getattr(LIBC, function)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def listed(folder: str) -> None:
    """Find something in a folder."""
    if not os.listdir(folder):  # noqa: PTH208  # names are enough
        raise OSError("it looks empty")


def read(path: str) -> None:
    """Find something in a file; one that is hidden is there and empty."""
    if not Path(path).read_bytes():
        raise OSError("it looks empty")


def foreign_processes() -> None:
    """Find a process of another user."""
    pids = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    if not any(entry.stat().st_uid != os.getuid() for entry in pids):
        raise OSError("only its own processes are there")


def connect(address: str) -> None:
    """Reach another host."""
    socket.create_connection((address, 22), timeout=2).close()


def tries(own: str, address: str) -> dict[str, Callable[[], object]]:
    """Return everything that is tried, by its name. What begins with ALLOWED must go well."""
    marked = Path(own, "set-uid")
    return {
        **{f"write {path}": lambda path=path: Path(path).write_text("x") for path in FOREIGN},  # type: ignore[misc]  # a default binds
        **{f"read {path}": lambda path=path: read(path) for path in SECRET},  # type: ignore[misc]  # a default binds
        "read /home": lambda: listed("/home"),
        "read /root": lambda: listed("/root"),
        "see other processes": foreign_processes,
        "open a device": lambda: os.open("/dev/probe-device", os.O_RDONLY),
        "open a packet socket": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
        "make a namespace": lambda: system_call("unshare", CLONE_NEWUSER),
        "mount": lambda: system_call("mount", b"none", b"/tmp", b"tmpfs", 0, None),
        "set the clock": lambda: time.clock_settime(time.CLOCK_REALTIME, 1.0),
        "become root": lambda: os.setuid(0),
        "make a set-uid file": lambda: (marked.write_text("x"), marked.chmod(0o4755)),
        "reach the network": lambda: connect(address),
        "ALLOWED write its own folder": lambda: Path(own, "probe").write_text("x"),
        "ALLOWED write its own temporary folder": lambda: Path("/tmp/probe").write_text("x"),  # noqa: S108  # the unit's own
    }


def main() -> None:
    """Print a JSON object: how each try ended."""
    said = {}
    for name, action in tries(*sys.argv[1:3]).items():
        try:
            action()
            said[name] = "done"
        except OSError as error:
            said[name] = f"refused: {error}"
    print("PROBE" + json.dumps(said))


if __name__ == "__main__":
    main()
