#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Measure how fast an OpenAI-compatible server answers, with more and more clients."""

from __future__ import annotations

DOCUMENTATION = r"""
module: engine_bench
short_description: Measure how fast an OpenAI-compatible server answers
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Asks streamed questions, all different and the same ones in every run, with a number of clients at once that each
    ask again as soon as they have their answer. Every answer that failed, was cut or is empty is counted beside the
    good ones.
  - Runs on the host of the server, so a server on loopback is measured without a tunnel and its key stays where it is.
options:
  url:
    description: Base address of the server.
    type: str
    required: true
  model:
    description: Name of the model.
    type: str
    required: true
  api_key_file:
    description: File on the host whose first line is the key; none is sent when empty.
    type: path
  kinds:
    description: What is asked, V(text) or V(image), one after the other.
    type: list
    elements: str
    choices: [text, image]
    default: [text]
  clients:
    description: Numbers of clients, one after the other.
    type: list
    elements: int
    default: [1, 2, 4, 8]
  requests:
    description: Questions of each client.
    type: int
    default: 4
  seconds:
    description: Seconds after which no further question is asked at a number of clients.
    type: float
    default: 60.0
  max_tokens:
    description: Tokens of each answer. The server is asked to make that many, so that runs can be compared.
    type: int
    default: 64
  timeout_seconds:
    description: Seconds that an answer may take.
    type: float
    default: 120.0
attributes:
  check_mode:
    description: Asks nothing.
    support: full
"""

EXAMPLES = r"""
- name: Measure the engine of this host
  selfhost.lmdeploy.engine_bench:
    url: http://127.0.0.1:23333
    model: InternVL3-14B-Instruct
    api_key_file: /etc/api-server/api-key
    kinds: [text, image]
    clients: [1, 8, 32]
"""

RETURN = r"""
levels:
  description: One entry for each kind and number of clients.
  returned: success
  type: list
  elements: dict
  sample:
    - kind: text
      clients: 1
      url: http://127.0.0.1:23333
      model: InternVL3-14B-Instruct
      requests: 4
      good: 4
      failed: 0
      cut: 0
      wrong: 0
      tokens_per_second: 88.1
      requests_per_second: 1.38
      first_token_seconds: {p50: 0.04, p90: 0.05, p99: 0.05, max: 0.05}
      seconds: {p50: 0.72, p90: 0.73, p99: 0.73, max: 0.73}
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import load_client
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.bench import KINDS, contents
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.openai_api import first_key
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.progress import told

WARM_UP_TOKENS = 8


def measure(params: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Return the figures of every kind and number of clients."""
    levels: list[dict[str, Any]] = []
    answers: list[load_client.Result] = []
    due = len(params["kinds"]) * sum(params["clients"]) * params["requests"]
    with told("engine_bench", lambda: f"{len(answers)} of {due} answers, {len(levels)} levels done"):
        measure_levels(params, key, levels, answers.append)
    return levels


def measure_levels(
    params: dict[str, Any], key: str, levels: list[dict[str, Any]], tell: Callable[[load_client.Result], None]
) -> None:
    """Add the figures of every kind and number of clients to ``levels``; ``tell`` hears of each answer."""
    for kind in params["kinds"]:
        most = max(params["clients"]) * params["requests"]
        asked = [load_client.Question(content, max_tokens=params["max_tokens"]) for content in contents(kind, most)]
        # The first question after a start costs more, and is nobody's figure.
        first = [load_client.Question(contents(kind, 1)[0], max_tokens=WARM_UP_TOKENS)]
        load_client.run(plan(params, key, first, clients=1, requests=1))
        for clients in params["clients"]:
            asks = plan(params, key, asked, clients=clients, requests=clients * params["requests"])
            results = load_client.run(asks, tell)
            about = {"kind": kind, "clients": clients, "url": params["url"], "model": params["model"]}
            levels.append({**about, **load_client.summary(results)})


def plan(
    params: dict[str, Any], key: str, questions: list[load_client.Question], *, clients: int, requests: int
) -> load_client.Plan:
    """Return what is sent at one number of clients."""
    return load_client.Plan(
        url=params["url"],
        model=params["model"],
        key=key,
        questions=questions,
        concurrency=clients,
        requests=requests,
        seconds=params["seconds"],
        timeout_seconds=params["timeout_seconds"],
        # Both engines know it: an answer that ends early would make its run look quicker.
        body={"ignore_eos": True},
    )


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "model": {"type": "str", "required": True},
            "api_key_file": {"type": "path"},
            "kinds": {"type": "list", "elements": "str", "choices": list(KINDS), "default": ["text"]},
            "clients": {"type": "list", "elements": "int", "default": [1, 2, 4, 8]},
            "requests": {"type": "int", "default": 4},
            "seconds": {"type": "float", "default": 60.0},
            "max_tokens": {"type": "int", "default": 64, "no_log": False},
            "timeout_seconds": {"type": "float", "default": 120.0},
        },
        supports_check_mode=True,
    )
    params = module.params
    few = [name for name in ("clients", "kinds") if not params[name]]
    few += [name for name in ("requests", "max_tokens") if params[name] < 1]
    few += ["clients"] if any(clients < 1 for clients in params["clients"]) else []
    if few:
        module.fail_json(msg=f"{few[0]} is {params[few[0]]}: nothing would be asked; at least 1 is needed.")
    if module.check_mode:
        module.exit_json(changed=False, levels=[])
    try:
        key = first_key(Path(params["api_key_file"]).read_text(encoding="utf-8")) if params["api_key_file"] else ""
        levels = measure(params, key)
    except (OSError, ValueError) as fault:
        module.fail_json(msg=f"{params['url']} can't be measured: {fault}")
    module.exit_json(changed=False, levels=levels)


if __name__ == "__main__":
    main()
