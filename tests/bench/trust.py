"""What the checks of trust found: moments and faults survived, inputs refused, scores of units, open ports.

    script/bench trust            show the figures that the checks left on this machine
    script/bench trust --run      make them anew first, with the default number of each; TEST_FULL=1 for all

Results go to artifacts/bench/trust.json. A figure whose check has not run yet is said to be missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/faults"))

import campaign  # noqa: E402  # found by the line above
import figures  # noqa: E402  # as above

# What makes each figure.
CHECKS = {
    "moments": "script/test faults",
    "faults": "script/test faults",
    "inputs": "pytest tests/inputs",
    "units": "script/test trust",
    "secrets": "script/test trust",
    "rotation": "script/test --full fleet",
    "rotation_lmdeploy": "script/test lmdeploy",
    "ports": "script/test gateway",
    "firewall": "script/test firewall",
}

SAID = {
    "controller": "kills of the controller",
    "power": "power cuts",
    "redeploy": "redeploy.yml on a live fleet",
    "site": "site.yml on a bare host",
    "site-ui": "site.yml on a bare host with Open WebUI",
}


def make() -> None:
    """Run the checks; one that fails is shown, and leaves its figures as far as it came."""
    subprocess.run([str(ROOT / "script/test"), "faults", "trust", "gateway", "firewall"], cwd=ROOT, check=False)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".collections")}
    subprocess.run([sys.executable, "-m", "pytest", "tests/inputs"], cwd=ROOT, env=environment, check=False)


def of_moments(figure: dict[str, Any]) -> str:
    """Return what became of the cuts."""
    told = [
        f"{counts['survived']} of {counts['tried']} {SAID[kind]} in {SAID[series]}"
        for series, kinds in sorted(figure["series"].items())
        for kind, counts in sorted(kinds.items())
    ]
    return f"the same in the end after {', '.join(told)}"


def of_inputs(figure: dict[str, Any]) -> str:
    """Return what became of the inventories."""
    total = figure["refused"] + figure["accepted"] + figure["wrong"]
    fates = f"{figure['accepted']} accepted and harmless, {figure['wrong']} wrong"
    return f"{figure['refused']} of {total} faulty inventories refused, {fates}"


def of_secrets(figure: dict[str, Any]) -> str:
    """Return what the playbooks' output showed."""
    shown = figure["shown_by"]
    names = ", ".join(sorted(shown))
    return f"shown in {sum(shown.values())} lines by {len(shown)} playbooks with -vvv --diff: {names}"


def of_ports(figure: dict[str, Any]) -> str:
    """Return what another host reached."""
    ports = figure.get("ports_open") or figure.get("open_from_another_host")
    return f"open from another host: {', '.join(map(str, ports or [])) or 'none'}"


SENTENCES: dict[str, Callable[[dict[str, Any]], str]] = {
    "moments": of_moments,
    "faults": lambda found: f"{found['survived']} of {found['tried']} faults told clearly or mended, nothing lost",
    "inputs": of_inputs,
    "units": lambda found: ", ".join(
        f"{n.removesuffix('.service')} {score}" for n, score in sorted(found["scores"].items())
    ),
    "secrets": of_secrets,
    "rotation": lambda found: f"{found['refused']} of {found['requests']} requests to a gateway lost during rotate.yml",
    "rotation_lmdeploy": lambda found: (
        f"{found['refused']} of {found['requests']} refused in {found['changes']} changes of LMDeploy's key"
    ),
    "ports": of_ports,
    "firewall": of_ports,
}


def lines(found: dict[str, dict[str, Any]]) -> list[str]:
    """Return one line for each figure."""
    told = []
    for topic, check in CHECKS.items():
        if topic not in found:
            told.append(f"{topic:17} missing: {check}")
            continue
        figure = found[topic]
        told.append(f"{topic:17} {SENTENCES[topic](figure)} ({figure['day']})")
    return told


def main() -> None:
    """Print the figures and keep them."""
    parser = argparse.ArgumentParser(prog="script/bench trust", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--run", action="store_true", help="make the figures anew first")
    if parser.parse_args().run:
        make()
    found = figures.noted()
    if met := campaign.known():
        found["moments"] = {"day": max(entry["day"] for entry in met), "series": campaign.summary(met), "met": met}
    version = next(
        line.split()[1] for line in (ROOT / "galaxy.yml").read_text().splitlines() if line.startswith("version:")
    )
    path = ROOT / "artifacts/bench/trust.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": version, **found}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print("\n".join([f"trust of version {version}", *lines(found)]))


if __name__ == "__main__":
    main()
