"""What a fleet costs its controller: first run, run without a change and redeploy, against `ansible -m ping`.

    script/bench scale [--hosts 1,10,50,100] [--real 10] [--rounds 3] [--phases first,noop,redeploy] [--keep]

Hosts are containers on this machine with systemd, sshd and a real engine, and one more with the gateway. Where more
hosts are asked for than --real, several names of the inventory lead to one of them, each by an SSH connection of its
own: the controller can't tell them from other hosts, but nothing can be installed on them twice, so that the first run
and the redeploy are measured up to --real hosts. Hosts and controller share this machine's cores: on a network, hosts
do their part of the work at the same time. Results go to artifacts/bench/scale.json and scale.svg.

The run after a change has every role look, finds nothing to do, and notes that on each host; "nothing to do" are the
runs after that, and all hosts are left alone in them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import bench

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "artifacts/bench"
GATEWAY = "scale-gateway"
# Which variables of which scenario the hosts have: small engines on all interfaces, and a gateway.
ENGINES = ROOT / "molecule/fleet/inventory/group_vars/model_servers.yml"
EVERYONE = ROOT / "molecule/inventory/group_vars/all"
CHANGED = {"api_server_session_len": 512}
LIMIT = 6.0
POLL_SECONDS = 0.3


@dataclass
class Cost:
    """What a run took: seconds, processor seconds of the controller's processes, their most memory at one moment (MB).

    ``memory_mb`` counts pages that processes share once (PSS); ``rss_mb`` once for each process.
    """

    seconds: float
    processor_seconds: float
    memory_mb: float
    rss_mb: float


def tree(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                parent = int((entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def memory(pid: int) -> tuple[float, float]:
    """Return PSS and RSS of a tree of processes in MB."""
    pss = rss = 0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{each}/smaps_rollup").read_text(encoding="ascii")
            pss += sum(map(int, re.findall(r"^Pss: +(\d+)", text, re.MULTILINE)))
            rss += sum(map(int, re.findall(r"^Rss: +(\d+)", text, re.MULTILINE)))
    return pss / 1000, rss / 1000


def measured(command: list[str], log: Path) -> Cost:
    """Run a command that must end well and return what it cost."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    peaks = [0.0, 0.0]
    with log.open("w", encoding="utf-8") as output:
        environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(POLL_SECONDS):
                peaks[:] = [max(pair) for pair in zip(peaks, memory(process.pid), strict=True)]

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        seconds = time.monotonic() - began
        ended.set()
        watcher.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code != 0:
        sys.exit(f"{' '.join(command)}: exit code {code}; see {log}")
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(round(seconds, 2), round(spent, 2), round(peaks[0], 1), round(peaks[1], 1))


class Fleet:
    """Containers, and an inventory with so many names for them."""

    def __init__(self, names: int, real: int) -> None:
        """Name the hosts; nothing is made yet."""
        self.count, self.real = names, min(names, real)
        self.hosts = [f"scale-{number}" for number in range(1, self.real + 1)]
        self.inventory = ROOT / f".lab/scale-{names}/hosts.json"

    def make(self, *, anew: bool) -> None:
        """Have the containers, new ones if wanted, and write the inventory."""
        tool = str(ROOT / "script/hosts")
        if anew:
            subprocess.run([tool, "down", GATEWAY, *self.hosts], check=True, capture_output=True)
        subprocess.run([tool, "up", GATEWAY, *self.hosts], check=True)
        addresses = dict(line.split() for line in (ROOT / ".lab/hosts").read_text(encoding="ascii").splitlines())
        everyone: dict[str, Any] = {}
        for path in sorted(EVERYONE.glob("*.yml")):
            everyone.update(yaml.safe_load(path.read_text(encoding="utf-8")))
        sockets = self.inventory.parent / "ssh"
        sockets.mkdir(parents=True, exist_ok=True)
        servers = {}
        for number in range(self.count):
            address = addresses[self.hosts[number % self.real]]
            # A connection for each name, also where several names lead to one host.
            servers[f"scale-{number + 1}"] = {
                "ansible_host": address,
                "ansible_control_path": f"{sockets}/{number + 1}",
            }
        groups = {
            "model_servers": {"hosts": servers, "vars": yaml.safe_load(ENGINES.read_text(encoding="utf-8"))},
            "gateways": {"hosts": {GATEWAY: {"ansible_host": addresses[GATEWAY]}}},
        }
        document = {"all": {"vars": everyone, "children": groups}}
        self.inventory.write_text(json.dumps(document, indent=1), encoding="utf-8")

    def playbook(self, name: str, **variables: Any) -> list[str]:
        """Return the command of a playbook."""
        return ["ansible-playbook", "-i", str(self.inventory), name, "-e", json.dumps(variables)]

    def ping(self) -> list[str]:
        """Return the command that costs the least."""
        return ["ansible", "-i", str(self.inventory), "all", "-m", "ansible.builtin.ping"]


def is_unchanged(log: Path) -> bool:
    """Tell whether a run changed nothing anywhere."""
    text = log.read_text(encoding="utf-8")
    return "changed=0" in text and not re.search(r"changed=[1-9]", text)


def left_alone(log: Path) -> int:
    """Return how many hosts a run left alone, since they are as a whole run found them."""
    found = re.search(r"As wanted already: (\d+) of", log.read_text(encoding="utf-8"))
    return int(found[1]) if found else 0


