#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Note on a host that a whole run found it as wanted."""

from __future__ import annotations

DOCUMENTATION = r"""
module: settled_note
short_description: Note on a host that a whole run found it as wanted
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Looks at a host once more at the end of a run. Where it looks as it did before the roles looked, they changed
    nothing, so it is as wanted, and a note of that is kept in C(/run/selfhost-settled.json), readable by root alone.
  - Where it looks different, the note stays as it is, and tells nothing any more.
  - The note is no part of what the inventory wants, so that it never counts as a change. A host that was started anew
    has none.
options:
  wanted:
    description: A digest of what is wanted.
    type: str
    required: true
  seen:
    description: A digest of what M(selfhost.lmdeploy.host_survey) saw before.
    type: str
    required: true
  watched:
    description: What it looked at, as its O(selfhost.lmdeploy.host_survey#module:watched).
    type: dict
    required: true
attributes:
  check_mode:
    support: full
    description: Keeps no note.
"""

EXAMPLES = r"""
- name: Remember who is as wanted
  selfhost.lmdeploy.settled_note:
    wanted: "{{ ansible_facts['site_settled'].wanted[inventory_hostname] }}"
    seen: "{{ ansible_facts['preflight_watched'].seen }}"
    watched: "{{ ansible_facts['preflight_watched'].watched }}"
"""

RETURN = r"""
settled:
  description: Whether the host looks as it did before the roles looked.
  returned: success
  type: bool
"""

import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.witness import look, write_note


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "wanted": {"type": "str", "required": True},
            "seen": {"type": "str", "required": True},
            "watched": {"type": "dict", "required": True},
        },
        supports_check_mode=True,
    )
    wanted, seen = module.params["wanted"], module.params["seen"]
    settled = bool(wanted and seen) and look(module.params["watched"]) == seen
    if settled and not module.check_mode:
        try:
            write_note(wanted, seen, time.time())
        except OSError as fault:
            module.fail_json(msg=f"The note that this host is as wanted could not be kept: {fault}")
    module.exit_json(changed=False, settled=settled)


if __name__ == "__main__":
    main()
