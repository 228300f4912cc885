"""Cut runs at many random moments; each moment is kept, so that a count is reached in several calls.

    python tests/faults/campaign.py SERIES [--controller 60] [--power 20] [--seed 5] [--lanes 1] [--again]

SERIES is `site` (site.yml on a bare host: engine and gateway), `site-ui` (with Open WebUI), or `redeploy` (redeploy.yml
on a gateway and two engines that serve). Each moment is one line of artifacts/trust/moments.jsonl; a moment that stands
there is not tried again, one that did not end well only with --again. Lanes are hosts side by side.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import figures
import yaml
from comparison import Moment, State, differences, moments
from harness import Host, Run

ROOT = Path(__file__).resolve().parents[2]
SCENARIO = ROOT / "molecule/faults"
SHARED = "molecule/inventory/hosts.yml"
LOG = figures.FOLDER / "moments.jsonl"
# What a redeploy goes to and fro between.
TARGETS: tuple[dict[str, Any], ...] = ({"api_server_session_len": 2048}, {"api_server_session_len": 4096})
NETWORK = "10.213.0.0/24"
UNCUT_TRIES = 3
# Hosts of a test know each other by address; script/hosts writes down which one each has got.
ADDRESS = "{{ lookup('file', ansible_config_file | dirname ~ '/.lab/hosts') | regex_findall('(?m)^%s (.+)$') | first }}"
ENGINES_VARIABLES = {
    "api_server_host": "0.0.0.0",  # the gateway is another host
    "api_server_allowed_networks": [NETWORK],
    "redeploy_confirm_seconds": 20,
}


class CampaignError(Exception):
    """An undisturbed run failed, or a moment could not be met."""


def variables_of(path: str) -> dict[str, Any]:
    """Return the variables of a group of the scenario."""
    return dict(yaml.safe_load((SCENARIO / path).read_text(encoding="utf-8")))


def inventory(series: str, lane: str) -> dict[str, Any]:
    """Return the inventory of a lane: the hosts bear its name."""
    engines = variables_of("inventory/group_vars/model_servers.yml")
    engine_hosts: dict[str, Any] = {lane: {}}
    if series == "redeploy":
        engine_hosts = {name: {"ansible_host": ADDRESS % name} for name in (f"{lane}-1", f"{lane}-2")}
        engines |= ENGINES_VARIABLES
    groups: dict[str, Any] = {
        "model_servers": {"hosts": engine_hosts, "vars": engines},
        "gateways": {"hosts": {lane: {}}},
    }
    if series == "site-ui":
        groups["web_uis"] = {"hosts": {lane: {}}, "vars": variables_of("whole/group_vars/web_uis.yml")}
    return {"all": {"children": groups}}


@dataclass
class Reference:
    """What an undisturbed run leaves on each host, when its tasks began, and how long it took."""

    states: dict[str, State]
    run: Run


@dataclass
class Lane:
    """Hosts that are brought up, cut, brought up again and compared."""

    series: str
    name: str
    folder: Path
    hosts: list[Host] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)
    # Which target runs everywhere; none where a moment left something else.
    running: int | None = None

    def __post_init__(self) -> None:
        """Write the inventory and name the hosts."""
        path = self.folder / f"{self.name}.json"
        path.write_text(json.dumps(inventory(self.series, self.name)), encoding="utf-8")
        names = [self.name, f"{self.name}-1", f"{self.name}-2"] if self.series == "redeploy" else [self.name]
        self.hosts = [Host(name, [SHARED, str(path)]) for name in names]

    def host(self, name: str) -> Host:
        """Return a host by its name."""
        return next(host for host in self.hosts if host.name == name)

    def play(self, *words: str, **more: Any) -> Run:
        """Run a playbook on the lane's hosts."""
        return self.hosts[0].play(*words, **more)

    def good(self, *words: str, **more: Any) -> Run:
        """Run a playbook that must end well: nothing disturbs it."""
        run = self.play(*words, **more)
        if run.code:
            message = f"{self.name}: {words} {more} was not disturbed, and failed: {run.failure()}"
            raise CampaignError(message)
        return run

    def states(self) -> dict[str, State]:
        """Return the state of each host. Who answers is the gateway's host."""
        return {host.name: host.state() if number == 0 else host.told() for number, host in enumerate(self.hosts)}

    def reset(self) -> None:
        """Have bare hosts."""
        for host in self.hosts:
            host.reset()

    def prepare(self) -> None:
        """Learn what an undisturbed run leaves and how long it takes."""
        self.reset()
        if self.series != "redeploy":
            run = self.good()
            self.references = [Reference(self.states(), run)]
        else:
            self.serve()
            runs = [self.good("playbooks/redeploy.yml", **target) for target in TARGETS]
            self.references = []
            for target, run in zip(TARGETS, runs, strict=True):
                self.good("playbooks/redeploy.yml", **target)
                self.references.append(Reference(self.states(), run))
        for reference in self.references:
            answer = reference.states[self.name]["answer"]
            if "Paris" not in answer:
                message = f"{self.name}: undisturbed, the model answers {answer!r}"
                raise CampaignError(message)

    def serve(self) -> None:
        """Have engines that serve and know both releases; the last target runs."""
        self.good(**TARGETS[1])
        for target in TARGETS:
            self.good("playbooks/redeploy.yml", **target)
        self.running = len(TARGETS) - 1

    def remove(self) -> None:
        """Remove the hosts."""
        for host in self.hosts:
            host.hosts("down", host.name)

    def met(self, number: int, moment: Moment, *, power: bool) -> dict[str, Any]:
        """Cut a run at a moment, run again, and compare; return what there is to tell."""
        if self.series == "redeploy":
            # The target that does not run.
            playbook, which, victim = "playbooks/redeploy.yml", number % len(TARGETS), number % len(self.hosts)
            variables = TARGETS[which]
            if self.running is None:
                self.reset()
                self.serve()
            if self.running == which:
                self.good(playbook, **TARGETS[1 - which])
        else:
            playbook, which, victim, variables = "site.yml", 0, 0, {}
            self.reset()
        host = self.hosts[victim]
        cut = self.play(playbook, cut=moment, power=host if power else None, **variables)
        if not cut.was_cut():
            # It ended, or failed, before the moment came.
            if cut.code:
                return {
                    "differences": [f"it failed before it was cut: {cut.failure()}"],
                    "task": cut.task(),
                }
            return {}
        if power:
            host.boot()
        began = time.monotonic()
        again = self.play(playbook, **variables)
        took = time.monotonic() - began
        if again.code:
            found = [f"the run after it failed: {again.failure()}"]
        else:
            states = self.states()
            wanted = self.references[which].states
            found = [f"{name}: {line}" for name in states for line in differences(wanted[name], states[name])]
            if self.series == "site-ui":
                smoke = self.play("playbooks/smoke.yml")
                found += [f"smoke.yml: {smoke.failure()}"] if smoke.code else []
        self.running = None if found else which
        # Else the next moment takes with it why.
        failed = {(line.split(":")[0], unit) for line in found for unit in re.findall(r"unit (\S+): \S* ?failed", line)}
        asked = "journalctl --no-pager --output cat --lines 30 --unit"
        found += [self.host(name).ssh(f"{asked} {unit}", check=False).stdout for name, unit in sorted(failed)]
        return {
            "task": cut.task(),
            "differences": found,
            "seconds_of_run_after": round(took, 1),
            **({"power_of": host.name.removeprefix(self.name) or "-0"} if power and len(self.hosts) > 1 else {}),
        }


