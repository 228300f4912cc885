# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Files that only their owner reads, replaced in one step."""

from __future__ import annotations

import os
from pathlib import Path

from ansible_collections.selfhost.lmdeploy.plugins.module_utils import owned_files


class PrivateFiles:
    """Private files on the host; remembers which ones changed."""

    def __init__(self, *, dry: bool) -> None:
        """Change nothing on disk when ``dry``."""
        self.dry = dry
        self.changed: list[str] = []

    def read(self, path: Path) -> str | None:
        """Return a file's content, or None where there is none."""
        try:
            # As it stands there: reading as text would take a carriage return for a line break.
            return path.read_bytes().decode("utf-8", errors="replace")
        except FileNotFoundError:
            return None

    def have_folder(self, path: Path) -> None:
        """Have a folder that only its owner enters."""
        if path.is_dir() and _is_private(path, 0o700):
            return
        self.changed.append(str(path))
        if not self.dry:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.chown(path, os.geteuid(), os.getegid())
            path.chmod(0o700)

    def have(self, path: Path, content: str) -> None:
        """Have a file with this content that only its owner reads; a new one takes its place in one step."""
        if self.read(path) == content:
            if not _is_private(path, 0o600):
                self.changed.append(str(path))
                if not self.dry:
                    os.chown(path, os.geteuid(), os.getegid())
                    path.chmod(0o600)
            return
        self.changed.append(str(path))
        if self.dry:
            return
        # Made with 0600 from its first moment, so the secret is never readable by others.
        owned_files.write(path, content, {"mode": "0600", "group": ""})


def _is_private(path: Path, mode: int) -> bool:
    """Tell whether a path is ours and has exactly this mode."""
    status = path.lstat()
    return (status.st_uid, status.st_mode & 0o7777) == (os.geteuid(), mode)
