"""Preflight's checks of cards and memory, against outputs of nvidia-smi on many machines."""

from __future__ import annotations

from typing import Any

import preflight_hosts as hosts
import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import preflight_gpu as gpu
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_checks import judge, report
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_desired import Desired
from preflight_hosts import GIB, checks, host, machine, the, wish

WSL = {"is_wsl": True, "has_gpu_device": True, "conf_systemd": True, "linux_drivers": []}
SEED = "OpenGVLab/InternVL3-14B-Instruct"
AWQ = "OpenGVLab/InternVL3-14B-AWQ"
TINY = "OpenGVLab/InternVL3-1B"
CUDA_13 = {"lmdeploy_lock": hosts.LOCK_CUDA_13}
RUNNING = {"api-server.service": {"active": "active", "memory_bytes": 0}}


def on(name: str, **changes: Any) -> dict[str, Any]:
    """Return what is special about a host with these cards."""
    return {"gpu": machine(name), **changes}


def instances(*entries: dict[str, Any]) -> list[dict[str, Any]]:
    """Return instances of a small model with ports of their own."""
    return [{"name": f"i{n}", "port": 23333 + n, "model": TINY, **entry} for n, entry in enumerate(entries)]


# check, inventory, host, words that the person must read
FAULTS: list[tuple[str, Desired, dict[str, Any], list[str]]] = [
    ("gpu_missing", wish(), {"gpu": hosts.NO_CARD}, ["api_server_engine", "llama_cpp"]),
    ("gpu_missing", wish(), {"gpu": hosts.NO_CARD, "wsl": WSL}, ["on Windows"]),
    ("gpu_driver", wish(), {"gpu": {**hosts.NO_CARD, "pci_devices": 2}}, ["no driver", "525"]),
    ("gpu_driver", wish(_locks=CUDA_13), {"gpu": {**hosts.NO_CARD, "pci_devices": 2}}, ["580"]),
    ("gpu_driver", wish(), on("no_answer"), ["couldn't communicate"]),
    ("gpu_driver", wish(), on("version_mismatch"), ["Driver/library version mismatch", "restart"]),
    ("gpu_driver", wish(), on("rtx3090_driver510"), ["510.108.03", "CUDA 12", "525"]),
    ("gpu_driver", wish(api_server_model=TINY), on("gtx1080_driver470"), ["470.256.02"]),
    ("gpu_driver", wish(_locks=CUDA_13), on("a6000_pair_nvlink"), ["575.57.08", "CUDA 13", "580"]),
    ("gpu_driver", wish(_locks=CUDA_13), on("rtx5090_driver570"), ["570.86.16"]),
    ("compute_capability", wish(api_server_model=TINY), on("p100"), ["Tesla P100", "6.0", "7.0, 7.5"]),
    ("compute_capability", wish(_locks=CUDA_13), on("v100"), ["7.0", "CUDA 13"]),
    ("tp_gpus", wish(api_server_tp=2), on("rtx3090"), ["takes 2 cards", "the host has 1", "RTX 3090", "at most 1"]),
    ("tp_gpus", wish(api_server_tp=16), on("h100_8_nvlink"), ["16", "at most 8"]),
    ("tp_gpus", wish(api_server_tp=4, api_server_gpus=[0, 1]), on("h100_4_nvlink"), ["api_server_gpus names 2"]),
    ("tp_heads", wish(api_server_model=TINY, api_server_tp=4), on("h100_4_nvlink"), ["14 attention heads", "to 2"]),
    ("tp_heads", wish(api_server_tp=8), on("h100_8_nvlink"), ["api_server_tp = 8", "28 attention heads", "to 4"]),
    (
        "gpu_idle",
        wish(),
        on("h100_8_nvlink"),
        ["api_server_tp = auto", "takes 0, 1, 2, 3", "4, 5, 6, 7", "28 attention"],
    ),
    ("gpu_idle", wish(), on("mixed_4090_3090"), ["Of 2 cards it takes", "of another kind"]),
    ("gpu_idle", wish(), on("h100_mig"), ["it takes 1", "0 (NVIDIA H100 80GB HBM3) is in MIG mode"]),
    ("gpu_idle", wish(), on("wsl_rtx3090_pair", wsl=WSL), ["WSL", "NCCL"]),
    (
        "gpu_idle",
        wish(api_server_model=SEED),
        on("a6000_8_three_busy"),
        ["takes 0, 1, 2, 3", "5, 6, 7", "busy with others"],
    ),
    ("gpu_index", wish(api_server_gpus=[4]), on("h100_4_nvlink"), ["no card 4", "0 (NVIDIA H100"]),
    ("mig", wish(api_server_gpus=[0]), on("h100_mig"), ["MIG", "nvidia-smi -mig 0"]),
    ("gpu_lost", wish(api_server_model=TINY), on("rtx3090_4_one_gone"), ["nvidia-smi says", "0000:81:00.0", "Restart"]),
    (
        "gpu_lost",
        wish(api_server_gpus=[4, 5]),
        on("h100_8_one_lost"),
        ["api_server_gpus = [4, 5]", "Card 5 does not answer"],
    ),
    (
        "gpu_shared",
        wish(api_server_instances=instances({"cache_max_entry_count": 0.5}, {})),
        on("rtx3090"),
        [
            "api_server_cache_max_entry_count = None",
            "api-server-i0 and api-server-i1 share card 0",
            "0.5, unset (0.8)",
            "0.4",
        ],
    ),
    ("gpu_busy", wish(api_server_model=TINY), on("rtx4090_desktop"), ["2211", "8012 MiB", "3120 (python3, 604 MiB)"]),
    ("gpu_mixed", wish(api_server_tp=2), on("mixed_4090_3090"), ["RTX 3090", "RTX 4090"]),
    ("gpu_topology", wish(), on("rtx4090_4_two_sockets"), ["SYS", "api_server_tp"]),
    ("wsl_tp", wish(api_server_tp=2), on("wsl_rtx3090_pair", wsl=WSL), ["NCCL", "to 1"]),
    ("shm", wish(), on("rtx3090_pair", shm_bytes=64 * 2**20), ["/dev/shm", "0.06 GiB", "remount,size=2G"]),
    (
        "memory",
        wish(api_server_model=SEED),
        on("rtx3090"),
        ["api_server_model", SEED, "27.9 GiB of weights", "table of InternVL3 sizes", "24.0 GiB", "AWQ"],
    ),
    ("memory", wish(api_server_model="Qwen/Qwen2.5-72B-Instruct"), on("h100"), ["134.1 GiB", "its name tells"]),
    (
        "memory",
        wish(api_server_model=AWQ, api_server_session_len=131072),
        on("rtx3090"),
        ["api_server_session_len", "131072", "24.0 GiB for the session", "to 55296 or less"],
    ),
    ("memory", wish(api_server_model="org/unnamed"), on("rtx3090"), ["nobody knows"]),
    ("memory", wish(api_server_model=AWQ), on("rtx4090_desktop"), ["14.6 GiB"]),
    ("memory", wish("llama_cpp", api_server_model="/m/L-70B.Q8_0.gguf"), {}, ["70.3 GiB", "60.0", "its name tells"]),
    ("memory_host", wish(), on("rtx3090", memory_bytes=8 * GIB), ["8 GiB", "16 GiB"]),
    ("memory_host", wish(), on("rtx3090", memory_bytes=8 * GIB, wsl=WSL), [".wslconfig"]),
]


