"""Try from inside a unit what its directives forbid, and print what happened as one line of JSON.

Arguments: an address and port that something listens on outside of loopback, and a device file that is no GPU's.
The unit is a copy of an engine's unit with this program in the engine's place.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path


def attempt(action: Callable[[], object]) -> str:
    """Return 'allowed', or the error that stopped the action."""
    try:
        action()
    except OSError as error:
        return error.strerror or str(error)
    return "allowed"


def write(path: str) -> Callable[[], object]:
    """Return an action that makes a file."""
    return lambda: Path(path).write_text("x", encoding="ascii")


def open_device(path: str) -> Callable[[], object]:
    """Return an action that opens a device for reading."""

    def action() -> None:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))

    return action


def connect(address: str, port: int) -> Callable[[], object]:
    """Return an action that opens a TCP connection."""
    return lambda: socket.create_connection((address, port), timeout=3).close()


def syscall(*arguments: int) -> Callable[[], object]:
    """Return an action that is one system call."""
    library = ctypes.CDLL(None, use_errno=True)

    def action() -> None:
        if library.syscall(*arguments) == -1:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    return action


def run_writable_memory() -> None:
    """Ask for memory that is writable and executable, as a just-in-time compiler may."""
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()


def status(name: str) -> str:
    """Return one value of this process's status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{name}:")), "")


def others() -> int:
    """Return how many processes of other users can be seen."""
    seen = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            seen += folder.stat().st_uid != os.getuid()
        except OSError:
            continue
    return seen


def main() -> None:
    """Try everything."""
    address, port, device = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    stopped = {
        "write /etc": attempt(write("/etc/api-server-probe")),
        "write /usr": attempt(write("/usr/api-server-probe")),
        "write /opt": attempt(write("/opt/api-server-probe")),
        "write the release": attempt(write(f"{sys.prefix}/api-server-probe")),
        "write /var/lib": attempt(write("/var/lib/api-server-probe")),
        "list /home": attempt(lambda: list(Path("/home/probe").iterdir())),
        "list /root": attempt(lambda: list(Path("/root").iterdir())),
        "read the key's file": attempt(lambda: Path("/etc/api-server/api-key").read_text(encoding="ascii")),
        "open a foreign device": attempt(open_device(device)),
        "connect outside of loopback": attempt(connect(address, port)),
        "make a user namespace": attempt(syscall(272, 0x10000000)),
        "mount": attempt(syscall(165, 0, 0, 0, 0, 0)),
        "load a module": attempt(syscall(175, 0, 0, 0)),
        "set the clock": attempt(syscall(227, 0, 0)),
        "become root": attempt(lambda: os.setuid(0)),
        "raw socket": attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).close()),
        "packet socket": attempt(lambda: socket.socket(17, socket.SOCK_RAW, 0).close()),
    }
    granted = {
        "write its state": attempt(write(f"{os.environ.get('HOME', '/nonexistent')}/probe")),
        "write its cache": attempt(write(f"{os.environ.get('XDG_CACHE_HOME', '/nonexistent')}/probe")),
        "open /dev/null": attempt(open_device("/dev/null")),
        **{f"open {path}": attempt(open_device(str(path))) for path in sorted(Path("/dev").glob("nvidia*[0-9l]"))},
    }
    facts = {
        "user": os.getuid(),
        "NoNewPrivs": status("NoNewPrivs"),
        "Seccomp": status("Seccomp"),
        "CapEff": status("CapEff"),
        "CapBnd": status("CapBnd"),
        "processes of others seen": others(),
        "writable and executable memory": attempt(run_writable_memory),
    }
    sys.stdout.write(json.dumps({"stopped": stopped, "granted": granted, "facts": facts}) + "\n")


if __name__ == "__main__":
    main()
