# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Whether a host is as a whole run left it: one look at all that the roles have made, and a note of the last such look.

A run of site.yml looks at a host before its roles do. Where the roles then find nothing to change, a second look sees
the same: the host is as wanted, and a note keeps what was wanted and what was seen. A later run that wants the same and
sees the same has nothing to do there. The note lies in /run, so a host that was started anew is looked at by its roles
again.

A file counts by its kind, owner, mode, size, inode, target and time of last change (ctime, which nobody can set back),
so nothing is read. A folder counts by owner, mode and what is in it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import subprocess
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NOTE = Path("/run/selfhost-settled.json")
# What the roles make lies below these, or is told by preflight: conda, models, data. A folder stands for all in it.
PLACES = (
    "/etc/api-server",
    "/etc/apt/preferences.d",
    "/etc/apt/sources.list.d",
    "/etc/gateway",
    "/etc/grafana/provisioning",
    "/etc/group",
    "/etc/keepalived",
    "/etc/monitoring",
    "/etc/open-webui",
    "/etc/passwd",
    "/etc/profile.d",
    "/etc/ray",
    "/etc/selfhost-firewall",
    "/etc/ssh",
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/systemd/system",
    "/usr/local/lib/api-server",
    "/usr/local/lib/monitoring",
    "/usr/local/lib/open-webui",
    "/usr/local/lib/open-webui-backup",
    "/usr/local/share/ca-certificates",
    "/usr/local/share/monitoring",
    # dpkg writes it anew with every package that comes, goes or changes.
    "/var/lib/dpkg/status",
    "/var/lib/dpkg/updates",
)
# What systemd is asked about: the units of the roles, and those that tell where SSH listens.
UNITS = (
    "api-server*.service",
    "engine-releases.service",
    "grafana-server.service",
    "haproxy.service",
    "keepalived.service",
    "monitoring-collector.timer",
    "open-webui-backup.timer",
    "open-webui.service",
    "prometheus-blackbox-exporter.service",
    "prometheus-node-exporter.service",
    "prometheus.service",
    "selfhost-firewall.service",
    "ssh.service",
    "ssh.socket",
)
PROPERTIES = ("Id", "LoadState", "ActiveState", "UnitFileState", "NeedDaemonReload", "FragmentPath", "DropInPaths")
# More entries than this, and the look would cost what it saves.
LIMIT = 20000
# As many wishes are noted.
KEPT = 50


def describe(path: str) -> str:
    """Return what counts of one entry, as a line."""
    try:
        found = os.lstat(path)
    except OSError as error:
        return f"{path}\0{error.errno}"
    owner = f"{found.st_mode:o}\0{found.st_uid}\0{found.st_gid}"
    if stat.S_ISDIR(found.st_mode):
        return f"{path}\0{owner}"
    target = os.readlink(path) if stat.S_ISLNK(found.st_mode) else ""  # noqa: PTH115 a text, for thousands of entries
    return f"{path}\0{owner}\0{found.st_size}\0{found.st_ino}\0{found.st_ctime_ns}\0{target}"


def below(place: str) -> Iterator[str]:
    """Yield a path and, for a folder, everything in it, in an order of its own making."""
    yield place
    for folder, folders, files in os.walk(place):
        # Python writes there when it likes.
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted([*folders, *files]):
            yield os.path.join(folder, name)  # noqa: PTH118 half a million joins of a path need no objects


def listed(place: str) -> Iterator[str]:
    """Yield a folder and its own entries."""
    yield place
    try:
        names = sorted(os.listdir(place))  # noqa: PTH208 names are what is asked
    except OSError:
        return
    yield from (f"{place}/{name}" for name in names if name != "__pycache__")


def environments(prefix: str) -> Iterator[str]:
    """Yield what counts of conda and its environments: what makes conda whole, links, releases, programs, packages."""
    root = Path(prefix)
    yield from (f"{prefix}/{name}" for name in (".installer.json", "bin/conda", "bin/python"))
    yield from (f"{prefix}/conda-meta/{name}" for name in ("history", "tos"))
    yield str(root.with_name(f".{root.name}.installing"))
    yield from listed(f"{prefix}/envs")
    for home in listed(f"{prefix}/releases"):
        yield from listed(home)
    for link in sorted(root.glob("envs/*")):
        release = link.resolve()
        yield str(release / "release.json")
        yield str(release / "conda-meta/history")
        for place in [release / "bin", *sorted(release.glob("lib/python3*/site-packages"))]:
            yield from listed(str(place))


def entries(trees: Iterable[str], folders: Iterable[str], prefix: str) -> Iterator[str]:
    """Yield every path that is looked at."""
    for tree in (*PLACES, *sorted(set(trees))):
        yield from below(tree)
    # Whose content others write: only owner and mode are the roles' affair.
    yield from sorted(set(folders))
    if prefix:
        yield from environments(prefix)


def units() -> str:
    """Return systemd's word on the units."""
    done = subprocess.run(
        ["systemctl", "show", f"--property={','.join(PROPERTIES)}", *UNITS],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
        env={"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    # In which order a pattern finds units is chance.
    return "\n".join(sorted(done.stdout.split("\n\n")))


def look(watched: dict[str, Any]) -> str:
    """Return a digest of all that is to be seen, '' where that is too much or systemd gives no answer."""
    paths = list(islice(entries(watched["trees"], watched["folders"], watched["prefix"]), LIMIT + 1))
    if len(paths) > LIMIT:
        return ""
    try:
        return digest([*map(describe, paths)], units())
    except (OSError, subprocess.SubprocessError):
        return ""


def parsed(text: str) -> dict[str, Any]:
    """Return a note, empty for half of one."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("wanted"), dict) else {}


def read_note(path: Path = NOTE) -> dict[str, Any]:
    """Return the note: what was ``seen``, and the times at which the roles found each ``wanted`` fulfilled by that."""
    try:
        return parsed(path.read_text(encoding="utf-8"))
    except OSError:
        return {}


def write_note(wanted: str, seen: str, now: float, path: Path = NOTE) -> None:
    """Note, for root alone, that what is wanted is fulfilled by what is seen.

    Other wishes stay noted while the host looks the same: it may have two names, or two controllers.
    """
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        note = parsed(file.read())
        times = note["wanted"] if note.get("seen") == seen else {}
        latest = sorted({**times, wanted: now}.items(), key=lambda entry: entry[1])[-KEPT:]
        file.seek(0)
        file.truncate()
        json.dump({"seen": seen, "wanted": dict(latest)}, file)


def as_text(value: Any) -> str:
    """Return the text of a value of another's making; of a secret that nobody can decrypt, that it is one."""
    try:
        return str(value)
    except Exception:  # noqa: BLE001 Ansible's errors are unknown on hosts, and whoever needs the value will say so
        return type(value).__name__


def digest(*parts: Any) -> str:
    """Return a digest of plain values; of one that is none its text counts."""
    text = json.dumps(parts, sort_keys=True, default=as_text)
    return hashlib.sha256(text.encode()).hexdigest()


def is_settled(wanted: str, own: dict[str, Any], hours: float) -> bool:
    """Tell whether a host is as the note says, and the note not too old. ``own`` has seen, note and the host's time."""
    note = own.get("note") or {}
    if not own.get("seen") or note.get("seen") != own["seen"] or wanted not in note["wanted"]:
        return False
    return bool(0 <= own["time"] - note["wanted"][wanted] < hours * 3600)