@pytest.mark.parametrize(
    ("check", "desired", "changes", "words"), FAULTS, ids=[f"{n}-{case[0]}" for n, case in enumerate(FAULTS)]
)
def test_a_fault_is_found_and_explained(
    check: str, desired: Desired, changes: dict[str, Any], words: list[str]
) -> None:
    text = report([the(check, desired, host(**changes))], "box")
    assert [word for word in words if word not in text] == []


# Machines on which the inventory passes without a word: model, further values, host, tp that is found.
GOOD: list[tuple[Desired, dict[str, Any], int]] = [
    (wish(), on("rtx3090"), 1),
    (wish(api_server_model=SEED), on("rtx3090_pair"), 2),
    (wish(api_server_model=SEED), on("a6000_pair_nvlink"), 2),
    (wish(api_server_model=SEED, api_server_tp=1), on("h100"), 1),
    (wish(api_server_model=AWQ), on("rtx4090"), 1),
    (wish(api_server_model=AWQ, _locks=CUDA_13), on("rtx5090"), 1),
    (wish(api_server_model=AWQ), on("rtx5090_driver570"), 1),
    (wish(), on("v100"), 1),
    (wish(api_server_model="OpenGVLab/InternVL3-78B"), on("h100_4_nvlink", memory_bytes=256 * GIB), 4),
    (wish(api_server_model="OpenGVLab/InternVL3-78B"), on("h100_8_nvlink", memory_bytes=256 * GIB), 8),
    (wish(api_server_tp=4), on("h100_8_nvlink"), 4),
    (wish(api_server_gpus=[2, 3]), on("rtx4090_4_two_sockets"), 2),
    (wish(api_server_gpus=[0]), on("mixed_4090_3090"), 1),
    (wish(api_server_gpus=[1]), on("h100_mig"), 1),
    (wish(api_server_gpus=[0, 1, 2, 3]), on("a6000_8_three_busy"), 4),
    (wish(), on("wsl_rtx3090_pair", wsl=WSL), 1),
    (wish("llama_cpp", api_server_model="/m/S-135M.Q4_1.gguf"), {"gpu": hosts.NO_CARD, "shm_bytes": 0}, 0),
]


