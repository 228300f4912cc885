# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Files of root and folders, with the owner, group and permissions that are wanted, replaced in one step."""

from __future__ import annotations

import grp
import os
import pwd
import tempfile
from pathlib import Path
from typing import Any


def read(path: Path) -> str | None:
    """Return a file's text, or None where there is none."""
    return path.read_bytes().decode("utf-8") if path.is_file() else None


def group_id(name: str) -> int:
    """Return the number of a group, our own for no name, and -1 for one that is not there."""
    try:
        return grp.getgrnam(name).gr_gid if name else os.getgid()
    except KeyError:
        return -1


def user_id(name: str) -> int:
    """Return the number of a user, our own for no name, and -1 for one that is not there."""
    try:
        return pwd.getpwnam(name).pw_uid if name else os.getuid()
    except KeyError:
        return -1


def wrong_rights(path: Path, entry: dict[str, Any]) -> bool:
    """Tell whether somebody else owns a file or folder, or its permissions differ."""
    about = path.stat()
    wanted = (int(entry["mode"], 8), user_id(entry.get("owner", "")), group_id(entry["group"]))
    return (about.st_mode & 0o7777, about.st_uid, about.st_gid) != wanted


def own(path: Path, entry: dict[str, Any]) -> None:
    """Give a file or folder its owner, group and permissions."""
    user, group = user_id(entry.get("owner", "")), group_id(entry["group"])
    if user < 0 or group < 0:
        missing = f"user {entry['owner']}" if user < 0 else f"group {entry['group']}"
        message = f"there is no {missing} for {path}"
        raise OSError(message)
    os.chown(path, user, group)
    path.chmod(int(entry["mode"], 8))


def write(path: Path, content: str, entry: dict[str, Any]) -> None:
    """Replace a file in one step; it never stands there with wider permissions than it may have."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        own(Path(name), entry)
        Path(name).replace(path)
    except BaseException as fault:
        Path(name).unlink(missing_ok=True)
        # A full disk is told without the file's name, and people must know which disk.
        if isinstance(fault, OSError) and fault.errno and fault.filename is None:
            fault.filename = str(path)
        raise


def have_folders(folders: list[dict[str, Any]], *, dry: bool) -> list[str]:
    """Make folders and mend their permissions; return which."""
    written = []
    for entry in folders:
        path = Path(entry["path"])
        if path.is_dir() and not wrong_rights(path, entry):
            continue
        written.append(str(path))
        if not dry:
            path.mkdir(parents=True, exist_ok=True)
            own(path, entry)
    return written
