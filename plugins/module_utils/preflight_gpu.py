# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Checks of the engine against cards and memory. Pure, no Ansible.

A card is used by an instance when it is one of its ``gpus``, or, without that list, one of the first ``tp`` cards.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from ansible_collections.selfhost.lmdeploy.plugins.module_utils.engine import tensor_parallel
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.model_memory import (
    GIB,
    WORKSPACE_BYTES,
    ModelSize,
    automatic_tp,
    estimate,
    kv_share_per_card,
    tp_fits_heads,
)
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_desired import (
    Desired,
    Finding,
    Instance,
    is_power_of_two,
    version_key,
    whole,
)
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_host import is_own_unit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_survey import Gpu, Survey

# The oldest driver that runs programs of a CUDA release: NVIDIA's table of minor version compatibility.
DRIVERS = {"12": 525, "13": 580}
# What LMDeploy's wheel carries code for. Code for 8.0 runs on 8.6 too: same first number, same or later second.
CAPABILITIES = ((7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
# CUDA 13 has no code for Volta.
CAPABILITIES_CUDA_13 = CAPABILITIES[1:]
SHM_BYTES = GIB
CACHE_RATIO = 0.8
HOST_MEMORY_BYTES = 16 * GIB
LLAMA_CPP_BYTES = GIB // 2


def resolve_engine(wanted: str, survey: Survey) -> str:
    """Return the engine that ``auto`` means here: LMDeploy where there is an NVIDIA card, driver or not."""
    if wanted in {"lmdeploy", "llama_cpp"}:
        return wanted
    gpu = survey["gpu"]
    return "lmdeploy" if gpu["cards"] or gpu["pci_devices"] or gpu["program"] else "llama_cpp"


def cards_of(instance: Instance, survey: Survey) -> list[Gpu]:
    """Return the cards that an instance may use: those that it names, else all."""
    named = instance.items("gpus")
    return [card for card in survey["gpu"]["cards"] if not named or card["index"] in named]


def size_of(desired: Desired, instance: Instance, survey: Survey) -> ModelSize | None:
    """Return what an instance's model needs."""
    model = instance.text("model")
    return estimate(model, survey["models"].get(desired.model_path(model)))


def tp_of(instance: Instance, survey: Survey) -> int:
    """Return the number of cards of an instance, as the role api_server settles it."""
    fixed = instance.whole("tp")
    # What tp_form refuses is judged further as if it said auto, so that one slip is one finding.
    if fixed is not None and is_power_of_two(fixed):
        return fixed
    return tensor_parallel("auto", len(cards_of(instance, survey)), wsl=survey["wsl"]["is_wsl"])


def used_cards(instance: Instance, survey: Survey) -> list[Gpu]:
    """Return the cards that an instance will compute on."""
    return cards_of(instance, survey)[: tp_of(instance, survey)]


def cuda_of(desired: Desired) -> str:
    """Return the CUDA release of the locked wheels, "12" or "13"."""
    lock = desired.locks.get("lmdeploy_lock") or ""
    return "13" if re.search(r"^nvidia-[a-z0-9-]+-cu13==", lock, re.MULTILINE) else "12"


def check_driver(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """gpu_missing, gpu_driver: there is a card, and its driver answers and is new enough."""
    gpu, engine = survey["gpu"], desired.text("api_server_engine")
    where = "on Windows (never inside WSL)" if survey["wsl"]["is_wsl"] else "on the host"
    need = DRIVERS[cuda_of(desired)]
    if not gpu["program"] and not gpu["pci_devices"]:
        why = "LMDeploy needs an NVIDIA card, and this host shows none."
        fix = "Set api_server_engine to llama_cpp for this host, or take a host with a card."
        if survey["wsl"]["is_wsl"]:
            fix = f"Install NVIDIA's driver {where} if there is a card, else set api_server_engine to llama_cpp."
        yield desired.fault("gpu_missing", "api_server_engine", engine, why, fix)
    elif not gpu["program"]:
        why = f"There is an NVIDIA card but no driver: nvidia-smi is not on the host ({gpu['pci_devices']} on the bus)."
        fix = f"Install NVIDIA's driver {need} or later {where}, or set api_server_engine to llama_cpp."
        yield desired.fault("gpu_driver", "api_server_engine", engine, why, fix)
    elif not gpu["cards"]:
        said = " ".join((gpu["error"] or "it lists no card").split())
        why = f"The driver does not answer. {gpu['program']} says: {said}"
        fix = f"Install NVIDIA's driver {need} or later {where}; after an update of the driver, restart."
        yield desired.fault("gpu_driver", "api_server_engine", engine, why, fix)
    else:
        driver = gpu["cards"][0]["driver"]
        key = version_key(driver)
        if key and key[0] < need:
            why = f"The driver is {driver}; wheels for CUDA {cuda_of(desired)} need {need} or later."
            fix = f"Install a driver from {need} on {where}."
            yield desired.fault("gpu_driver", "api_server_engine", engine, why, fix)


def check_capability(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """compute_capability: the wheels carry code for the cards."""
    cuda = cuda_of(desired)
    known = CAPABILITIES_CUDA_13 if cuda == "13" else CAPABILITIES
    for instance in desired.instances:
        for card in used_cards(instance, survey):
            key = version_key(card["compute_capability"])
            if key is None or any(key[0] == major and key[1] >= minor for major, minor in known):
                continue
            listed = ", ".join(f"{major}.{minor}" for major, minor in known)
            why = (
                f"Card {card['index']} ({card['name']}) has compute capability {card['compute_capability']}; the "
                f"wheels for CUDA {cuda} carry code for {listed}."
            )
            fix = f"Name other cards in {instance.variable('gpus')}, or set api_server_engine to llama_cpp."
            yield desired.fault("compute_capability", instance.variable("gpus"), instance.items("gpus"), why, fix)
            break


def _asked(instance: Instance) -> tuple[str, str]:
    return instance.variable("tp"), instance.text("tp") or "auto"


def check_tp(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """tp_gpus, tp_heads, gpu_index: the cards are there, and the model can be split over that many."""
    cards = survey["gpu"]["cards"]
    if not cards:
        return
    listed = ", ".join(f"{card['index']} ({card['name']})" for card in cards)
    for instance in desired.instances:
        variable, value = _asked(instance)
        mine = cards_of(instance, survey)
        named = instance.items("gpus")
        unknown = [str(number) for number in named if number not in [card["index"] for card in cards]]
        if unknown:
            why = f"There is no card {', '.join(unknown)}; the host has {listed}."
            yield desired.fault(
                "gpu_index", instance.variable("gpus"), instance.items("gpus"), why, "Name cards of these."
            )
            continue
        tp = tp_of(instance, survey)
        if tp > len(mine):
            which = f"{instance.variable('gpus')} names {len(mine)}" if named else f"the host has {len(mine)}: {listed}"
            fix = f"Set {variable} to auto, or to at most {automatic_tp(len(mine))}."
            yield desired.fault("tp_gpus", variable, value, f"It takes {tp} cards, and {which}.", fix)
        size = size_of(desired, instance, survey)
        if size and not tp_fits_heads(tp, size.heads, size.kv_heads):
            why = (
                f"{instance.text('model')} has {size.heads} attention heads and {size.kv_heads} KV heads (from "
                f"{size.source}), which can't be split over {tp} cards."
            )
            fix = f"Set {variable} to {automatic_tp(tp, size.heads, size.kv_heads)}."
            yield desired.fault("tp_heads", variable, value, why, fix)


def check_mig(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """mig: a sliced card is not the card that its size promises."""
    for instance in desired.instances:
        sliced = [card for card in used_cards(instance, survey) if card["mig"]]
        if not sliced:
            continue
        why = f"Card {sliced[0]['index']} ({sliced[0]['name']}) is in MIG mode: it is cut into slices."
        fix = f"Name cards without MIG in {instance.variable('gpus')}, or turn it off (nvidia-smi -mig 0)."
        yield desired.fault("mig", instance.variable("gpus"), instance.items("gpus"), why, fix)


def check_busy_cards(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """gpu_busy: others compute on the engine's cards."""
    for instance in desired.instances:
        for card in used_cards(instance, survey):
            others = [
                process
                for process in survey["gpu"]["processes"]
                if process["uuid"] == card["uuid"] and not is_own_unit(process["unit"])
            ]
            if not others:
                continue
            named = ", ".join(
                f"{process['pid']} ({process['process'].rsplit('/', 1)[-1]}"
                + (f", {process['used_mib']} MiB)" if process["used_mib"] >= 0 else ")")
                for process in others[:5]
            )
            why = f"On card {card['index']} ({card['name']}) other processes compute: {named}."
            fix = f"Stop them, or name other cards in {instance.variable('gpus')}."
            yield desired.warning("gpu_busy", instance.variable("gpus"), instance.items("gpus"), why, fix)


def check_joins(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """gpu_mixed, gpu_topology, wsl_tp, shm: what makes several cards slow or silent together."""
    for instance in desired.instances:
        cards = used_cards(instance, survey)
        variable, value = _asked(instance)
        if len(cards) < 2:
            continue
        names = sorted({card["name"] for card in cards})
        if len(names) > 1:
            why = f"The cards differ ({', '.join(names)}): all wait for the slowest and hold what the smallest can."
            yield desired.warning(
                "gpu_mixed", variable, value, why, f"Name equal cards in {instance.variable('gpus')}."
            )
        used = {card["index"] for card in cards}
        far = [
            link for link in survey["gpu"]["links"] if link["link"] == "SYS" and {link["first"], link["second"]} <= used
        ]
        if far:
            why = f"Cards {far[0]['first']} and {far[0]['second']} talk across processors (SYS in nvidia-smi topo -m)."
            fix = f"Name cards of one processor in {instance.variable('gpus')} if a smaller tp holds the model."
            yield desired.warning("gpu_topology", variable, value, why, fix)
        if survey["wsl"]["is_wsl"]:
            why = "On WSL the cards can't share memory as NCCL wants it: several at once often hang."
            yield desired.warning(
                "wsl_tp", variable, value, why, f"Set {variable} to 1, or to auto, which is 1 on WSL."
            )
        if survey["shm_bytes"] < SHM_BYTES:
            why = f"The shared memory /dev/shm holds {survey['shm_bytes'] / GIB:.2f} GiB, and NCCL wants 1 GiB."
            yield desired.fault(
                "shm", variable, value, why, "Enlarge it: mount -o remount,size=2G /dev/shm, and in fstab."
            )


def free_bytes(card: Gpu, survey: Survey) -> int:
    """Return what a card can give the engine: all but what others hold; our own unit's part is free to it."""
    processes = [process for process in survey["gpu"]["processes"] if process["uuid"] == card["uuid"]]
    own = [process["used_mib"] for process in processes if is_own_unit(process["unit"])]
    runs = any(facts["active"] == "active" for name, facts in survey["units"].items() if name.startswith("api-server"))
    # WSL and MIG don't tell who holds what.
    untold = min(own, default=0) < 0 or (not processes and runs)
    held = 0 if untold else max(0, card["used_mib"] - sum(own))
    return (card["memory_mib"] - held) * 2**20


def _quant_policy(instance: Instance) -> int:
    given = dict(instance.flags()).get("--quant-policy", "")
    return {"int8": 8, "int4": 4}.get(given, whole(given) or 0)


def _ratio(instance: Instance) -> float:
    try:
        ratio = float(instance.text("cache_max_entry_count") or CACHE_RATIO)
    except ValueError:
        return CACHE_RATIO
    return ratio if 0 < ratio < 1 else CACHE_RATIO


def _judge_memory(
    desired: Desired, instance: Instance, size: ModelSize, tp: int, room: float, where: str
) -> Finding | None:
    """Judge an instance that finds ``room`` bytes on its tightest card."""
    weights = size.weight_bytes / tp + WORKSPACE_BYTES
    session = instance.whole("session_len") or size.max_session
    token = kv_share_per_card(size, tp, _quant_policy(instance))
    pool = max(0.0, room - weights) * _ratio(instance)
    text = (
        f"each of its {tp} card(s) must hold {size.weight_bytes / tp / GIB:.1f} GiB of weights (from {size.source}) "
        f"and {WORKSPACE_BYTES / GIB:.1f} GiB to work in"
    )
    model = instance.text("model")
    if weights > room:
        why = f"It does not fit: {text}, but {where} has {room / GIB:.1f} GiB for it."
        fix = f"Take a smaller or an AWQ model, or raise {instance.variable('tp')} if there are more cards."
        return desired.fault("memory", instance.variable("model"), model, why, fix)
    if token * session > pool:
        possible = int(pool / token) // 1024 * 1024
        why = (
            f"A session of {session} tokens does not fit: {text}, and {token * session / GIB:.1f} GiB for the session, "
            f"but {where} has {room / GIB:.1f} GiB, of which {pool / GIB:.1f} remain for sessions (cache ratio "
            f"{_ratio(instance):g})."
        )
        fix = f"Set {instance.variable('session_len')} to {possible} or less, or raise {instance.variable('tp')}."
        if possible < 1024:
            fix = f"Take a smaller or an AWQ model, or raise {instance.variable('tp')} if there are more cards."
        return desired.fault("memory", instance.variable("session_len"), session, why, fix)
    return None


def check_card_memory(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """memory: weights, room to work and one whole session fit on the cards, all instances of the host together."""
    room = {card["uuid"]: float(free_bytes(card, survey)) for card in survey["gpu"]["cards"]}
    shared: dict[str, str] = {}
    for instance in desired.instances:
        cards, tp = used_cards(instance, survey), tp_of(instance, survey)
        if not cards or len(cards) < tp or any(card["mig"] for card in cards):
            continue  # reported as tp_gpus or mig
        size = size_of(desired, instance, survey)
        if size is None:
            why = "Neither files on the host nor the name tell how large it is, so nobody knows whether it fits."
            fix = "Fetch it first, or put its size into the name of the folder (such as my-model-7B)."
            yield desired.warning("memory", instance.variable("model"), instance.text("model"), why, fix)
            continue
        tightest = min(cards, key=lambda card: room[card["uuid"]])
        where = f"card {tightest['index']} ({tightest['name']}, {tightest['memory_mib'] / 1024:.0f} GiB)"
        finding = _judge_memory(desired, instance, size, tp, room[tightest["uuid"]], where)
        if finding and tightest["uuid"] in shared:
            hint = f" {shared[tightest['uuid']]} is on the same card: lower its cache_max_entry_count."
            finding = replace(finding, fix=finding.fix + hint)
        if finding:
            yield finding
        for card in cards:
            # The engine takes its share of what is free for the cache, so that much is gone for the next instance.
            left = max(0.0, room[card["uuid"]] - size.weight_bytes / tp - WORKSPACE_BYTES)
            room[card["uuid"]] = left * (1 - _ratio(instance))
            shared[card["uuid"]] = instance.unit


def check_host_memory(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """memory_host: weights pass through the host's memory on their way to the cards."""
    sizes = [size for size in (size_of(desired, each, survey) for each in desired.instances) if size]
    largest = max((size.weight_bytes for size in sizes), default=0)
    wanted = max(HOST_MEMORY_BYTES, largest // 2)
    # Firmware and kernel keep a part of what the machine is sold with.
    if survey["memory_bytes"] < wanted * 0.9:
        has, advised = survey["memory_bytes"] / GIB, wanted / GIB
        why = f"The host has {has:.0f} GiB of memory; {advised:.0f} GiB are advised to load this."
        fix = "Add memory or swap."
        if survey["wsl"]["is_wsl"]:
            fix = "WSL gets half of the machine's memory: raise memory= below [wsl2] in .wslconfig on Windows."
        instance = desired.instances[0]
        yield desired.warning("memory_host", instance.variable("model"), instance.text("model"), why, fix)


def check_cpu_memory(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """memory: the CPU engine's models fit into the host's memory, all instances together."""
    own = sum(facts["memory_bytes"] for name, facts in survey["units"].items() if name.startswith("api-server"))
    room = survey["memory_free_bytes"] + own
    for instance in desired.instances:
        size = size_of(desired, instance, survey)
        # What is no GGUF file is reported as model_format.
        if size is None or not instance.text("model").lower().endswith(".gguf"):
            continue
        need = size.weight_bytes + LLAMA_CPP_BYTES
        if need > room:
            why = (
                f"It needs about {need / GIB:.1f} GiB of memory (from {size.source}), and {room / GIB:.1f} of the "
                f"host's {survey['memory_bytes'] / GIB:.1f} GiB are free for it."
            )
            fix = "Take a smaller or more tightly quantised model, or a host with more memory."
            yield desired.fault("memory", instance.variable("model"), instance.text("model"), why, fix)
        room -= need


GPU_CHECKS = (
    check_driver,
    check_capability,
    check_tp,
    check_mig,
    check_busy_cards,
    check_joins,
    check_card_memory,
    check_host_memory,
)
CPU_CHECKS = (check_cpu_memory,)