@pytest.mark.parametrize(("desired", "changes", "tp"), GOOD)
def test_what_fits_passes(desired: Desired, changes: dict[str, Any], tp: int) -> None:
    survey = host(**changes)
    findings = [f for f in judge(desired, survey) if f.check not in {"gpu_idle", "gpu_topology"}]
    assert [report([finding], "") for finding in findings] == []
    if tp:
        assert [dealt.tp for _instance, dealt in gpu.layout(desired, survey)] == [tp]


@pytest.mark.parametrize(
    ("model", "name", "fits"),
    [
        # The table of facts: which model needs which cards.
        ("OpenGVLab/InternVL3-8B", "rtx3090", True),
        ("OpenGVLab/InternVL3-9B", "rtx3090", True),
        (SEED, "rtx3090", False),
        (SEED, "rtx3090_pair", True),
        (SEED, "a6000_pair_nvlink", True),
        (AWQ, "rtx3090", True),
        ("OpenGVLab/InternVL3-38B", "a6000_pair_nvlink", True),
        ("OpenGVLab/InternVL3-38B", "rtx4090_4_two_sockets", True),
        ("OpenGVLab/InternVL3-78B", "rtx4090_4_two_sockets", False),
        ("OpenGVLab/InternVL3-78B", "h100", False),
        ("OpenGVLab/InternVL3-78B", "h100_4_nvlink", True),
    ],
)
def test_the_published_table_of_models_and_cards(model: str, name: str, *, fits: bool) -> None:
    found = checks(wish(api_server_model=model), host(**on(name, memory_bytes=512 * GIB)))
    assert ("memory" not in found) is fits


def test_what_our_own_unit_holds_is_free_to_it() -> None:
    survey = host(**on("h200_pair_recorded"))
    first = survey["gpu"]["cards"][0]
    assert gpu.free_bytes(first, survey) == (143771 - 1643) * 2**20
    for process in survey["gpu"]["processes"]:
        process["unit"] = "api-server.service"
    assert gpu.free_bytes(first, survey) == (143771 - (1643 - 1634)) * 2**20


def test_on_wsl_nobody_knows_who_holds_memory() -> None:
    survey = host(**on("wsl_rtx4090", wsl=WSL))
    card = survey["gpu"]["cards"][0]
    assert gpu.free_bytes(card, survey) == (24564 - 1432) * 2**20
    survey["gpu"]["processes"][0]["unit"] = "api-server.service"
    assert gpu.free_bytes(card, survey) == 24564 * 2**20


