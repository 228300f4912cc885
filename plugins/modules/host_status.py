#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Tell what this collection runs on a host: services, versions, releases, models, health."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_status
short_description: Tell what this collection runs on a host
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Reads what the roles api_server, gateway and open_webui left on the host, asks systemd for each unit and
    each service for its health. Needs no variable of these roles, changes nothing, and returns no secret.
options:
  timeout_seconds:
    description: Seconds that a service has for its health answer.
    type: float
    default: 3.0
attributes:
  check_mode:
    support: full
    description: It only reads.
"""

EXAMPLES = r"""
- name: Learn what runs here
  selfhost.lmdeploy.host_status:
  register: status
"""

RETURN = r"""
services:
  description: One entry for each unit of the collection; none on a host without any.
  returned: always
  type: list
  elements: dict
  contains:
    unit:
      description: Name of the systemd unit.
      type: str
      sample: api-server.service
    program:
      description: What runs; C(lmdeploy), C(llama_cpp), C(haproxy) or C(open_webui).
      type: str
    version:
      description: Version of the program, empty where its environment is gone.
      type: str
      sample: 0.18.0
    release:
      description: ID of the engine's release; of a program without releases of its own, that of its environment.
      type: str
      sample: 3f1c5a7be210
    libraries:
      description: The CUDA libraries that LMDeploy loads, with the packages that bring them, as proven at installation.
      type: dict
      sample: {libnccl.so.2: nvidia-nccl-cu12 2.27.5}
    gpus:
      description: GPUs that an engine was given, by nvidia-smi's numbers; empty where it has the only one.
      type: str
      sample: 0,1
    environment:
      description: ID of the environment's release.
      type: str
      sample: 0f3c5a7e9b1d
    pending:
      description: ID of a release whose switch is not finished; empty otherwise.
      type: str
    model:
      description: Name of the model that an engine serves; of a gateway, all names with commas between them.
      type: str
    model_path:
      description: Where the weights are.
      type: str
    url:
      description: Where the host itself reaches the service; of a gateway, its door without TLS.
      type: str
      sample: http://127.0.0.1:23333
    state:
      description: systemd's word for the unit.
      type: str
      sample: active
    since:
      description: When it became active, as systemd says it.
      type: str
    restarts:
      description: How often systemd started it again by itself since then.
      type: int
    enabled:
      description: Whether it starts at boot.
      type: bool
    healthy:
      description: Whether its health page answers with 200; of a gateway, whether HAProxy answers and has a good engine
        for every model.
      type: bool
    engines:
      description: Of a gateway, the engines behind it, as M(selfhost.lmdeploy.gateway_server) tells them.
      type: list
      elements: dict
    gate:
      description: The last that an engine's launcher said about its answers, and the last gate of its release; of a
        gateway, its engines for people.
      type: str
      sample: "Serving SmolLM2-135M-Instruct: ready after 1.2 s; gate passed 2026-11-25T04:00:00+00:00: ready in 1.9 s,
        answer in 0.2 s, 101 tokens/s"
"""

import json
import re
import shlex
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.engine import url
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.engine_releases import Releases, gate_text
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.gateway import TWIN
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.haproxy import SOCKET, SocketFault, ask, servers

if TYPE_CHECKING:
    from collections.abc import Callable

UNITS = Path("/etc/systemd/system")
ENGINES = Path("/etc/api-server")
INTERFACE = "open-webui.service"
GATEWAY = "haproxy.service"
# What the role gateway leaves; another HAProxy is none of ours.
GATEWAY_CONFIG = Path("/etc/gateway/haproxy.cfg")
# What the module lmdeploy_release leaves in a release.
PROOF = "lmdeploy.json"
# Program -> the Python package whose version is the program's.
PACKAGES = {"lmdeploy": "lmdeploy", "llama_cpp": "xllamacpp", "open_webui": "open_webui"}
PROPERTIES = ("ActiveState", "ActiveEnterTimestamp", "NRestarts", "UnitFileState", "StatusText", "ExecStart")


def properties(text: str) -> dict[str, str]:
    """Return the NAME=VALUE lines of `systemctl show`."""
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def command(exec_start: str) -> list[str]:
    """Return the words of the command in systemd's ExecStart property."""
    found = re.search(r"argv\[\]=(.*?) ;", exec_start)
    return shlex.split(found[1]) if found else []


def release_of(program: str) -> Path | None:
    """Return the folder of the environment that a program path ``PREFIX/bin/NAME`` belongs to, links resolved."""
    prefix = Path(program).parent.parent
    return prefix.resolve() if prefix.is_dir() else None


def version_of(package: str, prefix: Path | None) -> str:
    """Return a package's version in an environment, '' where it is not there."""
    found = sorted(prefix.glob(f"lib/python3*/site-packages/{package}-*.dist-info")) if prefix else []
    return found[0].name.removesuffix(".dist-info").removeprefix(f"{package}-") if found else ""


def libraries_of(prefix: Path | None) -> dict[str, str]:
    """Return which package brings each CUDA library, as the role lmdeploy proved the release; nothing elsewhere."""
    try:
        found = json.loads((prefix / PROOF).read_text(encoding="utf-8"))["providers"] if prefix else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def value_after(words: list[str], flag: str, otherwise: str) -> str:
    """Return the word behind a flag."""
    return words[words.index(flag) + 1] if flag in words[:-1] else otherwise


