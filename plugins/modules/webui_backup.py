#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Make, check and restore backups of Open WebUI's data."""

from __future__ import annotations

DOCUMENTATION = r"""
module: webui_backup
short_description: Make, check and restore backups of Open WebUI's data
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - An archive holds the data folder with consistent copies of its databases, the secrets and the environment that
    belong to them, the unit, and a manifest with versions and the sha256 of every file.
  - It gets its name when it is whole. A backup that fails leaves the older ones as they were.
  - A restore reads and judges the whole archive before it touches anything, and keeps what was there until
    O(action=settle). O(action=undo) puts that back. The service must be stopped for both.
options:
  action:
    description: What to do. V(settle) removes what a restore put aside, V(undo) puts it back.
    type: str
    choices: [create, check, restore, undo, settle]
    required: true
  folder:
    description: Folder of the archives.
    type: path
    default: /var/backups/open-webui
  data_dir:
    description: Folder of accounts, chats and files.
    type: path
    default: /var/lib/open-webui/data
  config_dir:
    description: Folder of secrets and environment.
    type: path
    default: /etc/open-webui
  prefix:
    description: The environment that Open WebUI runs from; its marker says version and release.
    type: path
    default: /opt/miniconda3/envs/open-webui
  files:
    description: Further files that belong to the service, such as its unit.
    type: list
    elements: path
    default: []
  user:
    description: User that restored data belong to.
    type: str
    default: open-webui
  keep:
    description: Number of archives that stay of each O(reason).
    type: int
    default: 7
  recipient:
    description: Public key of age that archives are encrypted for; empty for none.
    type: str
    default: ''
  copy_to:
    description: Further folder that an archive is copied to. It must be there.
    type: path
  reason:
    description: Why a backup is made, one word of small letters, part of its name.
    type: str
    default: manual
  plain_kept:
    description: Whether an encrypted archive stays unencrypted beside it too, to go back without the secret key.
    type: bool
    default: false
  archive:
    description: Archive to check or restore. The newest one in O(folder) when empty.
    type: path
  newest_of:
    description: Without O(archive), the O(reason) that the newest archive is looked for by. Any when empty.
    type: str
    default: ''
  identity:
    description: Secret key of age, for an encrypted archive. It lies on no disk of the host.
    type: str
    default: ''
  whole:
    description: Whether a restore also brings back environment and unit as they were, not only the secrets.
    type: bool
    default: false
  any_version:
    description: Whether data of a later Open WebUI than the one in O(prefix) are taken.
    type: bool
    default: false
attributes:
  check_mode:
    description: Judges the archive, and says what would be done.
    support: full
"""

EXAMPLES = r"""
- name: Save the data
  selfhost.lmdeploy.webui_backup:
    action: create
  register: saved

- name: Judge the newest backup
  selfhost.lmdeploy.webui_backup:
    action: check
"""

RETURN = r"""
archive:
  description: Path of the archive that was made, checked or restored. Empty where there was nothing to save.
  returned: when O(action) is create, check or restore
  type: str
  sample: /var/backups/open-webui/open-webui-20261125T031500Z-0.12.4-timer.tar.gz
plain:
  description: Path of the same archive without encryption, where it is there.
  returned: when O(action) is create
  type: str
removed:
  description: Paths of older archives that were removed.
  returned: when O(action) is create
  type: list
  elements: str
manifest:
  description: What is in the archive, the files by number and bytes.
  returned: when O(action) is create, check or restore
  type: dict
  sample: {bytes: 901120, created: 20261125T031500Z, files: 12, format: 1, host: chat, reason: timer,
    release: 3c8db7a0e9b1, revision: 0bd252b206fb, version: 0.12.4}
"""

from dataclasses import fields
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import webui_backup
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.webui_backup import BackupError, Settings


def settings_of(params: dict[str, Any]) -> Settings:
    """Return the program's settings from the module's parameters."""
    given = {item.name: params[item.name] for item in fields(Settings)}
    return Settings(**{**given, "copy_to": given["copy_to"] or ""})


def foretold(settings: Settings, params: dict[str, Any]) -> dict[str, Any]:
    """Say what would be done."""
    if params["action"] == "create":
        return {"changed": webui_backup.has_data(settings), "archive": "", "plain": "", "removed": [], "manifest": {}}
    if params["action"] in ("undo", "settle"):
        return {"changed": webui_backup.is_unsettled(settings)}
    judged = webui_backup.check(
        settings,
        params["archive"],
        params["identity"],
        whole=params["whole"],
        any_version=params["any_version"],
    )
    return {"changed": params["action"] == "restore", **judged}


def act(params: dict[str, Any], *, dry: bool) -> dict[str, Any]:
    """Do it and return the result; raise BackupError with the reason."""
    settings, action = settings_of(params), params["action"]
    if action in ("check", "restore"):
        params = {**params, "archive": str(webui_backup.chosen(settings, params["archive"] or "", params["newest_of"]))}
    if dry or action == "check":
        return foretold(settings, params)
    if action == "create":
        made = webui_backup.create(settings, params["reason"], plain_kept=params["plain_kept"])
        return {"changed": bool(made["archive"]), **made}
    if action == "restore":
        restored = webui_backup.restore(
            settings,
            params["archive"],
            params["identity"],
            whole=params["whole"],
            any_version=params["any_version"],
        )
        return {"changed": True, **restored}
    return {"changed": (webui_backup.undo if action == "undo" else webui_backup.settle)(settings)}


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "action": {
                "type": "str",
                "required": True,
                "choices": ["create", "check", "restore", "undo", "settle"],
            },
            "folder": {"type": "path", "default": "/var/backups/open-webui"},
            "data_dir": {"type": "path", "default": "/var/lib/open-webui/data"},
            "config_dir": {"type": "path", "default": "/etc/open-webui"},
            "prefix": {"type": "path", "default": "/opt/miniconda3/envs/open-webui"},
            "files": {"type": "list", "elements": "path", "default": []},
            "user": {"type": "str", "default": "open-webui"},
            "keep": {"type": "int", "default": 7},
            "recipient": {"type": "str", "default": ""},
            "copy_to": {"type": "path"},
            "reason": {"type": "str", "default": "manual"},
            "plain_kept": {"type": "bool", "default": False},
            "archive": {"type": "path"},
            "newest_of": {"type": "str", "default": ""},
            "identity": {"type": "str", "default": "", "no_log": True},
            "whole": {"type": "bool", "default": False},
            "any_version": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    try:
        result = act(module.params, dry=module.check_mode)
    except BackupError as fault:
        module.fail_json(msg=str(fault))
    except OSError as fault:
        module.fail_json(msg=f"The {module.params['action']} failed: {fault}")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
