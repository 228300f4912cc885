#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Prove that a model answers."""

from __future__ import annotations

DOCUMENTATION = r"""
module: chat_probe
short_description: Prove that a model answers
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Asks a server that speaks OpenAI's HTTP interface, from the host where the module runs. C(/health) must be good,
    C(/v1/models) must list the model, a question must be answered, and nobody may come in without the key.
  - Changes nothing. The key is read from a file on the host and never shows.
options:
  url:
    description: Base URL of the server, with or without C(/v1).
    type: str
    required: true
  model:
    description: Name of the model as clients ask for it.
    type: str
    required: true
  api_key_file:
    description: File on the host that holds the key; when empty, none is sent, and none is expected to be asked for.
    type: path
    default: ""
  question:
    description: What to ask.
    type: str
    default: What is the capital of France? Answer in one sentence.
  expected:
    description: A regular expression that the answer must match, in any case; when empty, any answer will do.
    type: str
    default: ""
  max_tokens:
    description: How long the answer may get, in tokens.
    type: int
    default: 64
  tells_health:
    description: Whether the server has a C(/health) of its own. A gateway has none; there it is the web interface's.
    type: bool
    default: true
  timeout_seconds:
    description: Seconds to wait for each answer.
    type: float
    default: 120
attributes:
  check_mode:
    description: It only asks, so it does in check mode what it always does.
    support: full
  diff_mode:
    description: Nothing changes.
    support: none
"""

EXAMPLES = r"""
- name: Ask the engine of this host
  selfhost.lmdeploy.chat_probe:
    url: http://127.0.0.1:23333
    model: InternVL3-14B-Instruct
    api_key_file: /etc/api-server/api-key
    expected: Paris
"""

RETURN = r"""
answer:
  description: What the model said.
  returned: success
  type: str
  sample: The capital of France is Paris.
models:
  description: The models that the server lists.
  returned: success
  type: list
  elements: str
tokens:
  description: Tokens of the answer.
  returned: success
  type: int
seconds:
  description: Seconds from the question to the whole answer.
  returned: success
  type: float
"""

import re
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.openai_api import (
    ApiFault,
    OpenAI,
    first_key,
    probe,
)


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "model": {"type": "str", "required": True},
            "api_key_file": {"type": "path", "default": "", "no_log": False},
            "question": {"type": "str", "default": "What is the capital of France? Answer in one sentence."},
            "expected": {"type": "str", "default": ""},
            "max_tokens": {"type": "int", "default": 64, "no_log": False},
            "tells_health": {"type": "bool", "default": True},
            "timeout_seconds": {"type": "float", "default": 120.0},
        },
        supports_check_mode=True,
    )
    given = module.params
    try:
        key = first_key(Path(given["api_key_file"]).read_text(encoding="utf-8")) if given["api_key_file"] else ""
        # Whatever happens from here on, the key is blanked in what Ansible shows.
        module.no_log_values.update({key} - {""})
        server = OpenAI(given["url"], key, given["timeout_seconds"])
        found = probe(
            server,
            given["model"],
            given["question"],
            given["max_tokens"],
            guarded=bool(key),
            tells_health=given["tells_health"],
        )
    except (ApiFault, OSError, ValueError) as fault:
        module.fail_json(msg=f"The engine at {given['url']} does not serve {given['model']}: {fault}")
    if given["expected"] and not re.search(given["expected"], found.answer, re.IGNORECASE):
        module.fail_json(
            msg=f"{given['model']} at {given['url']} answered {given['question']!r} with {found.answer!r}, "
            f"which does not match {given['expected']!r}"
        )
    module.exit_json(
        changed=False,
        answer=found.answer,
        models=found.models,
        tokens=found.tokens,
        seconds=round(found.seconds, 3),
    )


if __name__ == "__main__":
    main()
