#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Have the certificate and the clients' keys of a gateway."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gateway_secrets
short_description: Have the certificate and the clients' keys of a gateway
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Makes a small certificate authority and a server certificate of it, or takes a certificate that is given. A server
    certificate is made anew when its names change or thirty days before it ends; the authority stays, so clients that
    trust it go on.
  - Writes the digests of the clients' keys as HAProxy reads them, and one key that root can hand out. A key is
    generated when none is given, and stays.
  - In O(dir) lie V(ca.crt), V(gateway.pem) and V(keys.map); in its folder V(private), which root alone enters,
    V(ca.key) and V(api-key).
options:
  dir:
    description: Folder of the gateway.
    type: path
    required: true
  group:
    description: Group of the service, which reads certificate and digests.
    type: str
    default: haproxy
  names:
    description: Names and addresses that the certificate is good for; the first one is its subject.
    type: list
    elements: str
    required: true
  certificate:
    description: A certificate with its chain (PEM); when empty one is made.
    type: str
    default: ''
  private_key:
    description: Key of O(certificate) (PEM).
    type: str
    default: ''
  ca_certificate:
    description: Certificate of the authority (PEM); when empty one is made. Not used where O(certificate) is given.
    type: str
    default: ''
  ca_key:
    description: Key of O(ca_certificate) (PEM).
    type: str
    default: ''
  api_keys:
    description: Keys that clients use, each with a name for the log. When empty one called C(default) is generated.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the key.
        type: str
        required: true
      key:
        description: The key.
        type: str
        required: true
  renewed_days:
    description: Days before its end when a made certificate is replaced.
    type: int
    default: 30
attributes:
  check_mode:
    description: Says what would be made.
    support: full
  diff_mode:
    description: Nothing that it writes may be shown.
    support: none
"""

EXAMPLES = r"""
- name: Have certificate and keys
  selfhost.lmdeploy.gateway_secrets:
    dir: /etc/gateway
    names: [chat.example.org, 192.0.2.10]
  no_log: true
"""

RETURN = r"""
changes:
  description: What was made, and why.
  returned: success
  type: list
  elements: str
  sample: ["certificate: it ends within 30 days"]
"""

import hashlib
import secrets
import string
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import gateway_tls as tls
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.owned_files import (
    have_folders,
    read,
    write,
    wrong_rights,
)

KEY_LETTERS = 48


def certificates(params: dict[str, Any], changes: list[str]) -> dict[str, str]:
    """Return the files of the certificate by their names; what need not change is as it is."""
    if params["certificate"]:
        text = tls.given(params["certificate"], params["private_key"])
        if text != read(Path(params["dir"], "gateway.pem")):
            changes.append("certificate: another one is given")
        return {"gateway.pem": text}
    folder = Path(params["dir"])
    key, authority = read(folder / "private/ca.key"), read(folder / "ca.crt")
    if params["ca_certificate"]:
        given_key, given = f"{params['ca_key'].strip()}\n", f"{params['ca_certificate'].strip()}\n"
        if given != authority:
            tls.judge_authority(given, given_key)
            changes.append("authority: another one is given, so clients must trust it anew")
        key, authority = given_key, given
    elif key is None or authority is None or not tls.lasts(authority, tls.LONGEST_DAYS):
        changes.append("authority: it is new, so clients must trust it anew")
        key, authority = tls.new_authority(f"{params['names'][0]} gateway CA")
    pem = read(folder / "gateway.pem")
    reason = tls.why_not(pem, authority, params["names"], params["renewed_days"])
    if reason or pem is None:
        changes.append(f"certificate: {reason}")
        server_key, certificate = tls.sign(key, authority, params["names"])
        pem = certificate + server_key
    return {"ca.crt": authority, "gateway.pem": pem, "private/ca.key": key}


def digests(keys: list[dict[str, str]]) -> str:
    """Return the map that HAProxy reads: a line for each key, its digest and its name."""
    return "".join(f"{hashlib.sha256(e['key'].encode()).hexdigest().upper()} {e['name']}\n" for e in keys)


def api_keys(params: dict[str, Any], changes: list[str]) -> dict[str, str]:
    """Return the files of the clients' keys by their names."""
    keys = params["api_keys"]
    if not keys:
        found = (read(Path(params["dir"], "private/api-key")) or "").strip()
        letters = string.ascii_letters + string.digits
        keys = [{"name": "default", "key": found or "".join(secrets.choice(letters) for _at in range(KEY_LETTERS))}]
    text = digests(keys)
    if text != read(Path(params["dir"], "keys.map")):
        changes.append(f"keys: {', '.join(entry['name'] for entry in keys)}")
    return {"keys.map": text, "private/api-key": keys[0]["key"] + "\n"}


# Who reads what: the service's group, or root alone.
MODES = {
    "ca.crt": "0644",
    "gateway.pem": "0640",
    "keys.map": "0640",
    "private/ca.key": "0600",
    "private/api-key": "0600",
}


def converge(params: dict[str, Any], *, dry: bool) -> dict[str, Any]:
    """Bring the files to what is wanted, or with ``dry`` only tell."""
    changes: list[str] = []
    files = {**certificates(params, changes), **api_keys(params, changes)}
    folders = [
        {"path": params["dir"], "mode": "0750", "group": params["group"]},
        {"path": f"{params['dir']}/private", "mode": "0700", "group": ""},
    ]
    written = have_folders(folders, dry=dry)
    for name, text in files.items():
        path = Path(params["dir"], name)
        entry = {"mode": MODES[name], "group": "" if name.startswith("private/") else params["group"]}
        if read(path) != text or wrong_rights(path, entry):
            written.append(str(path))
            if not dry:
                write(path, text, entry)
    return {"changed": bool(written), "changes": changes, "written": written}


def main() -> None:
    """Run as an Ansible module."""
    entries = {"name": {"type": "str", "required": True}, "key": {"type": "str", "required": True, "no_log": True}}
    module = AnsibleModule(
        argument_spec={
            "dir": {"type": "path", "required": True},
            "group": {"type": "str", "default": "haproxy"},
            "names": {"type": "list", "elements": "str", "required": True},
            "certificate": {"type": "str", "default": ""},
            "private_key": {"type": "str", "default": "", "no_log": True},
            "ca_certificate": {"type": "str", "default": ""},
            "ca_key": {"type": "str", "default": "", "no_log": True},
            "api_keys": {"type": "list", "elements": "dict", "default": [], "options": entries, "no_log": False},
            "renewed_days": {"type": "int", "default": 30},
        },
        supports_check_mode=True,
    )
    try:
        result = converge(module.params, dry=module.check_mode)
    except (tls.TlsFault, OSError) as fault:
        module.fail_json(msg=f"{module.params['dir']}: {fault}")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
