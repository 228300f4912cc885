# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""What modules look at on a host: cards and models. Runs on the host, changes nothing, judges nothing."""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ansible_collections.selfhost.lmdeploy.plugins.module_utils import preflight_survey as facts
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.gpu_layout import cpu_count

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

NVIDIA_SMI = ("/usr/bin/nvidia-smi", "/usr/local/nvidia/bin/nvidia-smi", "/usr/lib/wsl/lib/nvidia-smi")
# Eight cards without persistence mode take their time to wake.
NVIDIA_SMI_SECONDS = 30.0
PCI_NVIDIA = "0x10de"
PCI_DISPLAY = "0x03"
# A config.json is a few KiB; what is larger is something else.
CONFIG_LIMIT_BYTES = 1 << 20
NODES_WITH_CPUS = "/sys/devices/system/node/has_cpu"
# Where the role api_server keeps what its launchers read.
INSTANCES = Path("/etc/api-server")


def read(path: str | Path) -> str:
    """Return a file's text, '' where it can't be read: a survey tells what it can see."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def run(command: list[str], timeout_seconds: float) -> tuple[int, str]:
    """Return a command's status and its output, errors included; status 127 where it is missing or too slow."""
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_seconds,
            check=False,
            env={"LC_ALL": "C", "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")},
        )
    except subprocess.TimeoutExpired:
        return 127, f"{command[0]} gave no answer within {timeout_seconds:.0f} s"
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout.decode("utf-8", "replace").rstrip()


def in_parallel(jobs: dict[str, Callable[[], T]], timeout_seconds: float) -> dict[str, T]:
    """Return the answers of the jobs that ended in time. Threads that hang (in DNS, say) are left to die with us."""
    answers: queue.SimpleQueue[tuple[str, T]] = queue.SimpleQueue()
    for name, job in jobs.items():
        threading.Thread(target=lambda n=name, j=job: answers.put((n, j())), daemon=True).start()
    found: dict[str, T] = {}
    deadline = time.monotonic() + timeout_seconds
    while len(found) < len(jobs):
        try:
            name, answer = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        found[name] = answer
    return found


def dealt_cards(folder: Path = INSTANCES) -> dict[str, list[int]]:
    """Return which cards the units of the role api_server have, by their units; those with one card alone have none."""
    found = {}
    for path in sorted(folder.glob("api-server*.json")):
        try:
            visible = json.loads(path.read_text(encoding="utf-8"))["environment"]["CUDA_VISIBLE_DEVICES"]
            found[f"{path.stem}.service"] = [int(number) for number in visible.split(",")]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not there, not ours to read, or its owner names cards in a way of his own
    return found


def count_pci_cards(devices: Path = Path("/sys/bus/pci/devices")) -> int:
    """Return how many NVIDIA display devices the bus shows, driver or not."""
    folders = devices.glob("*")
    return sum(
        read(folder / "vendor").strip() == PCI_NVIDIA and read(folder / "class").startswith(PCI_DISPLAY)
        for folder in folders
    )


def survey_gpus(timeout_seconds: float = NVIDIA_SMI_SECONDS) -> facts.GpuFacts:
    """Ask nvidia-smi for the cards, what runs on them and how they are joined."""
    program = shutil.which("nvidia-smi") or next((path for path in NVIDIA_SMI if os.access(path, os.X_OK)), "")
    found: facts.GpuFacts = {
        "program": program, "error": "", "pci_devices": count_pci_cards(), "cards": [], "processes": [], "links": [],
        "lost": [], "numa_nodes": cpu_count(read(NODES_WITH_CPUS).strip()), "dealt": dealt_cards(),
    }  # fmt: skip
    if not program:
        return found

    def ask(*options: str) -> tuple[int, str]:
        return run([program, *options], timeout_seconds)

    def ask_cards() -> tuple[int, str]:
        for fields in facts.GPU_FIELDS:
            status, text = ask(f"--query-gpu={fields}", "--format=csv,noheader,nounits")
            if "not a valid field" not in text:
                break
        return status, text

    answers = in_parallel(
        {
            "cards": ask_cards,
            "processes": lambda: ask(f"--query-compute-apps={facts.PROCESS_FIELDS}", "--format=csv,noheader,nounits"),
            "links": lambda: ask("topo", "-m"),
        },
        timeout_seconds + 1,
    )
    status, text = answers.get("cards", (127, f"nvidia-smi gave no answer within {timeout_seconds:.0f} s"))
    found["cards"] = facts.parse_gpus(text)
    found["lost"] = facts.parse_lost(text)
    # With one card lost it lists the others and ends with an error.
    if status != 0 and not (found["cards"] and (found["lost"] or any(card["fault"] for card in found["cards"]))):
        found["error"] = text or f"nvidia-smi ended with status {status}"
        found["cards"] = []
        return found
    found["processes"] = facts.parse_gpu_processes(answers.get("processes", (127, ""))[1])
    for process in found["processes"]:
        process["unit"] = facts.unit_of_cgroup(read(f"/proc/{process['pid']}/cgroup"))
    topology = answers.get("links", (127, ""))[1]
    found["links"] = facts.parse_topology(topology)
    nodes = facts.parse_nodes(topology)
    for card in found["cards"]:
        card["numa"], card["cpus"] = nodes.get(card["index"], (-1, ""))
    return found


def survey_model(path: str) -> facts.ModelFacts:
    """Tell the size of a model's weights and what its config.json says."""
    place = Path(path)
    if place.is_file():
        return facts.model_facts({}, place.stat().st_size)
    if not place.is_dir():
        return {**facts.model_facts({}, 0), "exists": False}
    sizes = {
        suffix: sum(file.stat().st_size for file in place.glob(f"*{suffix}"))
        for suffix in (".safetensors", ".bin", ".gguf")
    }
    config: Any = {}
    if (place / "config.json").is_file() and (place / "config.json").stat().st_size < CONFIG_LIMIT_BYTES:
        try:
            config = json.loads(read(place / "config.json"))
        except ValueError:
            config = {}
    return facts.model_facts(config, next((size for size in sizes.values() if size), 0))
