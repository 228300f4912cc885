# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""A report of a host that can be shown to strangers: what is a secret is found, and taken out of all text. Pure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ansible_collections.selfhost.lmdeploy.plugins.module_utils import environment_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

HIDDEN = "(hidden)"
# What is shorter is no secret of ours, and may be a word that stands everywhere.
SHORTEST = 8
SECRET_NAME = re.compile(r"KEY|SECRET|PASSW|TOKEN|CREDENTIAL|DATABASE_URL", re.IGNORECASE)
# Secrets that are in no file of ours, as programs and people write them.
FORMS = (
    re.compile(r"(?i)(\bbearer\s+)[\w.~+/=-]{8,}"),
    re.compile(r"(?i)((?:api[_-]?keys?|secret(?:[_-]?key)?|passw(?:or)?d|token)['\"]?\s*[=:]\s*['\"]?)[^\s'\",;]{6,}"),
    re.compile(r"(\b\w+://)[^\s/@:]+:[^\s/@]+(?=@)"),
    re.compile(r"()\b(?:hf_|sk-|ghp_|glpat-|AGE-SECRET-KEY-)[\w-]{16,}"),
)


def secrets_of(files: Mapping[str, str]) -> list[str]:
    """Return every secret in files by path: values of environment files with a secret's name, else each word."""
    found: set[str] = set()
    for path, text in files.items():
        if path.endswith(".env"):
            values = [value for name, value in environment_file.parse(text).items() if SECRET_NAME.search(name)]
        else:
            values = text.split()
        for value in values:
            found |= {value, *re.split(r"[;,\s]+", value)}
    return sorted((value for value in found if len(value) >= SHORTEST), key=len, reverse=True)


def hidden(text: str, secrets: Iterable[str]) -> str:
    """Return text without secrets, the longest of which come first."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    for form in FORMS:
        text = form.sub(rf"\g<1>{HIDDEN}", text)
    return text


def _block(text: str) -> str:
    """Return text as a block of code, whatever it holds."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text.rstrip()}\n{fence}"


def render(host: str, found: Mapping[str, Any], secrets: Iterable[str] = ()) -> str:
    """Return a host's report as Markdown.

    ``found``: ``about`` (name to value), ``services`` (as host_status returns them), ``sections`` (title to text), and
    ``journals`` (unit to its last lines).
    """
    parts = [f"## {host}", "\n".join(f"* {name}: {value}" for name, value in found["about"].items() if value)]
    for service in found["services"]:
        told = {key: value for key, value in service.items() if value not in ("", {}, None) and key != "unit"}
        parts += [
            f"### {service['unit']}",
            "\n".join(f"* {key.replace('_', ' ')}: {value}" for key, value in told.items()),
        ]
    for title, text in found["sections"].items():
        if text.strip():
            parts += [f"### {title}", _block(text)]
    for unit, text in found["journals"].items():
        if text.strip():
            parts += [f"### Journal of {unit}", _block(text)]
    return hidden("\n\n".join(parts) + "\n", secrets)
