# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""What runs where, as a page for phones and screens."""

from __future__ import annotations

DOCUMENTATION = r"""
name: status_page
short_description: Return what runs where as a page for phones and screens
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - One HTML document that needs nothing else, no script and no other file, from what M(selfhost.lmdeploy.host_status)
    returned on each host. Hosts with a fault come first. What host_status tells
    beyond what this filter knows is shown too.
positional: moment
options:
  _input:
    description: Host name to list of services; null stands for a host that could not be asked.
    type: dict
    required: true
  moment:
    description: When the hosts were asked, as people read it.
    type: str
    default: ""
"""

EXAMPLES = r"""
- name: Write the page
  ansible.builtin.copy:
    content: "{{ {inventory_hostname: status.services} | selfhost.lmdeploy.status_page('today') }}"
    dest: fleet.html
    mode: "0644"
"""

RETURN = r"""
_value:
  description: The page.
  type: str
"""

from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

GOOD = "good"
WARNING = "warning"
FAULT = "fault"
WORST_FIRST = (FAULT, WARNING, GOOD)
PROGRAMS = {"lmdeploy": "LMDeploy", "llama_cpp": "llama.cpp", "open_webui": "Open WebUI", "haproxy": "HAProxy"}
# Shown at the top of a service; everything else that host_status tells is in its details.
SHOWN_ABOVE = frozenset({"unit", "program", "version", "model", "state", "healthy", "gate"})
LABELS = {"model_path": "weights", "url": "address", "enabled": "starts at boot", "since": "active since"}

STYLE = """
:root{color-scheme:light dark;--page:#f4f5f7;--card:#fff;--line:#e1e4ea;--text:#1b2230;--soft:#5d6678;
--good:#14804a;--good-back:#e3f5ea;--warning:#8a5a00;--warning-back:#fdf1d6;--fault:#b42318;--fault-back:#fde7e4;
--shadow:0 1px 2px #1018280f,0 4px 16px #1018280a}
@media(prefers-color-scheme:dark){:root{--page:#0f1318;--card:#181d25;--line:#2a313d;--text:#e8ecf2;--soft:#98a2b3;
--good:#56d490;--good-back:#14301f;--warning:#f0b849;--warning-back:#352a10;--fault:#ff8a7a;--fault-back:#3b1a17;--shadow:none}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);-webkit-text-size-adjust:100%;
font:16px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1200px;margin:0 auto;padding:24px 16px 48px}
header{display:flex;flex-wrap:wrap;gap:4px 16px;align-items:baseline;justify-content:space-between;margin-bottom:16px}
h1{font-size:1.5rem;margin:0;letter-spacing:-.01em}
h2{font-size:1.05rem;margin:0;overflow-wrap:anywhere}
h3{font-size:1rem;margin:0;font-weight:600;overflow-wrap:anywhere}
.soft{color:var(--soft);font-size:.875rem}
.tally{display:grid;grid-template-columns:repeat(3,1fr);gap:8px;margin:0 0 20px;padding:0;list-style:none}
.tally li{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:10px 12px;
box-shadow:var(--shadow)}
.tally span{font-size:.8125rem}
.tally b{display:block;font-size:1.5rem;line-height:1.2;font-variant-numeric:tabular-nums}
.hosts{columns:350px;column-gap:16px}
article{break-inside:avoid;margin-bottom:16px;background:var(--card);border:1px solid var(--line);border-radius:14px;
box-shadow:var(--shadow);overflow:hidden}
article>header{margin:0;padding:14px 16px;align-items:center;flex-wrap:nowrap}
section{border-top:1px solid var(--line);padding:14px 16px}
section>header{margin:0 0 2px;align-items:flex-start;flex-wrap:nowrap;gap:12px}
.mark{flex:none;display:inline-flex;align-items:center;gap:6px;border-radius:99px;padding:2px 10px;
font-size:.8125rem;font-weight:600;white-space:nowrap}
.good{color:var(--good);background:var(--good-back)}
.warning{color:var(--warning);background:var(--warning-back)}
.fault{color:var(--fault);background:var(--fault-back)}
p{margin:4px 0 0;overflow-wrap:anywhere}
details{margin-top:8px}
summary{cursor:pointer;color:var(--soft);font-size:.875rem;min-height:28px;display:flex;align-items:center;gap:6px;list-style:none}
summary::-webkit-details-marker{display:none}
summary::before{content:"\\25B8";transition:transform .12s}
details[open] summary::before{transform:rotate(90deg)}
dl{display:grid;grid-template-columns:auto 1fr;gap:4px 14px;margin:6px 0 0;font-size:.875rem}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
"""


