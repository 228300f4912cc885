# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""The filter fetch_environment: from mirrors, proxies and a CA to the environment of downloads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import fetch_environment as rules

DOCUMENTATION = r"""
name: fetch_environment
short_description: The environment that downloads run with
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Turns mirrors, proxies and a certificate authority into the variables that pip, uv, conda, requests, curl and the
    clients of the model hubs read.
  - An address without a usable scheme is an error that names it.
options:
  _input:
    description: The variables of the role P(selfhost.lmdeploy.mirrors#role) without their prefix. What is missing or
      empty adds nothing.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Fetch through a mirror
  ansible.builtin.command:
    cmd: pip download six
  environment: "{{ {'pip_index_url': 'https://pypi.example.org/simple'} | selfhost.lmdeploy.fetch_environment }}"
"""

RETURN = r"""
_value:
  description: Environment variables.
  type: dict
"""


def fetch_environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment of downloads."""
    try:
        return rules.fetch_environment(settings)
    except ValueError as error:
        raise AnsibleFilterError(str(error)) from error


class FilterModule:
    """Name the filter for Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters of this file."""
        return {"fetch_environment": fetch_environment}
