# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Prometheus' configuration from a list of targets, its alert rules with changes, and the targets of a fleet. Pure."""

from __future__ import annotations

import copy
import ipaddress
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

JOBS = ("engine", "node", "gateway", "probe")
# What a host may have beside engines: the beginning of its variables, the job that watches it, and where.
SERVICES = (("exporter", "node", "/metrics"), ("gateway", "gateway", "/metrics"), ("web", "probe", "/health"))
PORTS = {"http": 80, "https": 443}
# What an alert of the role may get instead of its own.
CHANGEABLE = ("annotations", "expr", "for", "labels")


class MonitoringFault(Exception):
    """What a person wrote can't work; the text says where and why."""


def address_of(url: str) -> tuple[str, str, str]:
    """Return scheme, host:port and path of a target's URL."""
    parts = urlsplit(url)
    try:
        port = parts.port or PORTS.get(parts.scheme)
    except ValueError:
        port = None
    if port is None or not parts.hostname:
        message = f"monitoring_targets: '{url}' is no URL; it begins with http:// or https:// and names a host"
        raise MonitoringFault(message)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return parts.scheme, f"{host}:{port}", parts.path


def key_name(target: Mapping[str, Any]) -> str:
    """Return the name of the file that holds a target's key, '' where it has none."""
    if not target.get("api_key"):
        return ""
    address = address_of(str(target["url"]))[1]
    return re.sub(r"[^A-Za-z0-9.-]+", "_", f"{target['host']}-{address}") + ".key"


def key_files(targets: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return name to key of every key file."""
    return {key_name(target): str(target["api_key"]) for target in targets if target.get("api_key")}


def key_entries(targets: Iterable[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the key files as the module config_files takes them; ``settings``: keys_dir, group."""
    shared = {"mode": "0640", "group": str(settings["group"])}
    return [
        {"path": f"{settings['keys_dir']}/{name}", "hidden_content": key, **shared}
        for name, key in key_files(targets).items()
    ]


def networks(
    targets: Iterable[Mapping[str, Any]], allowed: Iterable[str], alertmanagers: Iterable[str] = ()
) -> list[str]:
    """Return the networks that Prometheus must reach and be reached from, as systemd's IPAddressAllow takes them.

    Empty, which is no filter, where one of them has a name instead of an address: a unit can't follow a name.
    """
    found = {"localhost": None, **dict.fromkeys(allowed)}
    for url in [*(str(target["url"]) for target in targets), *(f"//{address}" for address in alertmanagers)]:
        host = urlsplit(url).hostname or ""
        if host == "localhost":
            continue
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return []
        if not address.is_loopback:
            found[str(address)] = None
    return list(found)


def scrape(target: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scrape configuration of one target. Each has its own, since each may have a key of its own."""
    job = str(target["job"])
    scheme, address, path = address_of(str(target["url"]))
    labels = {**(target.get("labels") or {}), "job": job, "host": str(target["host"])}
    made: dict[str, Any] = {"job_name": f"{job} {target['host']} {target['url']}", "scheme": scheme}
    if target.get("ca_file"):
        made["tls_config"] = {"ca_file": str(target["ca_file"])}
    if target.get("api_key"):
        made["authorization"] = {"credentials_file": f"{settings['keys_dir']}/{key_name(target)}"}
    if job == "probe":
        # The blackbox exporter asks; the sample is named after what was asked.
        verified = target.get("tls_verified", True)
        made["scheme"], made["metrics_path"] = "http", "/probe"
        made["params"] = {"module": ["http" if verified else "http_unverified"], "target": [str(target["url"])]}
        made["static_configs"] = [
            {"targets": [settings["prober"]], "labels": {**labels, "instance": str(target["url"])}}
        ]
    else:
        made["metrics_path"] = path or "/metrics"
        made["static_configs"] = [{"targets": [address], "labels": labels}]
    return made


def configuration(targets: Iterable[Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of prometheus.yml.

    ``settings``: interval_seconds, rules (paths), alertmanagers (host:port), keys_dir, prober and own (host:port).
    """
    own = {"job_name": "prometheus", "static_configs": [{"targets": [settings["own"]]}]}
    made: dict[str, Any] = {
        "global": {
            "scrape_interval": f"{settings['interval_seconds']}s",
            "scrape_timeout": f"{min(10, int(settings['interval_seconds']))}s",
            "evaluation_interval": f"{settings['interval_seconds']}s",
        },
        "rule_files": list(settings["rules"]),
        "scrape_configs": [own],
    }
    seen = set()
    for target in targets:
        if target["job"] not in JOBS:
            message = f"monitoring_targets: job '{target['job']}' is none of {', '.join(JOBS)}"
            raise MonitoringFault(message)
        entry = scrape(target, settings)
        if entry["job_name"] not in seen:
            made["scrape_configs"].append(entry)
        seen.add(entry["job_name"])
    if settings["alertmanagers"]:
        made["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": list(settings["alertmanagers"])}]}]}
    return made


