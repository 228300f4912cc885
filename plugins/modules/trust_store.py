#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Have certificate authorities of one's own in the host's trust store, or have them out of it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: trust_store
short_description: Have certificate authorities in the host's trust store
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Puts certificates where C(update-ca-certificates) of Debian and Ubuntu finds them, runs it, and makes sure that the
    bundle holds them afterwards.
  - The bundle's content decides, so an interrupted run is mended by the next.
options:
  name:
    description: Name of the set; its files are C(/usr/local/share/ca-certificates/NAME-1.crt) and so on.
    type: str
    required: true
  state:
    description: Whether the host trusts the certificates.
    type: str
    choices: [present, absent]
    default: present
  certificates:
    description: One or more certificates in PEM form. Needed for O(state=present).
    type: str
    default: ""
attributes:
  check_mode:
    description: Says whether the trust store would change.
    support: full
  diff_mode:
    description: Shows the certificates' fingerprints before and after.
    support: full
"""

EXAMPLES = r"""
- name: Trust the company's certificate authority
  selfhost.lmdeploy.trust_store:
    name: company
    certificates: "{{ lookup('ansible.builtin.file', 'company.pem') }}"
"""

RETURN = r"""
bundle:
  description: File that holds every certificate that the host trusts.
  type: str
  returned: always
files:
  description: Files of this set.
  type: list
  elements: str
  returned: always
"""

import base64
import fcntl
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.settled import (
    BUNDLE,
    CERTIFICATES,
    certificate_files,
    is_trusted,
    present_files,
    read,
    split_certificates,
)

TOOL = "update-ca-certificates"
LOCK = Path("/run/selfhost-trust-store.lock")


def fingerprints(certificates: Iterable[str]) -> str:
    """Return a line for each certificate: the SHA-256 that other tools show for it too."""
    found = ("".join(text.splitlines()[1:-1]) for text in certificates)
    return "".join(f"SHA-256 {hashlib.sha256(base64.b64decode(body)).hexdigest()}\n" for body in found)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "certificates": {"type": "str", "default": ""},
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        supports_check_mode=True,
    )
    name, text = module.params["name"], module.params["certificates"]
    certificates = split_certificates(text) if module.params["state"] == "present" else []
    if "PRIVATE KEY" in text:
        module.fail_json(msg="The certificates hold a private key: give the certificate alone, and keep the key away.")
    if module.params["state"] == "present" and not certificates:
        module.fail_json(msg="The certificates hold no block that begins with -----BEGIN CERTIFICATE-----.")
    tool = module.get_bin_path(TOOL)
    if certificates and tool is None and not module.check_mode:
        module.fail_json(msg=f"{TOOL} is missing on this host: install the package ca-certificates.")

    if not module.check_mode:
        # Held until this process ends: the tool has no lock of its own, and two at once mix up the bundle.
        lock = LOCK.open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    after, before = certificate_files(name, certificates), present_files(name)
    result: dict[str, Any] = {"bundle": str(BUNDLE), "files": [str(path) for path in after]}
    result["changed"] = before != after or not is_trusted(certificates, read(BUNDLE))
    if result["changed"]:
        title = f"{CERTIFICATES}/{name}-*.crt"
        result["diff"] = {"before": fingerprints(before.values()), "after": fingerprints(after.values())}
        result["diff"].update(before_header=title, after_header=title)
    if result["changed"] and not module.check_mode:
        for path in before.keys() - after.keys():
            path.unlink()
        for path, block in after.items():
            new = path.with_name(f".{path.name}.new")
            new.write_text(block, encoding="ascii")
            new.chmod(0o644)
            new.replace(path)
        # --fresh also drops what was removed.
        module.run_command([tool or TOOL, "--fresh"], check_rc=True)
        if not is_trusted(certificates, read(BUNDLE)):
            module.fail_json(msg=f"{TOOL} ran, but {BUNDLE} does not hold the certificates of {name}.")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
