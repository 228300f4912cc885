# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Rules about Linux on Windows: how to tell it, and how to change its wsl.conf. Pure, no Ansible."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def is_wsl(version: str) -> bool:
    """Tell from /proc/version whether the kernel is that of WSL."""
    return "microsoft" in version.lower()


def with_settings(text: str, wanted: Mapping[str, Mapping[str, str]]) -> str:
    """Return the text of a wsl.conf with the wanted keys, section by section.

    Everything else stays as it was: other keys, comments, order. A key that is there is replaced where it stands; of a
    key that is there twice WSL takes the last one, so each is replaced. A missing section comes at the end.
    """
    lines = text.splitlines()
    for section, keys in wanted.items():
        for key, value in keys.items():
            lines = _with_key(lines, section, key, f"{key}={value}")
    return "".join(f"{line}\n" for line in lines)


def _with_key(lines: list[str], section: str, key: str, line: str) -> list[str]:
    """Return the lines with one key set."""
    result: list[str] = []
    current, place, is_set = "", -1, False
    for old in lines:
        header = re.match(r"\s*\[([^\]]+)\]", old)
        current = header[1].strip().lower() if header else current
        is_inside = current == section.lower()
        if is_inside and not header and re.match(rf"\s*{re.escape(key)}\s*=", old, re.IGNORECASE):
            same = re.sub(r"\s*#.*$|\s", "", old).lower() == line.lower()
            result.append(old if same else line)
            is_set = True
        else:
            result.append(old)
        # After the section's last line that says something.
        if is_inside and old.strip():
            place = len(result)
    if is_set:
        return result
    if place >= 0:
        return [*result[:place], line, *result[place:]]
    gap = [""] if result and result[-1].strip() else []
    return [*result, *gap, f"[{section}]", line]