def rules(content: Mapping[str, Any], changes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return alert rules with changes by alert name: fields that replace the role's, or ``enabled: false``."""
    made: dict[str, Any] = copy.deepcopy(dict(content))
    known = {rule["alert"] for group in made["groups"] for rule in group["rules"] if "alert" in rule}
    for name, change in changes.items():
        if name not in known:
            message = f"monitoring_alerts: there is no alert '{name}'; known are {', '.join(sorted(known))}"
            raise MonitoringFault(message)
        wrong = set(change) - {*CHANGEABLE, "enabled"}
        if wrong:
            message = f"monitoring_alerts.{name}: '{min(wrong)}' is none of enabled, {', '.join(CHANGEABLE)}"
            raise MonitoringFault(message)
    for group in made["groups"]:
        kept = []
        for rule in group["rules"]:
            change = changes.get(rule.get("alert", ""), {})
            if change.get("enabled", True):
                kept.append({**rule, **{key: change[key] for key in CHANGEABLE if key in change}})
        group["rules"] = kept
    made["groups"] = [group for group in made["groups"] if group["rules"]]
    return made


def is_local(address: str) -> bool:
    """Tell whether only the host itself reaches an address."""
    try:
        return address == "localhost" or ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return False


def _url(host: str, port: int, path: str) -> str:
    return f"http://[{host}]:{port}{path}" if ":" in host else f"http://{host}:{port}{path}"


def _reached(listening: str, address: str, *, here: bool) -> str:
    """Return where a service is reached that listens on an address of a host, '' where it is not."""
    if is_local(listening):
        return listening if here else ""
    if listening in ("0.0.0.0", "::", ""):  # noqa: S104 compared with, not bound to
        return "127.0.0.1" if here else address
    return listening


def fleet_targets(hosts: Iterable[Mapping[str, Any]], monitor: str) -> list[dict[str, Any]]:
    """Return the targets of a fleet as one monitor sees them; what listens on another host's loopback is left out.

    A host is {name, address, connections, and SERVICE_host and SERVICE_port for exporter, gateway and web}; connections
    are {url, api_key} of engines. A service without a port is not there.
    """
    found: list[dict[str, Any]] = []
    for host in hosts:
        name, here = str(host["name"]), host["name"] == monitor
        for service, job, path in SERVICES:
            listening = str(host.get(f"{service}_host") or "127.0.0.1")
            reached = _reached(listening, str(host["address"]), here=here)
            if host.get(f"{service}_port") and reached:
                found.append({"job": job, "host": name, "url": _url(reached, int(host[f"{service}_port"]), path)})
        for connection in host.get("connections") or []:
            base = str(connection["url"]).rstrip("/").removesuffix("/v1")
            if here or not is_local(urlsplit(base).hostname or ""):
                engine = {"job": "engine", "host": name, "url": f"{base}/metrics"}
                found.append({**engine, "api_key": connection["api_key"]})
                found.append({"job": "probe", "host": name, "url": f"{base}/health"})
    return found