def test_two_engines_on_one_card_need_cache_ratios_that_fit_together() -> None:
    # Whichever starts first takes 0.8 of what is free for its cache, and too little is left for the other.
    greedy = wish(api_server_instances=instances({"model": AWQ}, {"model": TINY}), api_server_tp=1)
    found = [finding for finding in judge(greedy, host(**on("rtx3090"))) if finding.check == "memory"]
    assert [finding.variable for finding in found] == [f"api_server_instances[i{n}].model" for n in (0, 1)]
    assert "It shares the card with api-server-i1.service: lower their cache_max_entry_count" in found[0].fix
    shared = instances({"model": TINY, "cache_max_entry_count": 0.4}, {"model": TINY, "cache_max_entry_count": 0.4})
    assert {"memory", "gpu_shared"}.isdisjoint(checks(wish(api_server_instances=shared), host(**on("rtx3090"))))


def test_others_on_all_cards_are_told_and_the_engine_runs_beside_them() -> None:
    desired, survey = wish(api_server_model=SEED), host(**on("h200_pair_recorded", units=RUNNING))
    assert checks(desired, survey) == {"gpu_busy"}
    for process in survey["gpu"]["processes"]:
        process["unit"] = "api-server.service"
    assert checks(desired, survey) == set()
    assert [list(dealt.gpus) for _instance, dealt in gpu.layout(desired, survey)] == [[0, 1]]


def test_cards_that_are_named_or_counted_leave_others_idle_without_a_word() -> None:
    for values in ({"api_server_tp": 2}, {"api_server_gpus": [0, 1]}):
        assert "gpu_idle" not in checks(wish(**values), host(**on("h100_8_nvlink")))


def test_cards_far_apart_are_told_by_their_node() -> None:
    # All links say SYS, and yet four cards are on one processor.
    assert "gpu_topology" not in checks(wish(), host(**on("rtx4090_8_sys")))
    seventy = wish(api_server_model="OpenGVLab/InternVL3-78B")
    found = the("gpu_topology", seventy, host(**on("rtx4090_8_sys", memory_bytes=512 * GIB)))
    assert "Its 8 cards are on several processors: 0 and 4 talk across" in found.message
    assert found.fix == "Set api_server_tp to 4 if that holds the model: then its cards are near each other."


def test_instances_side_by_side_on_their_own_cards() -> None:
    pairs = instances({"gpus": [0, 1], "model": SEED}, {"gpus": [2, 3], "model": SEED})
    desired, survey = wish(api_server_instances=pairs), host(**on("h100_4_nvlink"))
    assert checks(desired, survey) == set()
    assert [dealt.tp for _instance, dealt in gpu.layout(desired, survey)] == [2, 2]


def test_the_kv_cache_in_eight_bits_halves_a_session() -> None:
    values: dict[str, Any] = {"api_server_model": AWQ, "api_server_session_len": 65536}
    survey = host(**on("rtx3090"))
    assert "memory" in checks(wish(**values), survey)
    for arguments in (["--quant-policy", "8"], ["--quant-policy=int8"], ["--quant-policy", "int8"]):
        assert "memory" not in checks(wish(**values, api_server_extra_args=arguments), survey), arguments


@pytest.mark.parametrize(
    ("wanted", "changes", "engine"),
    [
        ("auto", on("rtx3090"), "lmdeploy"),
        ("auto", {"gpu": hosts.NO_CARD}, "llama_cpp"),
        ("auto", {"gpu": {**hosts.NO_CARD, "pci_devices": 1}}, "lmdeploy"),
        ("auto", on("no_answer"), "lmdeploy"),
        ("llama_cpp", on("rtx3090"), "llama_cpp"),
    ],
)
def test_auto_takes_lmdeploy_where_there_is_a_card(wanted: str, changes: dict[str, Any], engine: str) -> None:
    assert gpu.resolve_engine(wanted, host(**changes)) == engine


def test_the_cpu_engines_own_memory_is_free_to_it() -> None:
    desired = wish("llama_cpp", api_server_model="/m/L-7B.Q8_0.gguf")
    full = host(memory_free_bytes=4 * GIB, gpu=hosts.NO_CARD)
    assert "memory" in checks(desired, full)
    full["units"] = {"api-server.service": {"active": "active", "memory_bytes": 8 * GIB}}
    assert "memory" not in checks(desired, full)
