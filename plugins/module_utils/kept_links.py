# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Links that keep what they lead to: whoever needs a release or a snapshot lays one, and pruning passes it over."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def kept(folders: Iterable[Path], patterns: Iterable[str]) -> set[Path]:
    """Return those of the folders that a link found by a glob pattern leads to or into."""
    # Absolute patterns, which pathlib does not take.
    targets = [Path(name).resolve() for pattern in patterns for name in glob.glob(pattern)]  # noqa: PTH207
    return {folder for folder in folders if any(folder.resolve() in (target, *target.parents) for target in targets)}
