#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Ask a model one question through Open WebUI, as its administrator, on the host that it runs on."""

from __future__ import annotations

DOCUMENTATION = r"""
module: webui_chat
short_description: Ask a model one question through Open WebUI
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Signs in, lists the models, asks one and returns its answer, which is the whole way of a browser's question.
  - Address and password are read from the files that the role open_webui left on the host, so neither travels. The
    question leaves no chat behind.
options:
  url:
    description: Address of Open WebUI as the host itself reaches it.
    type: str
    default: http://127.0.0.1:8080
  account_file:
    description: File on the host with the account that signs in, as JSON with C(email).
    type: path
    default: /etc/open-webui/admin.json
  password_file:
    description: File on the host that holds the password on its first line.
    type: path
    default: /etc/open-webui/admin-password
  model:
    description: Name of the model to ask; empty takes the first one listed.
    type: str
    default: ''
  question:
    description: What to ask.
    type: str
    default: What is the capital of France? Answer in one sentence.
  expected:
    description: Text that the answer must hold, whatever its case; empty takes any answer that is not empty.
    type: str
    default: ''
  max_tokens:
    description: Upper limit for the answer's length in tokens.
    type: int
    default: 64
  timeout_seconds:
    description: Seconds that each of the three requests may take.
    type: float
    default: 120.0
attributes:
  check_mode:
    support: full
    description: Asks in check mode too, since nothing on the host changes.
"""

EXAMPLES = r"""
- name: Ask the model as a person would
  selfhost.lmdeploy.webui_chat:
    question: What is the capital of France? Answer in one sentence.
    expected: Paris
  register: smoke
"""

RETURN = r"""
question:
  description: What was asked.
  returned: success
  type: str
  sample: What is the capital of France? Answer in one sentence.
answer:
  description: The model's words, without white space around them.
  returned: success
  type: str
  sample: The capital of France is Paris.
model:
  description: Name of the model that answered.
  returned: success
  type: str
  sample: SmolLM2-135M-Instruct
models:
  description: Names of all models that the user sees.
  returned: success
  type: list
  elements: str
  sample: [SmolLM2-135M-Instruct]
seconds:
  description: Time from question to answer, signing in not counted.
  returned: success
  type: float
  sample: 0.8
"""

import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.webui_api import WebuiClient, WebuiError


def text_of(path: str) -> str:
    """Return a file's text; raise WebuiError where it is missing or empty."""
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except OSError as failure:
        raise WebuiError(f"{path} can't be read ({failure.strerror}): run site.yml on this host") from None
    if not text:
        raise WebuiError(f"{path} is empty: run site.yml on this host")
    return text


def account(account_file: str, password_file: str) -> tuple[str, str]:
    """Return address and password; raise WebuiError where one is missing."""
    try:
        return str(json.loads(text_of(account_file))["email"]), text_of(password_file).splitlines()[0]
    except (ValueError, KeyError, TypeError):
        raise WebuiError(f"{account_file} is no account of the role open_webui: run site.yml on this host") from None


def chosen(models: list[str], wanted: str) -> str:
    """Return the model to ask; raise WebuiError where it is not among those listed."""
    if not models:
        raise WebuiError(
            "Open WebUI lists no model: its engine does not answer or refuses the key. "
            "See open_webui_connections, and on the model server: systemctl status 'api-server*'"
        )
    if wanted and wanted not in models:
        raise WebuiError(f"Open WebUI does not list the model {wanted}; it lists {', '.join(models)}")
    return wanted or models[0]


def chat(given: dict[str, Any]) -> dict[str, Any]:
    """Return question, answer, models and seconds for the module's parameters; raise WebuiError with the reason."""
    if urlsplit(given["url"]).scheme not in ("http", "https"):
        raise WebuiError(f"url is {given['url']!r}; it starts with http:// or https://")
    client = WebuiClient(given["url"], given["timeout_seconds"])
    client.sign_in(*account(given["account_file"], given["password_file"]))
    models = client.models()
    model = chosen(models, given["model"])
    began = time.monotonic()
    answer = client.ask(model, given["question"], given["max_tokens"])
    seconds = round(time.monotonic() - began, 2)
    if not answer or given["expected"].lower() not in answer.lower():
        wanted = repr(given["expected"]) if given["expected"] else "anything"
        raise WebuiError(
            f"{model} was asked {given['question']!r} and answered {answer!r}, in which {wanted} was expected"
        )
    return {"question": given["question"], "answer": answer, "model": model, "models": models, "seconds": seconds}


def main() -> None:
    """Ask, and return the answer or the reason that there is none."""
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "default": "http://127.0.0.1:8080"},
            "account_file": {"type": "path", "default": "/etc/open-webui/admin.json"},
            # A path is no secret; what it holds never leaves the host.
            "password_file": {"type": "path", "default": "/etc/open-webui/admin-password", "no_log": False},
            "model": {"type": "str", "default": ""},
            "question": {"type": "str", "default": "What is the capital of France? Answer in one sentence."},
            "expected": {"type": "str", "default": ""},
            "max_tokens": {"type": "int", "default": 64, "no_log": False},
            "timeout_seconds": {"type": "float", "default": 120.0},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(changed=False, **chat(module.params))
    except WebuiError as fault:
        module.fail_json(msg=f"{fault}. Logs: journalctl -u open-webui -n 50")


if __name__ == "__main__":
    main()