def middle(costs: list[Cost]) -> Cost:
    """Return the median of each figure."""
    return Cost(**{name: statistics.median(asdict(cost)[name] for cost in costs) for name in asdict(costs[0])})


def steps(fleet: Fleet, chosen: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure what is asked for on one number of hosts."""
    PLACE.mkdir(parents=True, exist_ok=True)
    first = "first" in chosen.phases and fleet.count <= chosen.real
    fleet.make(anew=first)

    def log(name: str) -> Path:
        return PLACE / f"scale-{fleet.count}-{name}.log"

    found = {}
    real = [f"scale-{number}" for number in range(1, fleet.real + 1)]
    # Where names are more than hosts, the hosts are there already, and know by one name each that they are as wanted.
    known = ["--limit", ",".join(real)] if fleet.count > chosen.real else []
    begun = measured([*fleet.playbook("site.yml"), *known], log("first"))
    if known:
        measured(fleet.playbook("site.yml"), log("gateway"))
    if first:
        found["first run"] = asdict(begun)
    whole = measured(fleet.playbook("site.yml"), log("whole"))
    if not is_unchanged(log("whole")):
        sys.exit(f"a run that was to change nothing changed something; see {log('whole')}")
    pings, runs = [], []
    for number in range(chosen.rounds):
        # In turn, so that what else the machine does meets both.
        pings.append(measured(fleet.ping(), log("ping")))
        runs.append(measured(fleet.playbook("site.yml"), log(f"noop-{number}")))
        if not is_unchanged(log(f"noop-{number}")):
            sys.exit(f"a run that was to change nothing changed something; see {log(f'noop-{number}')}")
        if left_alone(log(f"noop-{number}")) != fleet.count + 1:
            sys.exit(f"not every host was left alone; see {log(f'noop-{number}')}")
    ping, run = asdict(middle(pings)), asdict(middle(runs))
    found["ping"] = ping
    costs = {"nothing to do": run, **({} if known else {"nothing to do, every role looks": asdict(whole)})}
    for name, cost in costs.items():
        found[name] = {
            **cost,
            "times_ping": round(cost["seconds"] / ping["seconds"], 2),
            "times_ping_processor": round(cost["processor_seconds"] / ping["processor_seconds"], 2),
        }
    if "redeploy" in chosen.phases and fleet.count <= chosen.real:
        found["redeploy"] = asdict(measured(fleet.playbook("playbooks/redeploy.yml", **CHANGED), log("redeploy")))
        measured(fleet.playbook("playbooks/redeploy.yml"), log("redeploy-back"))
    return found


def table(found: dict[int, dict[str, dict[str, Any]]]) -> str:
    """Return the figures as lines of a table."""
    lines = ["| Hosts | What | Seconds | Processor s | Memory MB | Times ping |", "|---|---|---|---|---|---|"]
    for count, phases in found.items():
        for name, cost in phases.items():
            times = cost.get("times_ping", "")
            figures = f"{cost['seconds']:.1f} | {cost['processor_seconds']:.1f} | {cost['memory_mb']:.0f} | {times}"
            lines.append(f"| {count} | {name} | {figures} |")
    return "\n".join(lines)


def picture(found: dict[int, dict[str, dict[str, Any]]]) -> str:
    """Return the figures as a plot."""
    names = list(dict.fromkeys(name for phases in found.values() for name in phases))

    def lines(figure: str) -> dict[str, list[tuple[int, float]]]:
        return {
            name: [(count, phases[name][figure]) for count, phases in found.items() if name in phases] for name in names
        }

    return bench.drawing("hosts", {"Seconds": lines("seconds"), "Memory of the controller, MB": lines("memory_mb")})


def main() -> int:
    """Measure, tell, keep."""
    parser = argparse.ArgumentParser(prog="script/bench scale", description=__doc__.partition("\n")[0])
    parser.add_argument("--hosts", default="1,10,50,100", help="how many, with commas between them")
    parser.add_argument("--real", type=int, default=10, help="most containers; further names lead to the same ones")
    parser.add_argument("--rounds", type=int, default=3, help="pings and runs without a change; the median counts")
    parser.add_argument("--phases", default="first,noop,redeploy", help="which; noop is always among them")
    parser.add_argument("--keep", action="store_true", help="leave the containers for the next time")
    chosen = parser.parse_args()
    subprocess.run([str(ROOT / "script/machine")], check=True)
    found: dict[int, dict[str, dict[str, Any]]] = {}
    fleets = [Fleet(int(count), chosen.real) for count in chosen.hosts.split(",")]
    for fleet in fleets:
        found[fleet.count] = steps(fleet, chosen)
        sys.stdout.write(table({fleet.count: found[fleet.count]}) + "\n")
        sys.stdout.flush()
        when = datetime.now(tz=timezone.utc).isoformat(timespec="seconds")
        kept = {"when": when, "cores": os.cpu_count(), "real": chosen.real, "hosts": found}
        (PLACE / "scale.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        (PLACE / "scale.svg").write_text(picture(found), encoding="utf-8")
    if not chosen.keep:
        names = sorted({name for fleet in fleets for name in fleet.hosts})
        subprocess.run([str(ROOT / "script/hosts"), "down", GATEWAY, *names], check=True)
    sys.stdout.write(f"written to {PLACE.relative_to(ROOT)}/scale.json and scale.svg\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
