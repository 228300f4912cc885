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


def sentence(topic: str, figure: dict[str, Any]) -> str:
    """Return what a figure says."""
    if topic == "moments":
        told = [
            f"{counts['survived']} of {counts['tried']} {SAID[kind]} in {SAID[series]}"
            for series, kinds in sorted(figure["series"].items())
            for kind, counts in sorted(kinds.items())
        ]
        return f"the same in the end after {', '.join(told)}"
    if topic == "faults":
        return f"{figure['survived']} of {figure['tried']} faults told clearly or mended, nothing lost"
    if topic == "inputs":
        total = figure["refused"] + figure["accepted"] + figure["wrong"]
        fates = f"{figure['accepted']} accepted and harmless, {figure['wrong']} wrong"
        return f"{figure['refused']} of {total} faulty inventories refused, {fates}"
    if topic == "units":
        return ", ".join(f"{name.removesuffix('.service')} {score}" for name, score in sorted(figure["scores"].items()))
    ports = figure.get("ports_open") or figure.get("open_from_another_host")
    return f"open from another host: {', '.join(map(str, ports or [])) or 'none'}"


def lines(found: dict[str, dict[str, Any]]) -> list[str]:
    """Return one line for each figure."""
    told = []
    for topic, check in CHECKS.items():
        if topic not in found:
            told.append(f"{topic:10} missing: {check}")
            continue
        figure = found[topic]
        told.append(f"{topic:10} {sentence(topic, figure)} ({figure['day']})")
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
