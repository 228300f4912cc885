#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Documentation of the action plugin settled_hosts, which runs on the controller and asks no host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: settled_hosts
short_description: Find the hosts that are as a whole run left them, and wanted as they were then
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - M(selfhost.lmdeploy.preflight) looked at every host before; this compares what it saw with the note that
    M(selfhost.lmdeploy.settled_note) keeps on each. C(site.yml) leaves those alone for which both are the same.
  - What is wanted of a host is this collection's code, Ansible's version, the host's variables, the files of the
    controller that they name, and the host's cards. For a host that others tell something, such as a gateway, it is
    what they are, too.
  - Runs once for all hosts of a play (C(run_once)).
attributes:
  check_mode:
    support: full
    description: Never changes anything.
"""

EXAMPLES = r"""
- name: Find who is as wanted
  selfhost.lmdeploy.settled_hosts:
  run_once: true
"""

RETURN = r"""
hosts:
  description: The hosts that are as wanted.
  returned: always
  type: list
  elements: str
ansible_facts:
  description: The fact C(site_settled) with C(hosts) and C(wanted), a digest for each host, empty where none is known.
  returned: always
  type: dict
"""
