#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Write an environment file for a systemd unit, with secrets that never leave the host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: environment_file
short_description: Write an environment file for a systemd unit, with secrets made on the host
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Writes names and values in the syntax of C(EnvironmentFile=), so that systemd reads back exactly what was given,
    line breaks, quotes, dollars and backslashes included.
  - A secret with a file of its own is generated once on the host, or taken from O(secret_files[].value). It stands in
    that file and in the environment, and is not returned.
  - All files are owned by the user that runs the module, readable by nobody else, and are replaced in one step.
options:
  path:
    description: The environment file. Its folder is made, and closed to others, when it is missing.
    type: path
    required: true
  variables:
    description: Names and values of variables, as text.
    type: dict
    default: {}
  secrets:
    description: Names and values of variables that must not be shown.
    type: dict
    default: {}
  secret_files:
    description: Variables whose values stand in files of their own as well.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the variable.
        type: str
        required: true
      path:
        description: File with the value on its only line.
        type: path
        required: true
      value:
        description: The value. When empty, the file's value is used, or one is generated where there is no file.
        type: str
        default: ''
      bytes:
        description: Random bytes in a generated value; the text has about four characters for three bytes.
        type: int
        default: 32
      replaced:
        description:
          - Whether a given value replaces another one in the file.
          - When false the file keeps its value, and RV(differing) names the variable. This is for a value that a
            running service must accept first.
        type: bool
        default: true
attributes:
  check_mode:
    description: Says which files and variables would change.
    support: full
  diff_mode:
    description: Shows the names of variables that change, never a value.
    support: full
"""

EXAMPLES = r"""
- name: Write the environment of a service
  selfhost.lmdeploy.environment_file:
    path: /etc/open-webui/open-webui.env
    variables:
      DATA_DIR: /var/lib/open-webui/data
      DEFAULT_MODEL_PARAMS: '{"function_calling": "legacy"}'
    secrets:
      OPENAI_API_KEYS: "{{ key }}"
    secret_files:
      - name: WEBUI_SECRET_KEY
        path: /etc/open-webui/secret-key
  no_log: true
"""

RETURN = r"""
altered_variables:
  description: Names of variables that were added, removed or got another value.
  returned: success
  type: list
  elements: str
  sample: [OPENAI_API_BASE_URLS]
altered_files:
  description: Files whose content or mode changed.
  returned: success
  type: list
  elements: str
  sample: [/etc/open-webui/open-webui.env]
differing:
  description: Names of variables with O(secret_files[].replaced=false) whose given value is not the one in the file.
  returned: success
  type: list
  elements: str
  sample: []
"""

import secrets
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import environment_file
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.private_files import PrivateFiles

COMMENT = "Written by Ansible, read by systemd: EnvironmentFile= in systemd.exec(5). Changes here are overwritten."
# Stands for a value that check mode does not generate.
NOT_YET = "(generated)"


def secret_of(files: PrivateFiles, entry: dict[str, Any]) -> tuple[str, bool]:
    """Return the value that a secret has from now on, and whether a given value is not the file's."""
    path = Path(entry["path"])
    stored = (files.read(path) or "").strip()
    given: str = entry["value"]
    if given and stored and given != stored and not entry["replaced"]:
        files.have(path, stored + "\n")
        return given, True
    value = given or stored or (NOT_YET if files.dry else secrets.token_urlsafe(entry["bytes"]))
    files.have(path, value + "\n")
    return value, False


def converge(params: dict[str, Any], *, dry: bool) -> dict[str, Any]:
    """Bring the files to the wanted state and return what changed; with ``dry`` only say so."""
    path = Path(params["path"])
    files = PrivateFiles(dry=dry)
    files.have_folder(path.parent)
    values: dict[str, str] = {**params["variables"], **params["secrets"]}
    differing = []
    for entry in params["secret_files"]:
        values[entry["name"]], differs = secret_of(files, entry)
        if differs:
            differing.append(entry["name"])
    before = environment_file.parse(files.read(path) or "")
    files.have(path, environment_file.render(values, COMMENT))
    names = sorted(name for name in {*before, *values} if before.get(name) != values.get(name))
    return {
        "changed": bool(files.changed),
        "altered_variables": names,
        "altered_files": files.changed,
        "differing": differing,
        "diff": {
            "before_header": str(path),
            "after_header": str(path),
            "before": "".join(f"{name}\n" for name in names if name in before),
            "after": "".join(f"{name} (another value)\n" for name in names if name in values),
        },
    }


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "variables": {"type": "dict", "default": {}},
            "secrets": {"type": "dict", "default": {}, "no_log": True},
            "secret_files": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "no_log": False,
                "options": {
                    "name": {"type": "str", "required": True},
                    "path": {"type": "path", "required": True},
                    "value": {"type": "str", "default": "", "no_log": True},
                    "bytes": {"type": "int", "default": 32},
                    "replaced": {"type": "bool", "default": True},
                },
            },
        },
        supports_check_mode=True,
    )
    try:
        result = converge(module.params, dry=module.check_mode)
    except (OSError, environment_file.EnvironmentFileError) as fault:
        module.fail_json(msg=f"The environment file {module.params['path']} can't be written: {fault}")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
