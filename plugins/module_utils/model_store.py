# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""The store below the models folder: complete entries, their markers, and the links that units and people use.

    DIR/ORG--NAME           -> .store/ORG--NAME/COMMIT          a model
    DIR/FILE                -> .store/packages/FILE/ID/FILE     a file out of a Python package
    DIR/.store/.../.complete.json                               the marker, written last

An entry without its marker is unfinished. A link points to complete entries only, and changes in one rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

STORE = ".store"
MARKER = ".complete.json"
MARKER_FORMAT = 1
CHUNK_BYTES = 1 << 20


class StoreError(Exception):
    """A fault with its cause and its way out in one message."""


def human(count: float) -> str:
    """Return a number of bytes for people: decimal units, as download pages use them."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def bytes_below(folder: Path) -> int:
    """Return the bytes of all files below ``folder``; one that goes away meanwhile counts as none."""
    total = 0
    for place, _dirs, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(place) / name).lstat().st_size
            except OSError:
                continue
    return total


def digest(identity: dict[str, Any]) -> str:
    """Return 12 hexadecimal digits that stand for ``identity``: equal content, equal name."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, read once in pieces."""
    result = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(CHUNK_BYTES):
            result.update(piece)
    return result.hexdigest()


def read_marker(entry: Path) -> dict[str, Any] | None:
    """Return the marker of an entry, or None where it is missing, unreadable or of another format."""
    try:
        marker = json.loads((entry / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and marker.get("format") == MARKER_FORMAT else None


def write_marker(entry: Path, content: dict[str, Any]) -> None:
    """Write the marker of an entry, on disk before this returns: from now on the entry counts as complete."""
    temporary = entry / (MARKER + ".new")
    with temporary.open("w", encoding="utf-8") as handle:
        json.dump({"format": MARKER_FORMAT, **content}, handle, indent=1, sort_keys=True)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())
    temporary.chmod(0o644)
    temporary.replace(entry / MARKER)


def is_complete(entry: Path, marker: dict[str, Any]) -> bool:
    """Tell whether every file that the marker names is there with its size: one stat each, nothing is read."""
    try:
        return all((entry / item["path"]).stat().st_size == item["size"] for item in marker["files"])
    except OSError:
        return False


def own_link(link: Path) -> bool:
    """Tell whether ``link`` is a link into the store beside it."""
    return link.is_symlink() and os.path.normpath(link.readlink()).split("/")[0] == STORE


def link_fault(link: Path) -> str | None:
    """Say why ``link`` may not be made: something stands there that this store did not put there."""
    if own_link(link):
        return None
    if link.is_symlink():
        return f"{link} is a link to {link.readlink()}, which is not in {link.parent / STORE}: move it away."
    return f"{link} is there already and is no link of the models store: move it away." if link.exists() else None


def switch_link(link: Path, target: Path) -> bool:
    """Let ``link`` point to ``target`` (relative, in one rename) and tell whether that was a change."""
    fault = link_fault(link)
    if fault:
        raise StoreError(fault)
    wanted = os.path.relpath(target, link.parent)
    if link.is_symlink() and str(link.readlink()) == wanted:
        return False
    temporary = link.parent / f".{link.name}.new"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(wanted)
    temporary.replace(link)
    return True


def remove_store(directory: Path, *, dry: bool = False) -> list[str]:
    """Remove the store, the links into it, and the folder if nothing else is in it; return what went (or would)."""
    if not directory.is_dir():
        return []
    doomed = [path for path in sorted(directory.iterdir()) if path.name == STORE or own_link(path)]
    emptied = len(doomed) == len(list(directory.iterdir()))
    if not dry:
        for path in doomed:
            shutil.rmtree(path) if path.name == STORE else path.unlink()
        if emptied:
            directory.rmdir()
    return [str(path) for path in [*doomed, *([directory] if emptied else [])]]


def disk_fault(directory: Path, needed_bytes: int, reserve_bytes: int) -> str | None:
    """Say with figures what is missing on the disk of ``directory`` (or of its first parent that exists)."""
    place = directory
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free >= needed_bytes + reserve_bytes:
        return None
    missing = needed_bytes + reserve_bytes - free
    return (
        f"{human(needed_bytes)} are to be fetched and {human(reserve_bytes)} are kept free, but the disk of {place} "
        f"has {human(free)} left: free {human(missing)}, or set model_weights_dir to a larger disk."
    )
