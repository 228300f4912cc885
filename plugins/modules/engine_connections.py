#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Tell a web host how to reach the engines of this host, and with which key."""

from __future__ import annotations

DOCUMENTATION = r"""
module: engine_connections
short_description: Tell how the engines of this host are reached
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Reads what the role api_server left on the host; returns one connection for each engine, as Open WebUI takes them.
  - The result holds the engines' key, so the task that uses it wants C(no_log).
options:
  address:
    description:
      - Address of this host as the web host reaches it. Empty where both are one host. An engine that listens on one
        address of its own is reached there whatever stands here.
    type: str
    default: ''
  config_dir:
    description: Folder that the role api_server writes to.
    type: path
    default: /etc/api-server
attributes:
  check_mode:
    support: full
    description: Reads only. A host without an engine is no fault in check mode, since it would have one by then.
"""

EXAMPLES = r"""
- name: Read where the engines of another host listen
  selfhost.lmdeploy.engine_connections:
    address: 192.0.2.10
  delegate_to: gpu-1
  register: engines
  no_log: true
"""

RETURN = r"""
connections:
  description: One entry for each engine of the host.
  returned: success
  type: list
  elements: dict
  contains:
    url:
      description: Base address with C(/v1), without a slash at its end.
      type: str
      sample: http://192.0.2.10:23333/v1
    api_key:
      description: Key of the engine.
      type: str
engines:
  description: The same engines for people, without a key.
  returned: success
  type: list
  elements: dict
  contains:
    engine:
      description: C(lmdeploy) or C(llama_cpp).
      type: str
    model:
      description: Name of the model that it serves.
      type: str
    url:
      description: As in RV(connections).
      type: str
"""

import json
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.engine import is_loopback, url
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.openai_api import first_key

KEY_FILE = "api-key"


def engines(folder: Path, address: str) -> list[dict[str, str]]:
    """Return engine, model and url of each instance file of the folder, in the order of their names."""
    found = []
    for path in sorted(folder.glob("*.json")):
        instance = json.loads(path.read_text(encoding="utf-8"))
        if instance.get("rank"):
            # A further host of a model over several: clients ask the first.
            continue
        # The file has the address by which the host itself finds the engine.
        host = address if address and is_loopback(instance["host"]) else instance["host"]
        base = f"{url(host, instance['port'])}/v1"
        found.append({"engine": instance["engine"], "model": instance["model_name"], "url": base})
    return found


def learn(folder: Path, address: str) -> dict[str, list[dict[str, str]]]:
    """Return the connections and the engines; none on a host without a key."""
    try:
        key = first_key((folder / KEY_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"connections": [], "engines": []}
    found = engines(folder, address)
    return {"connections": [{"url": engine["url"], "api_key": key} for engine in found], "engines": found}


def only_computes(folder: Path, node: Path = Path("/etc/ray/node.json")) -> bool:
    """Tell whether this host computes for the first host of a model over several, and is not to be asked itself."""
    try:
        ranks = [json.loads(path.read_text(encoding="utf-8")).get("rank") for path in folder.glob("*.json")]
        return any(ranks) or (node.exists() and not json.loads(node.read_text(encoding="utf-8"))["is_head"])
    except (OSError, ValueError, KeyError):
        return False


def main() -> None:
    """Return the connections, or say that there is no engine."""
    module = AnsibleModule(
        argument_spec={
            "address": {"type": "str", "default": ""},
            "config_dir": {"type": "path", "default": "/etc/api-server"},
        },
        supports_check_mode=True,
    )
    folder = module.params["config_dir"]
    try:
        found = learn(Path(folder), module.params["address"])
    except (OSError, ValueError, KeyError) as fault:
        module.fail_json(msg=f"{folder} is not as the role api_server leaves it ({fault!r}): run site.yml on this host")
    if not found["engines"] and not module.check_mode and not only_computes(Path(folder)):
        module.fail_json(
            msg=f"{folder} names no engine: run site.yml on this model server first, or give open_webui_connections"
        )
    module.exit_json(changed=False, **found)


if __name__ == "__main__":
    main()
