#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Write a set of configuration files together, or none of them."""

from __future__ import annotations

DOCUMENTATION = r"""
module: config_files
short_description: Write a set of configuration files together, or none of them
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Files that belong together are judged by the programs that read them before the first one is replaced. When one is
    refused, none is written, so a host never stands between two configurations.
  - Each file is replaced in one step. A set that is there already is recognised in one call, with no program started.
  - Files belong to root. Check mode judges too, and takes a user or group that is not there yet for a change.
options:
  folders:
    description: Folders to have, in order. Those above them are made with the usual permissions.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Path of the folder.
        type: path
        required: true
      mode:
        description: Permissions, for example V(0700).
        type: str
        default: '0755'
      owner:
        description: Name of the user that it belongs to; root when empty.
        type: str
        default: ''
      group:
        description: Name of the group that it belongs to; root's when empty.
        type: str
        default: ''
  files:
    description: Files to have.
    type: list
    elements: dict
    required: true
    suboptions:
      path:
        description: Path of the file.
        type: path
        required: true
      content:
        description: What is in it. Exactly one of O(files[].content), O(files[].hidden_content) and
          O(files[].generated) is given.
        type: str
      hidden_content:
        description: The same for what may hold secrets, or is too long to read; it is kept out of logs and differences.
        type: str
      generated:
        description: Number of random letters and digits that are written when the file is not there. One that is there
          stays as it is.
        type: int
      mode:
        description: Permissions.
        type: str
        default: '0644'
      group:
        description: Name of the group that it belongs to; root's when empty. With a mode such as V(0640), a service of
          this group reads the file and can't write it.
        type: str
        default: ''
      check:
        description: Program and arguments that judge the file before any file is written. A word that is the path of a
          file of the set stands for a copy, by the same name, of what that file will be. An exit code other than 0
          refuses the set.
        type: list
        elements: str
        default: []
      check_silent:
        description: Whether each line of the program's output that names the file refuses the set as well, for programs
          that warn and end with 0.
        type: bool
        default: false
attributes:
  check_mode:
    description: Says what would be written.
    support: full
  diff_mode:
    description: Shows the difference of each file that isn't hidden.
    support: full
"""

EXAMPLES = r"""
- name: Have a unit and what it reads
  selfhost.lmdeploy.config_files:
    folders:
      - path: /etc/app
        mode: "0700"
    files:
      - path: /etc/app/key
        generated: 48
        mode: "0600"
      - path: /etc/systemd/system/app.service
        content: "{{ lookup('ansible.builtin.template', 'app.service.j2') }}"
        check: [systemd-analyze, verify, --man=no, /etc/systemd/system/app.service]
        check_silent: true
"""

RETURN = r"""
written:
  description: Paths of the files and folders that were written or got other permissions.
  returned: success
  type: list
  elements: str
refused:
  description: What was refused, with the output of the program that did.
  returned: when a file was refused
  type: list
  elements: dict
  sample: [{path: /etc/systemd/system/app.service, output: "app.service:3: Unknown key name 'Exec'"}]
"""

import secrets
import string
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.owned_files import (
    have_folders,
    read,
    write,
    wrong_rights,
)

CHECK_SECONDS = 300


class Refused(Exception):
    """The programs that read the files do not take them."""

    def __init__(self, findings: list[dict[str, str]]) -> None:
        """Keep who refused what."""
        super().__init__("; ".join(f"{finding['path']}: {finding['output']}" for finding in findings))
        self.findings = findings


def wanted_content(entry: dict[str, Any], current: str | None) -> str:
    """Return what a file is to hold; a generated secret that is there stays."""
    if entry["generated"] is None:
        return str(entry["content"] if entry["hidden_content"] is None else entry["hidden_content"])
    if current:
        return current
    letters = string.ascii_letters + string.digits
    return "".join(secrets.choice(letters) for _position in range(entry["generated"])) + "\n"


def judge(entry: dict[str, Any], copies: dict[str, Path]) -> str:
    """Return why the program that reads a file refuses it, or nothing."""
    command = [str(copies.get(word, word)) for word in entry["check"]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]} did not judge it: {error}"
    if done.returncode:
        return (done.stdout or done.stderr).strip() or f"exit code {done.returncode}"
    name = Path(entry["path"]).name
    lines = (done.stdout + done.stderr).splitlines() if entry["check_silent"] else []
    return "\n".join(line for line in lines if name in line)


def differing(files: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str | None, str]]:
    """Return the files that are not as wanted: entry, current content, wanted content."""
    found = []
    for entry in files:
        path = Path(entry["path"])
        current = read(path)
        content = wanted_content(entry, current)
        if current != content or wrong_rights(path, entry):
            found.append((entry, current, content))
    return found


def judge_all(changes: list[tuple[dict[str, Any], str | None, str]]) -> None:
    """Have every new content judged by the program that reads it; raise Refused with all that was refused."""
    with tempfile.TemporaryDirectory(prefix="config_files.") as top:
        copies = {}
        for number, (entry, _current, content) in enumerate(changes):
            copy = Path(top, str(number), Path(entry["path"]).name)
            copy.parent.mkdir()
            copy.write_text(content, encoding="utf-8")
            copies[entry["path"]] = copy
        judged = [entry for entry, current, content in changes if entry["check"] and current != content]
        findings = [{"path": entry["path"], "output": judge(entry, copies)} for entry in judged]
    refused = [finding for finding in findings if finding["output"]]
    if refused:
        raise Refused(refused)


def converge(params: dict[str, Any], *, dry: bool) -> dict[str, Any]:
    """Bring the set to what is wanted, or raise Refused with nothing written; with ``dry`` only judge and tell."""
    changes = differing(params["files"])
    judge_all(changes)
    written = have_folders(params["folders"], dry=dry)
    diffs = []
    for entry, current, content in changes:
        path = Path(entry["path"])
        written.append(str(path))
        if not dry:
            write(path, content, entry)
        shown = entry["content"] is not None
        before, after = (current or "", content) if shown else ("(hidden)\n" if current else "", "(hidden, other)\n")
        diffs.append({"before_header": str(path), "after_header": str(path), "before": before, "after": after})
    return {"changed": bool(written), "written": written, "diff": diffs}


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "folders": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "path": {"type": "path", "required": True},
                    "mode": {"type": "str", "default": "0755"},
                    "owner": {"type": "str", "default": ""},
                    "group": {"type": "str", "default": ""},
                },
            },
            "files": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "path": {"type": "path", "required": True},
                    "content": {"type": "str"},
                    "hidden_content": {"type": "str", "no_log": True},
                    "generated": {"type": "int"},
                    "mode": {"type": "str", "default": "0644"},
                    "group": {"type": "str", "default": ""},
                    "check": {"type": "list", "elements": "str", "default": []},
                    "check_silent": {"type": "bool", "default": False},
                },
                "mutually_exclusive": [["content", "hidden_content", "generated"]],
                "required_one_of": [["content", "hidden_content", "generated"]],
            },
        },
        supports_check_mode=True,
    )
    try:
        result = converge(module.params, dry=module.check_mode)
    except Refused as refusal:
        module.fail_json(msg=f"Nothing was written, since this was refused: {refusal}", refused=refusal.findings)
    except OSError as fault:
        module.fail_json(msg=f"The files can't be written: {fault}")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
