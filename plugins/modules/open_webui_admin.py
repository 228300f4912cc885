#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Keep Open WebUI's first admin account as the variables say."""

from __future__ import annotations

DOCUMENTATION = r"""
module: open_webui_admin
short_description: Keep Open WebUI's admin account as the variables say
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Open WebUI reads an admin's address, name and password from its environment only while it has no users. This module
    carries later changes into the account, through Open WebUI's own API.
  - What is known to work stands in O(password_path) and O(account_path), both readable by root alone. Where they equal
    what is wanted nothing is asked, so a converged host costs no sign-in.
  - Someone who changes the password in the browser keeps it, until another one is given here.
options:
  url:
    description: Address of Open WebUI, without a path.
    type: str
    required: true
  email:
    description: Address that the admin signs in with.
    type: str
    required: true
  name:
    description: Name that is shown.
    type: str
    required: true
  password:
    description: Wanted password; the one in O(password_path) when empty.
    type: str
    default: ''
  password_path:
    description: File with the password that is known to work, on its only line.
    type: path
    required: true
  account_path:
    description: File with the address and name that are known to be set, as JSON.
    type: path
    required: true
  timeout_seconds:
    description: Seconds to wait for each answer.
    type: int
    default: 30
attributes:
  check_mode:
    description: Says whether the account would be proven or changed; asks nothing.
    support: full
  diff_mode:
    description: Shows address and name before and after, never a password.
    support: full
"""

EXAMPLES = r"""
- name: Have the admin's account
  selfhost.lmdeploy.open_webui_admin:
    url: http://127.0.0.1:8080
    email: admin@localhost
    name: Admin
    password_path: /etc/open-webui/admin-password
    account_path: /etc/open-webui/admin.json
  no_log: true
"""

RETURN = r"""
changed_fields:
  description: What was changed in the account; empty for a new account that already is as wanted.
  returned: success
  type: list
  elements: str
  sample: [password]
"""

import json
from itertools import product
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.private_files import PrivateFiles
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.webui_api import WebuiClient, WebuiError


class AdminError(Exception):
    """The account can't be brought to what is wanted; the message says why and what to do."""


def known_account(files: PrivateFiles, path: Path) -> dict[str, str]:
    """Return address and name as they were last set, or nothing where that is not known."""
    try:
        account = json.loads(files.read(path) or "{}")
    except ValueError:
        return {}
    return account if isinstance(account, dict) else {}


def signed_in(client: WebuiClient, emails: list[str], passwords: list[str]) -> tuple[dict[str, Any], str]:
    """Return the account and its password, trying what is wanted first and what was known last."""
    refusal = ""
    for email, password in product(emails, passwords):
        try:
            return client.sign_in(email, password), password
        except WebuiError as fault:
            refusal = refusal or str(fault)
    raise AdminError(
        f"{refusal}. Neither the wanted nor the last known password fits, so the account was changed in the browser. "
        "Set open_webui_admin_email and open_webui_admin_password to what it has now"
    )


def unique(*values: str | None) -> list[str]:
    """Return the values that are there, each once, in order."""
    return list(dict.fromkeys(value for value in values if value))


def converge(params: dict[str, Any], client: WebuiClient, *, dry: bool) -> dict[str, Any]:
    """Bring the account to what is wanted and return what changed; with ``dry`` only say so."""
    files = PrivateFiles(dry=dry)
    password_path, account_path = Path(params["password_path"]), Path(params["account_path"])
    known_password = (files.read(password_path) or "").strip()
    known = known_account(files, account_path)
    password = params["password"] or known_password
    # Open WebUI keeps addresses in small letters.
    wanted = {"email": params["email"].lower(), "name": params["name"]}
    changed: list[str] = []
    if (known, known_password) != (wanted, password):
        if not dry:
            emails = unique(wanted["email"], known.get("email"))
            account, used = signed_in(client, emails, unique(password, known_password))
            if account["role"] != "admin":
                raise AdminError(f"{account['email']} is no admin (role {account['role']}): give another address")
            fields = {key: value for key, value in wanted.items() if account[key] != value}
            if used != password:
                fields["password"] = password
            if fields:
                client.change_account(str(account["id"]), fields)
            changed = sorted(fields)
        files.have(password_path, password + "\n")
        files.have(account_path, json.dumps(wanted, sort_keys=True) + "\n")
    return {
        "changed": bool(files.changed),
        "changed_fields": changed,
        "diff": {
            "before": json.dumps(known, sort_keys=True) + "\n",
            "after": json.dumps(wanted, sort_keys=True) + "\n",
        },
    }


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "email": {"type": "str", "required": True},
            "name": {"type": "str", "required": True},
            "password": {"type": "str", "default": "", "no_log": True},
            # A path is no secret; what it holds never leaves the host.
            "password_path": {"type": "path", "required": True, "no_log": False},
            "account_path": {"type": "path", "required": True},
            "timeout_seconds": {"type": "int", "default": 30},
        },
        supports_check_mode=True,
    )
    client = WebuiClient(module.params["url"], module.params["timeout_seconds"])
    try:
        result = converge(module.params, client, dry=module.check_mode)
    except (AdminError, WebuiError, OSError) as fault:
        module.fail_json(msg=f"Open WebUI's admin account is not as wanted. {fault}.")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
