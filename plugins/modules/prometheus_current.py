#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Have a running Prometheus use its present configuration."""

from __future__ import annotations

DOCUMENTATION = r"""
module: prometheus_current
short_description: Have a running Prometheus use its present configuration
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Waits until Prometheus is ready, and reloads it when a file is newer than its last reload. So a change is applied
    even when the run that wrote it was interrupted before it told Prometheus; a restart would lose samples.
  - Fails when Prometheus refuses what it is to load. Targets that don't answer are told in a warning, since that is
    what Prometheus is there to see.
options:
  url:
    description: Address of Prometheus as the host itself reaches it.
    type: str
    required: true
  unit:
    description: Name of its systemd unit.
    type: str
    default: prometheus.service
  files:
    description: Configuration and rules that Prometheus reads.
    type: list
    elements: path
    required: true
  timeout_seconds:
    description: Seconds until it must be ready.
    type: float
    default: 60.0
attributes:
  check_mode:
    description: Says whether it would be reloaded, as far as the files are written.
    support: full
"""

EXAMPLES = r"""
- name: Have Prometheus use its configuration
  selfhost.lmdeploy.prometheus_current:
    url: http://127.0.0.1:9090
    files: [/etc/monitoring/prometheus.yml]
"""

RETURN = r"""
targets:
  description: What Prometheus scrapes.
  returned: when it runs
  type: list
  elements: dict
  sample: [{job: engine, host: lab, url: "http://127.0.0.1:23333/metrics", health: up, error: ""}]
"""

import json
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

LOADED_AT = "prometheus_config_last_reload_success_timestamp_seconds"
GOOD = "prometheus_config_last_reload_successful"
PAUSE_SECONDS = 0.2


class NotCurrent(Exception):
    """Prometheus is not there, or refuses its files."""


def get(url: str) -> str:
    """Return a page; no proxy stands between a host and itself."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=10) as answer:
        return str(answer.read().decode())


def sample(page: str, name: str) -> float:
    """Return a metric without labels."""
    for line in page.splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[1])
    message = f"its metrics have no {name}"
    raise NotCurrent(message)


def targets_of(text: str) -> list[dict[str, str]]:
    """Return what Prometheus scrapes, from the answer of its API."""
    return [
        {
            "job": target["labels"]["job"],
            "host": target["labels"].get("host", ""),
            "url": target["scrapeUrl"],
            "health": target["health"],
            "error": target["lastError"],
        }
        for target in json.loads(text)["data"]["activeTargets"]
    ]


def wait_ready(url: str, seconds: float) -> None:
    """Return when Prometheus is ready."""
    limit = time.monotonic() + seconds
    while True:
        try:
            get(f"{url}/-/ready")
        except OSError as fault:
            if time.monotonic() > limit:
                message = f"it is not ready after {seconds:.0f} s: {fault}"
                raise NotCurrent(message) from fault
            time.sleep(PAUSE_SECONDS)
        else:
            return


def newest(files: list[str]) -> float:
    """Return when the newest of the files changed, 0 without any."""
    return max((Path(name).stat().st_mtime for name in files if Path(name).exists()), default=0.0)


def reload(url: str, unit: str, moment: float, seconds: float) -> None:
    """Have it read its files again, and return when it did; raise when it refuses them."""
    done = subprocess.run(["systemctl", "reload", unit], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotCurrent(done.stderr.strip())
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        page = get(f"{url}/metrics")
        if sample(page, GOOD) == 0:
            message = f"it refuses its files; journalctl -u {unit} tells which"
            raise NotCurrent(message)
        if sample(page, LOADED_AT) >= moment:
            return
        time.sleep(PAUSE_SECONDS)
    message = f"it did not read its files within {seconds:.0f} s"
    raise NotCurrent(message)


def converge(params: dict[str, Any], *, dry: bool) -> dict[str, Any]:
    """Reload when that is due and return the targets; with ``dry`` only tell."""
    url = params["url"]
    if not dry:
        wait_ready(url, params["timeout_seconds"])
    try:
        page = get(f"{url}/metrics")
    except OSError:
        # Only in check mode: it does not run yet.
        return {"changed": False, "targets": []}
    moment = newest(params["files"])
    due = moment > sample(page, LOADED_AT) or sample(page, GOOD) == 0
    if due and not dry:
        reload(url, params["unit"], moment, params["timeout_seconds"])
    return {"changed": due, "targets": targets_of(get(f"{url}/api/v1/targets?state=active"))}


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "unit": {"type": "str", "default": "prometheus.service"},
            "files": {"type": "list", "elements": "path", "required": True},
            "timeout_seconds": {"type": "float", "default": 60.0},
        },
        supports_check_mode=True,
    )
    try:
        result = converge(module.params, dry=module.check_mode)
    except (NotCurrent, OSError, ValueError, KeyError) as fault:
        module.fail_json(msg=f"Prometheus at {module.params['url']} does not use its configuration: {fault}")
    for target in result["targets"]:
        if target["health"] == "down":
            module.warn(
                f"Prometheus can't scrape {target['job']} of {target['host']} at {target['url']}: {target['error']}"
            )
    module.exit_json(**result)


if __name__ == "__main__":
    main()