def _text(value: Any) -> str:
    """Return any value as text for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(entry) for entry in value)
    return "" if value is None else str(value)


def _level(service: Mapping[str, Any]) -> tuple[str, str]:
    """Return how a service is, and the word for it."""
    if service.get("state") != "active":
        return FAULT, _text(service.get("state")) or "unknown"
    if not service.get("healthy"):
        return FAULT, "no answer"
    if not service.get("enabled", True):
        return WARNING, "not at boot"
    restarts = service.get("restarts") or 0
    return (WARNING, f"{restarts} restarts") if restarts else (GOOD, "good")


def _host_level(services: Sequence[Mapping[str, Any]] | None) -> tuple[str, str]:
    """Return how a host is, and the word for it."""
    if services is None:
        return FAULT, "could not be asked"
    if not services:
        return WARNING, "nothing installed"
    worst = min((_level(service)[0] for service in services), key=WORST_FIRST.index)
    return worst, {GOOD: "good", WARNING: "look at it", FAULT: "fault"}[worst]


def _mark(level: str, word: str) -> str:
    """Return a coloured word; the sign tells it to those who see no colour."""
    sign = {GOOD: "&#10003;", WARNING: "!", FAULT: "&#10005;"}[level]
    return f'<span class="mark {level}"><span aria-hidden="true">{sign}</span>{escape(word)}</span>'


def _service(service: Mapping[str, Any]) -> str:
    program = _text(service.get("program"))
    unit = _text(service.get("unit"))
    named = f"{PROGRAMS.get(program, program)} {_text(service.get('version'))}".strip()
    title = _text(service.get("model")) or named or unit
    below = " · ".join(word for word in (named if title != named else "", unit.removesuffix(".service")) if word)
    more = [
        (LABELS.get(key, key.replace("_", " ")), _text(value))
        for key, value in service.items()
        if key not in SHOWN_ABOVE and _text(value)
    ]
    rows = "".join(f"<dt>{escape(label)}</dt><dd>{escape(value)}</dd>" for label, value in more)
    gate = _text(service.get("gate"))
    return (
        f"<section><header><h3>{escape(title)}</h3>{_mark(*_level(service))}</header>"
        f'<p class="soft">{escape(below)}</p>'
        + (f"<p>{escape(gate)}</p>" if gate else "")
        + (f"<details><summary>Details</summary><dl>{rows}</dl></details>" if rows else "")
        + "</section>"
    )


def _host(name: str, services: Sequence[Mapping[str, Any]] | None) -> str:
    inside = "".join(_service(service) for service in services or [])
    return f"<article><header><h2>{escape(name)}</h2>{_mark(*_host_level(services))}</header>{inside}</article>"


def _tally(hosts: Mapping[str, Sequence[Mapping[str, Any]] | None]) -> str:
    services = [service for found in hosts.values() for service in found or []]
    good = sum(_level(service)[0] == GOOD for service in services)
    faults = sum(_level(service)[0] == FAULT for service in services) + sum(found is None for found in hosts.values())
    numbers: Iterable[tuple[str, str, str]] = (
        (str(len(hosts)), "host" if len(hosts) == 1 else "hosts", ""),
        (f"{good} of {len(services)}", "services good", ""),
        (str(faults), "fault" if faults == 1 else "faults", ' style="color:var(--fault)"' if faults else ""),
    )
    return "".join(
        f'<li><b{style}>{number}</b><span class="soft">{word}</span></li>' for number, word, style in numbers
    )


def status_page(hosts: dict[str, list[dict[str, Any]] | None], moment: str = "") -> str:
    """Return the page (see DOCUMENTATION)."""
    ordered = sorted(hosts.items(), key=lambda pair: WORST_FIRST.index(_host_level(pair[1])[0]))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # What a host says is text; should anything slip through, nothing of it runs or is fetched.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>Model servers</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header><h1>Model servers</h1><span class="soft">{escape(moment)}</span></header>\n'
        f'<ul class="tally">{_tally(hosts)}</ul>\n<div class="hosts">\n'
        + "\n".join(_host(name, services) for name, services in ordered)
        + "\n</div>\n</main>\n</body>\n</html>\n"
    )


class FilterModule:
    """Ansible's way in."""

    def filters(self) -> dict[str, Callable[..., str]]:
        """Return the filter by its name."""
        return {"status_page": status_page}