def what_runs(unit: str, words: list[str], engines: Path) -> dict[str, Any]:
    """Return program, model, model_path and url of a unit, from its command or its instance file."""
    if unit == INTERFACE:
        port = int(value_after(words, "--port", "8080"))
        return {"program": "open_webui", "url": url(value_after(words, "--host", "127.0.0.1"), port)}
    instance = json.loads((engines / f"{unit.removesuffix('.service')}.json").read_text(encoding="utf-8"))
    return {
        "program": instance["engine"],
        "model": instance["model_name"],
        "model_path": instance["model_path"],
        "gpus": str(instance.get("environment", {}).get("CUDA_VISIBLE_DEVICES", "")),
        "url": url(instance["host"], instance["port"]),
    }


def is_healthy(base: str, timeout_seconds: float) -> bool:
    """Return whether the health page answers with 200."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{base}/health", timeout=timeout_seconds) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


def service(unit: str, shown: dict[str, str], engines: Path, timeout_seconds: float) -> dict[str, Any]:
    """Return everything about one unit; what can't be read is empty."""
    words = command(shown.get("ExecStart", ""))
    releases = Releases(unit.removesuffix(".service"), engines)
    release = releases.current()
    prefix = release_of(words[0]) if words else None
    known: dict[str, Any] = {"unit": unit, "program": "", "model": "", "model_path": "", "gpus": "", "url": ""}
    try:
        known.update(what_runs(unit, words, engines))
    except (OSError, ValueError, KeyError) as fault:
        known["gate"] = f"{engines} is damaged: {fault!r}"
    environment = prefix.name if prefix and prefix.parent.parent.name == "releases" else ""
    result = releases.manifest(release).get("result")
    said = [shown.get("StatusText", ""), *([f"gate {gate_text(result)}"] if result else [])]
    return {
        "gate": "; ".join(text for text in said if text),
        **known,
        "version": version_of(PACKAGES.get(known["program"], "-"), prefix),
        "libraries": libraries_of(prefix),
        "release": release or environment,
        "environment": environment,
        "pending": str(releases.pending().get("to", "")),
        **standing_of_unit(shown),
        "healthy": bool(known["url"]) and is_healthy(known["url"], timeout_seconds),
    }


def gateway(shown: dict[str, str], config: str, say: Callable[[str], str]) -> dict[str, Any]:
    """Return everything about the gateway; ``config`` is its configuration, ``say`` speaks with HAProxy."""
    port = re.search(r"^ *bind 127\.0\.0\.1:(\d+)$", config, re.MULTILINE)
    try:
        version = re.search(r"^Version: (\S+)", say("show info"), re.MULTILINE)
        known = servers(say("show stat"), say("show servers state"))
        # A twin is away but for the time of a change.
        engines = [engine for engine in known if engine["is_up"] or f"-{TWIN}-" not in engine["name"]]
        backends = {engine["backend"] for engine in engines}
        used = {engine["backend"] for engine in engines if engine["is_up"] and not engine["is_drained"]}
        said, healthy = ", ".join(f"{engine['name']} {standing(engine)}" for engine in engines), backends == used
    except SocketFault as fault:
        version, engines, said, healthy = None, [], str(fault), False
    return {
        "unit": GATEWAY,
        "program": "haproxy",
        "version": version[1] if version else "",
        "model": ", ".join(re.findall(r"^ *use_backend \S+ if .* -- (\S+) }$", config, re.MULTILINE)),
        "model_path": "",
        "gpus": "",
        "url": f"http://127.0.0.1:{port[1]}" if port else "",
        "libraries": {},
        "release": "",
        "environment": "",
        "pending": "",
        "gate": said,
        "engines": engines,
        **standing_of_unit(shown),
        "healthy": healthy,
    }


def standing(engine: dict[str, Any]) -> str:
    """Return how an engine stands at the gateway."""
    if engine["is_drained"]:
        return "drained"
    return "in use" if engine["is_up"] else "not good"


def standing_of_unit(shown: dict[str, str]) -> dict[str, Any]:
    """Return what systemd says of a unit."""
    return {
        "state": shown.get("ActiveState", "unknown"),
        "since": shown.get("ActiveEnterTimestamp", ""),
        "restarts": int(shown.get("NRestarts") or 0),
        "enabled": shown.get("UnitFileState") == "enabled",
    }


def show(unit: str) -> dict[str, str]:
    """Return what systemd knows of a unit."""
    command = ["systemctl", "show", f"--property={','.join(PROPERTIES)}", unit]
    return properties(subprocess.run(command, capture_output=True, text=True, check=False).stdout)


def main() -> None:
    """Look at each unit of the collection."""
    module = AnsibleModule(
        argument_spec={"timeout_seconds": {"type": "float", "default": 3.0}}, supports_check_mode=True
    )
    limit = module.params["timeout_seconds"]
    units = sorted(path.name for path in [*UNITS.glob("api-server*.service"), *UNITS.glob(INTERFACE)])
    services = [service(unit, show(unit), ENGINES, limit) for unit in units]
    if GATEWAY_CONFIG.exists():
        config = GATEWAY_CONFIG.read_text(encoding="utf-8")
        services.append(gateway(show(GATEWAY), config, lambda command: ask(SOCKET, command)))
    module.exit_json(changed=False, services=services)


if __name__ == "__main__":
    main()
