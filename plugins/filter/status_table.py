# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""What runs where, as a table for people."""

from __future__ import annotations

DOCUMENTATION = r"""
name: status_table
short_description: Return what runs where as a table for people
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - One line for each service, in columns, from what M(selfhost.lmdeploy.host_status) returned on each host.
options:
  _input:
    description: Host name to list of services; null stands for a host that could not be asked.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Show what runs on this host
  ansible.builtin.debug:
    msg: "{{ {inventory_hostname: status.services} | selfhost.lmdeploy.status_table }}"
"""

RETURN = r"""
_value:
  description: The table, its lines separated by newlines.
  type: str
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

HEADINGS = ("HOST", "SERVICE", "STATE", "HEALTH", "PROGRAM", "RELEASE", "MODEL", "ADDRESS", "LAST GATE")


def _row(host: str, service: dict[str, Any]) -> tuple[str, ...]:
    restarts = f", {service['restarts']} restarts" if service["restarts"] else ""
    return (
        host,
        service["unit"].removesuffix(".service"),
        service["state"] + restarts + ("" if service["enabled"] else ", not at boot"),
        "good" if service["healthy"] else "none",
        f"{service['program']} {service['version']}".strip(),
        service["release"] + (f", switching to {service['pending']}" if service.get("pending") else ""),
        service["model"],
        service["url"],
        service["gate"],
    )


def status_table(hosts: dict[str, list[dict[str, Any]] | None]) -> str:
    """Return the table (see DOCUMENTATION)."""
    rows: list[tuple[str, ...]] = [HEADINGS]
    for host, services in hosts.items():
        if services:
            rows += [_row(host, service) for service in services]
        else:
            rows.append((host, "could not be asked" if services is None else "nothing installed"))
    loads = {
        f"{service['program']} {service['version']} {service['release']} loads "
        + ", ".join(f"{name} ({package})" for name, package in sorted(service["libraries"].items()))
        for services in hosts.values()
        for service in services or ()
        if service.get("libraries")
    }
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(HEADINGS))]
    table = ["  ".join(f"{word:<{widths[i]}}" for i, word in enumerate(row)).rstrip() for row in rows]
    return "\n".join([*table, *sorted(loads)])


class FilterModule:
    """Ansible's way in."""

    def filters(self) -> dict[str, Callable[..., str]]:
        """Return the filter by its name."""
        return {"status_table": status_table}