def known() -> list[dict[str, Any]]:
    """Return the moments that were tried."""
    return [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()] if LOG.exists() else []


def latest(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the last entry of each moment: what was mended since is tried again."""
    found = {tuple(entry[word] for word in ("series", "kind", "of", "seed", "number")): entry for entry in entries}
    return list(found.values())


def survived(entry: dict[str, Any]) -> bool:
    """Tell whether the host came out the same."""
    return not entry["differences"]


def summary(entries: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    """Return how many moments were tried and survived, by series and kind; one that was met again counts twice."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for entry in entries:
        counts = found.setdefault(entry["series"], {}).setdefault(entry["kind"], {"tried": 0, "survived": 0})
        counts["tried"] += 1
        counts["survived"] += survived(entry)
    return found


def commit() -> str:
    """Return the commit that is tried, with a mark where the checkout differs from it."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


class Campaign:
    """Moments of one series that are to be met."""

    def __init__(
        self, series: str, counts: dict[str, int], seed: int, *, again: bool = False, anew: bool = False
    ) -> None:
        """Take what is left of the counts; again, what did not end well too; anew, all of them."""
        self.series, self.counts, self.seed, self.lock = series, counts, seed, threading.Lock()
        self.todo: queue.SimpleQueue[tuple[str, int, int]] = queue.SimpleQueue()
        told = [] if anew else self.told()
        done = {(entry["kind"], entry["of"], entry["number"]) for entry in told if survived(entry) or not again}
        wanted = [(kind, count, number) for kind, count in counts.items() for number in range(count)]
        # Mixed, so that also a part of them covers the whole run.
        random.Random(seed).shuffle(wanted)  # noqa: S311  # repeatable on purpose
        for item in wanted:
            if item not in done:
                self.todo.put(item)

    def told(self) -> list[dict[str, Any]]:
        """Return the moments of this campaign that were met, in this call or before."""
        return [
            entry
            for entry in latest(known())
            if (entry["series"], entry["seed"]) == (self.series, self.seed)
            and self.counts.get(entry["kind"]) == entry["of"]
        ]

    def lost(self) -> list[dict[str, Any]]:
        """Return the moments after which a host did not come out the same."""
        return [entry for entry in self.told() if not survived(entry)]

    def keep(self, entry: dict[str, Any]) -> None:
        """Write a moment down."""
        with self.lock:
            LOG.parent.mkdir(parents=True, exist_ok=True)
            with LOG.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")
            fate = "; ".join(entry["differences"]) or "the same in the end"
            which = f"{entry['number'] + 1} of {entry['of']}"
            print(f"{self.series}: {entry['kind']} {which}, in: {entry['task']}: {fate}", flush=True)

    def work(self, lane: Lane) -> None:
        """Meet moments until none is left."""
        if self.todo.empty():
            return
        if not lane.references:
            lane.prepare()
        for reference in lane.references:
            print(f"{lane.name}: undisturbed in {reference.run.seconds:.1f} s; {reference.run.longest()}", flush=True)
        while True:
            try:
                kind, count, number = self.todo.get_nowait()
            except queue.Empty:
                return
            began = time.monotonic()
            run = lane.references[number % len(lane.references)].run
            for _ in range(UNCUT_TRIES):
                moment = moments(count, run.seconds, run.starts, self.seed)[number]
                if told := lane.met(number, moment, power=kind == "power"):
                    break
            else:
                told = {"differences": [f"the run was not cut in {UNCUT_TRIES} tries"], "task": "after the last task"}
            self.keep(
                {
                    "series": self.series,
                    "kind": kind,
                    "number": number,
                    "of": count,
                    "seed": self.seed,
                    "task_number": moment.task,
                    "seconds_in_task": moment.seconds,
                    **told,
                    "seconds": round(time.monotonic() - began, 1),
                    "day": time.strftime("%Y-%m-%d"),
                    "commit": commit(),
                }
            )

    def run(self, lanes: list[str]) -> None:
        """Meet all moments with hosts of these names, side by side, which are removed in the end."""
        with tempfile.TemporaryDirectory(prefix="c.") as folder:

            def one(name: str) -> None:
                lane = Lane(self.series, name, Path(folder))
                try:
                    self.work(lane)
                finally:
                    lane.remove()

            with ThreadPoolExecutor(len(lanes)) as pool:
                list(pool.map(one, lanes))


def main() -> None:
    """Read arguments, meet moments, and print how many came out the same."""
    parser = argparse.ArgumentParser(prog="campaign.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("series", choices=["site", "site-ui", "redeploy"])
    parser.add_argument("--controller", type=int, default=60, help="moments at which the controller is killed")
    parser.add_argument("--power", type=int, default=20, help="moments at which a host's power is cut")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="try again what did not end well")
    given = parser.parse_args()
    campaign = Campaign(
        given.series, {"controller": given.controller, "power": given.power}, given.seed, again=given.again
    )
    campaign.run([f"cut-{given.series}-{number}" for number in range(given.lanes)])
    print(json.dumps(summary(known()), indent=1))
    sys.exit(bool(campaign.lost()))


if __name__ == "__main__":
    main()
