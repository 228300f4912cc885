"""Looks for words in everything on a host that somebody else than root may read; prints each place that has one.

The words come by standard input, so that this search is in no process list itself.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

TOLD = ("journalctl --no-pager -o export", "systemctl show * --all", "systemctl status --no-pager -n 1000")
PLACES = ("/etc", "/var", "/opt", "/usr/local", "/run", "/tmp", "/root/.ansible", "/home")  # noqa: S108  # looked into
# Whoever reads them: nothing secret may lie here at all.
EVERYTHING = ("/tmp", "/var/tmp", "/root/.ansible", "/etc/systemd", "/run/systemd/system")  # noqa: S108  # looked into
# Packages as they came from the index.
PASSED_OVER = ("/var/cache/selfhost", "/opt/miniconda3/pkgs")
SIZE_END = 8 << 20


def told() -> Iterator[tuple[str, bytes]]:
    """Yield what the service manager and the journal say."""
    for command in TOLD:
        yield command, subprocess.run(command.split(), capture_output=True, check=False).stdout


def processes() -> Iterator[tuple[str, bytes]]:
    """Yield arguments of every process, and its environment unless it is Open WebUI's.

    Open WebUI takes its secrets from its environment alone, which only its own user and root can read.
    """
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes()
            yield f"{process}/cmdline", arguments
            if b"open-webui" not in arguments and b"open_webui" not in arguments:
                yield f"{process}/environ", (process / "environ").read_bytes()
        except OSError:
            continue


def is_open(path: Path) -> bool:
    """Tell whether everybody may read a file: it, and each folder on the way."""
    return bool(path.stat().st_mode & stat.S_IROTH) and all(p.stat().st_mode & stat.S_IXOTH for p in path.parents)


def files() -> Iterator[tuple[str, bytes]]:
    """Yield the files that everybody may read, and all files where no secret may lie."""
    for place in PLACES:
        for folder, folders, names in os.walk(place):
            if folder.startswith(PASSED_OVER):
                folders.clear()
                continue
            for path in (Path(folder, name) for name in names):
                try:
                    about = path.lstat()
                    if not stat.S_ISREG(about.st_mode) or about.st_size > SIZE_END:
                        continue
                    if folder.startswith(EVERYTHING) or is_open(path):
                        yield str(path), path.read_bytes()
                except OSError:
                    continue


def main() -> None:
    """Print the places."""
    words = [line.encode() for line in sys.stdin.read().split("\n") if line]
    for source in (told(), processes(), files()):
        for place, content in source:
            for word in words:
                if word in content:
                    print(f"{place} holds {word[:12].decode()}...")


if __name__ == "__main__":
    main()
