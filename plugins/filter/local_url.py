# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""How a host reaches its own service."""

from __future__ import annotations

DOCUMENTATION = r"""
name: local_url
short_description: Return how a host reaches its own service
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - A service that listens on all addresses is reached by the loopback one, every other by the address it listens on.
positional: port
options:
  _input:
    description: Address or name that the service listens on.
    type: str
    required: true
  port:
    description: Its port.
    type: int
    required: true
"""

EXAMPLES = r"""
- name: Show where Open WebUI answers on its own host
  ansible.builtin.debug:
    msg: "{{ '0.0.0.0' | selfhost.lmdeploy.local_url(8080) }}"
"""

RETURN = r"""
_value:
  description: The address, without a slash at its end.
  type: str
  sample: http://127.0.0.1:8080
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# What a server listens on, and what a client on the same host then asks.
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1", "*": "127.0.0.1", "": "127.0.0.1"}  # noqa: S104 - given by people


def local_url(host: str, port: int) -> str:
    """Return the address at which a client on the same host reaches a server that listens on ``host``."""
    address = LOOPBACK.get(str(host), str(host))
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


class FilterModule:
    """Ansible's way in."""

    def filters(self) -> dict[str, Callable[..., str]]:
        """Return the filter by its name."""
        return {"local_url": local_url}
