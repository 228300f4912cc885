# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""What the gateway's configuration is made of: engines grouped by model, and all that is wrong with the variables.

Pure, no Ansible.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import urlsplit

from ansible_collections.selfhost.lmdeploy.plugins.module_utils import virtual_address

# Names go into haproxy.cfg as they are, so they hold nothing that means something there.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*")
MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}")
# What a Bearer header may hold (RFC 6750).
KEY = re.compile(r"[A-Za-z0-9._~+/=-]+")
PATH = re.compile(r"/v1(/[a-z0-9_-]+)+")
SHORTEST_KEY = 32
# What the name of a twin has between host and port, so that no host stands for it.
TWIN = "twin"
LARGEST_REQUEST_MIB = 512


class GatewayFault(Exception):
    """What is wrong with the variables, one sentence a line."""


def slug(text: str) -> str:
    """Return a text as a name that HAProxy, metrics and file names take."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "engine"


def engine_entries(
    host: str, engines: list[dict[str, str]], connections: list[dict[str, str]], twin_port_offset: int = 0
) -> list[dict[str, Any]]:
    """Return one host's engines, as the module ``engine_connections`` tells them, as entries of ``gateway_engines``.

    With an offset there is an entry for the twin of each, which only serves while its engine is changed.
    """
    entries: list[dict[str, Any]] = []
    for engine, connection in zip(engines, connections, strict=True):
        parts = urlsplit(connection["url"])
        entries.append(
            {
                "name": f"{slug(host)}-{parts.port}",
                "address": parts.hostname,
                "port": parts.port,
                "model": engine["model"],
                "api_key": connection["api_key"],
            }
        )
    if twin_port_offset:
        ports = [entry["port"] + twin_port_offset for entry in entries]
        entries += [
            {**entry, "name": f"{slug(host)}-{TWIN}-{port}", "port": port, "reserve": True}
            for entry, port in zip(entries, ports, strict=True)
        ]
    return entries


def _twice(values: list[str]) -> list[str]:
    """Return what is in a list more than once."""
    return sorted({value for value in values if values.count(value) > 1})


def _engine_faults(engines: list[dict[str, Any]]) -> list[str]:
    """Return what is wrong with the engines."""
    found = []
    for index, engine in enumerate(engines):
        where = f"gateway_engines[{engine.get('name') or index}]"
        for part, pattern in (("name", NAME), ("address", HOST), ("model", MODEL)):
            value = str(engine.get(part) or "")
            if not pattern.fullmatch(value):
                found.append(f"{where}.{part} is '{value}': it holds letters, digits, dots and dashes, nothing else")
        key = str(engine.get("api_key") or "")
        if key and not KEY.fullmatch(key):
            found.append(f"{where}.api_key holds what no HTTP header may: take letters and digits")
        if not 1 <= int(engine.get("port") or 0) <= 65535:
            found.append(f"{where}.port is {engine.get('port')}: a TCP port is a number from 1 to 65535")
    names = _twice([str(engine.get("name")) for engine in engines])
    return found + [f"gateway_engines has the name {name} twice: each engine has its own" for name in names]


def _key_faults(keys: list[dict[str, str]]) -> list[str]:
    """Return what is wrong with the clients' keys; never a key itself."""
    found = []
    for index, entry in enumerate(keys):
        where = f"gateway_api_keys[{entry.get('name') or index}]"
        if not NAME.fullmatch(str(entry.get("name") or "")):
            found.append(f"{where}.name is no name: it holds letters, digits, dots and dashes, nothing else")
        key = str(entry.get("key") or "")
        if len(key) < SHORTEST_KEY or not KEY.fullmatch(key):
            found.append(
                f"{where}.key has {len(key)} characters or odd ones: "
                f"take {SHORTEST_KEY} or more letters and digits, or leave gateway_api_keys empty to have one generated"
            )
    if _twice([str(entry.get("key")) for entry in keys]):
        found.append("gateway_api_keys has one key under two names: each client has its own")
    return found


def faults(variables: dict[str, Any]) -> list[str]:
    """Return everything that is wrong with the role's variables (without ``gateway_``), one sentence each."""
    found = _engine_faults(variables["engines"]) + _key_faults(variables["api_keys"])
    if not HOST.fullmatch(variables["name"]):
        found.append(f"gateway_name is '{variables['name']}': it is the name or address that clients use")
    if not HOST.fullmatch(str(variables["host"])):
        found.append(
            f"gateway_host is '{variables['host']}': it is an address of this host, or 0.0.0.0 for all of them"
        )
    for ui in variables["web_uis"]:
        if not HOST.fullmatch(str(ui.get("address") or "")) or not NAME.fullmatch(str(ui.get("name") or "")):
            found.append(
                f"gateway_web_uis has '{ui.get('name')}' at '{ui.get('address')}', which is no name or no address"
            )
    for path in variables["api_paths"]:
        if not PATH.fullmatch(path):
            found.append(f"gateway_api_paths has '{path}': a path begins with /v1/ and holds small letters")
    if bool(variables["tls_certificate"]) != bool(variables["tls_key"]):
        found.append(
            "gateway_tls_certificate and gateway_tls_key belong together: give both, or none to have them made"
        )
    if bool(variables["ca_certificate"]) != bool(variables["ca_key"]):
        found.append("gateway_ca_certificate and gateway_ca_key belong together: give both, or none to have them made")
    found += virtual_address.faults(
        variables["virtual_address"],
        variables["virtual_gateways"],
        int(variables["virtual_router"]),
        variables["host"],
    )
    if not 1 <= variables["request_mib"] <= LARGEST_REQUEST_MIB:
        found.append(f"gateway_request_mib is {variables['request_mib']}: take 1 to {LARGEST_REQUEST_MIB}")
    for name in ("engine_requests", "connections", "timeout_seconds", "queue_seconds"):
        if variables[name] < 1:
            found.append(f"gateway_{name} is {variables[name]}: take 1 or more")
    return found


def models(engines: list[dict[str, Any]], requests: int) -> list[dict[str, Any]]:
    """Return one entry for each model: its name, the name of its backend, and the engines that have it."""
    by_model: dict[str, list[dict[str, Any]]] = {}
    for engine in sorted(engines, key=lambda entry: str(entry["name"])):
        entry = {**engine, "requests": int(engine.get("requests") or requests), "api_key": engine.get("api_key") or ""}
        entry["target"] = f"[{entry['address']}]" if ":" in entry["address"] else entry["address"]
        by_model.setdefault(str(engine["model"]), []).append(entry)
    backends: set[str] = set()
    found = []
    for model in sorted(by_model):
        backend = f"model_{slug(model)}"
        while backend in backends:
            backend += "_"
        backends.add(backend)
        found.append({"name": model, "backend": backend, "engines": by_model[model]})
    return found


def plan(variables: dict[str, Any]) -> dict[str, Any]:
    """Return what the template needs; raises GatewayFault with all faults."""
    found = faults(variables)
    if found:
        raise GatewayFault("\n".join(found))
    grouped = models(variables["engines"], variables["engine_requests"])
    entries = [{"id": model["name"], "object": "model", "created": 0, "owned_by": "selfhost"} for model in grouped]
    listed = {"object": "list", "data": entries}
    return {"models": grouped, "models_json": json.dumps(listed, separators=(",", ":"))}
