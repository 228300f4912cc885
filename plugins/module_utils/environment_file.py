# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""The syntax of systemd's EnvironmentFile=, both ways: any value survives writing and reading.

systemd reads such a file with rules of its own (systemd.exec(5); src/basic/env-file.c). Inside double quotes only
backslash, quote, dollar and backquote are escaped; a line break stands for itself; nothing is expanded.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
# Inside double quotes systemd takes the backslash away before these characters only, and keeps it before others.
ESCAPED = '"\\`$'


class EnvironmentFileError(ValueError):
    """A name or value that no environment can hold."""


def text_of(value: Any) -> str:
    """Return a value as programs expect it in their environment: True and False as words, lists and dicts as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False, sort_keys=True)
    return str(value)


def assignment(name: str, value: str) -> str:
    """Return one line, or several where the value has line breaks, that systemd reads back as exactly ``value``."""
    if NAME.match(name) is None:
        raise EnvironmentFileError(f"{name!r} is not a name for an environment variable: letters, digits and _ only")
    if "\0" in value:
        raise EnvironmentFileError(f"the value of {name} holds a NUL character, which ends a value for every program")
    quoted = "".join("\\" + char if char in ESCAPED else char for char in value)
    return f'{name}="{quoted}"\n'


def render(variables: Mapping[str, str], comment: str = "") -> str:
    """Return the whole file: the comment's lines, then one assignment for each variable, sorted by name."""
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    return head + "".join(assignment(name, value) for name, value in sorted(variables.items()))


def parse(content: str) -> dict[str, str]:
    """Return what systemd would read from a file that ``render`` wrote; lines of another kind are passed over."""
    values: dict[str, str] = {}
    position = 0
    while position < len(content):
        name, separator, _rest = content[position:].partition('="')
        if not separator or NAME.match(name) is None:
            # A comment, an empty line, or somebody else's syntax.
            newline = content.find("\n", position)
            position = len(content) if newline < 0 else newline + 1
            continue
        position += len(name) + len(separator)
        value, position = _quoted(content, position)
        values[name] = value
    return values


def _quoted(content: str, position: int) -> tuple[str, int]:
    """Return the value that begins after an opening quote, and the position behind its line."""
    characters: list[str] = []
    while position < len(content) and content[position] != '"':
        if content[position] == "\\" and content[position + 1 : position + 2] in tuple(ESCAPED):
            position += 1
        characters.append(content[position])
        position += 1
    return "".join(characters), position + 2
