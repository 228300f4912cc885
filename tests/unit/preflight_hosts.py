"""A host and a wish that pass every check of preflight, and what makes them differ; shared by its tests."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import yaml
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import preflight_survey as facts
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_checks import judge
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_desired import Desired, Finding

MACHINES = Path(__file__).parent / "fixtures" / "nvidia_smi"
GB, GIB = 10**9, 2**30

LOCK = "lmdeploy==0.18.0 \\\n    --hash=sha256:00\nnvidia-nccl-cu12==2.27.5 \\\n    --hash=sha256:00\n"
LOCK_CUDA_13 = LOCK.replace("nvidia-nccl-cu12", "nvidia-nccl-cu13")
COMMAND_LINE = {
    "version": "0.18.0",
    "flags": {
        "--tp": {"choices": None},
        "--log-level": {"choices": ["ERROR", "WARNING", "INFO"]},
        "--enable-prefix-caching": {"choices": None},
        "--quant-policy": {"choices": None},
        "--reasoning-parser": {"choices": None},
    },
    "chat_templates": ["base", "internvl-zh", "llama2"],
    "tool_call_parsers": ["qwen2d5", "qwen3"],
    "reasoning_parsers": ["default", "qwen-qwq"],
}
ROLES = frozenset({"mirrors", "miniconda", "conda_env", "model_weights", "api_server", "lmdeploy", "open_webui"})
CHECKOUT = Path(__file__).resolve().parents[2]
# What the roles compute from other variables, and a model that fits on the card of the host below.
COMPUTED: dict[str, Any] = {
    "miniconda_installer_url": "https://example.org/Miniconda3-py311_26.9.4-1-Linux-x86_64.sh",
    "miniconda_installer_sha256": "0" * 64,
    "lmdeploy_version": "0.18.0",
    "lmdeploy_env_name": "lmdeploy",
    "lmdeploy_lock": "/locks/lmdeploy-0.18.0.txt",
    "llama_cpp_lock": "/locks/xllamacpp.txt",
    "mirrors_conda_channels": ["conda-forge"],
    "model_weights_hub": "huggingface",
    "api_server_model": "OpenGVLab/InternVL3-8B",
    "api_server_models_dir": "/var/lib/models",
    "open_webui_lock": "/locks/open-webui.txt",
    "open_webui_offline": False,
    "open_webui_environment": {},
    "open_webui_admin_name": "Ann O'Neil",
}


def defaults() -> dict[str, Any]:
    """Return the defaults of all roles, those that Ansible must compute as above or left out."""
    found: dict[str, Any] = {}
    for path in sorted(CHECKOUT.glob("roles/*/defaults/main.yml")):
        for name, value in (yaml.safe_load(path.read_text()) or {}).items():
            if not (isinstance(value, str) and "{{" in value):
                found[name] = value
    return {**found, **COMPUTED}


VALUES = defaults()


def machine(name: str) -> facts.GpuFacts:
    """Return the cards of a folder in fixtures/nvidia_smi."""
    folder = MACHINES / name

    def text(file: str) -> str:
        return (folder / file).read_text() if (folder / file).exists() else ""

    assert folder.is_dir()
    cards, nodes = facts.parse_gpus(text("gpus.csv")), facts.parse_nodes(text("topology.txt"))
    for card in cards:
        card["numa"], card["cpus"] = nodes.get(card["index"], (-1, ""))
    return {
        "program": "/usr/bin/nvidia-smi",
        "error": text("error.txt").rstrip(),
        "pci_devices": 1,
        "cards": cards,
        "processes": facts.parse_gpu_processes(text("processes.csv")),
        "links": facts.parse_topology(text("topology.txt")),
        "lost": facts.parse_lost(text("gpus.csv")),
        "numa_nodes": max([node for node, _cpus in nodes.values()], default=0) + 1,
        "dealt": {},
    }


NO_CARD: facts.GpuFacts = {
    "program": "", "error": "", "pci_devices": 0, "cards": [], "processes": [], "links": [], "lost": [],
    "numa_nodes": 1, "dealt": {},
}  # fmt: skip


def path_facts(**changes: Any) -> facts.PathFacts:
    """Return a path on a large local disk."""
    plain: dict[str, Any] = {
        "exists": False,
        "nearest": "/",
        "device": 1,
        "file_system": "ext4",
        "free_bytes": 500 * GB,
        **changes,
    }
    return cast("facts.PathFacts", plain)


def host(**changes: Any) -> facts.Survey:
    """Return the survey of a host with one RTX 3090, a large disk and nothing installed."""
    environments = [f"/opt/miniconda3/envs/{name}" for name in ("lmdeploy", "llama-cpp", "open-webui")]
    places = ["/opt/miniconda3", *environments, "/var/lib/models", "/var/lib/open-webui/data"]
    plain: dict[str, Any] = {
        "time": 0.0,
        "is_root": True,
        "os_id": "ubuntu",
        "os_version": "24.04",
        "architecture": "x86_64",
        "libc_version": "2.39",
        "init": "systemd",
        "systemd_version": 255,
        "systemd_state": "running",
        "unprivileged_port": 1024,
        "memory_bytes": 64 * GIB,
        "memory_free_bytes": 60 * GIB,
        "shm_bytes": 32 * GIB,
        "wsl": {"is_wsl": False, "has_gpu_device": False, "conf_systemd": False, "linux_drivers": []},
        "gpu": machine("rtx3090"),
        "paths": {place: path_facts() for place in places},
        "listeners": [],
        "models": {},
        "environments": {},
        "units": {},
        "urls": {},
        "settled": {"trust": False, "conda": False, "packages": []},
        "watch": {"seen": "", "note": {}, "time": 1_700_000_000.0},
        **changes,
    }
    return cast("facts.Survey", plain)


def wish(engine: str = "lmdeploy", **values: Any) -> Desired:
    """Return what the inventory wants; values replace those of VALUES. Fields of Desired begin with an underscore."""
    fields = {name[1:]: values.pop(name) for name in list(values) if name.startswith("_")}
    return Desired(
        **{
            "host": "box",
            "roles": (ROLES - {"lmdeploy"}) | {engine},
            "values": {**copy.deepcopy(VALUES), **values},
            "engine": engine,
            "locks": {"lmdeploy_lock": LOCK} if engine == "lmdeploy" else {},
            "command_line": COMMAND_LINE if engine == "lmdeploy" else None,
            **fields,
        }
    )


def checks(desired: Desired, survey: facts.Survey | None = None) -> set[str]:
    """Return the ids of all findings."""
    return {finding.check for finding in judge(desired, survey)}


def the(check: str, desired: Desired, survey: facts.Survey | None = None) -> Finding:
    """Return the one finding of a check."""
    found = [finding for finding in judge(desired, survey) if finding.check == check]
    assert len(found) == 1, found
    return found[0]
