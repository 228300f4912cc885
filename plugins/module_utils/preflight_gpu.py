# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Checks of the engine against cards and memory. Pure, no Ansible.

Which cards an instance gets, and how many, is dealt by gpu_layout, which the role api_server asks as well.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from ansible_collections.selfhost.lmdeploy.plugins.module_utils.gpu_layout import (
    Dealt,
    Wanted,
    deal,
    idle_cards,
    layout_faults,
)
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


def size_of(desired: Desired, instance: Instance, survey: Survey) -> ModelSize | None:
    """Return what an instance's model needs."""
    model = instance.text("model")
    return estimate(model, survey["models"].get(desired.model_path(model)))


def _wanted(desired: Desired, survey: Survey) -> list[Wanted]:
    found = []
    for instance in desired.instances:
        fixed = instance.whole("tp")
        # What tp_form refuses is judged further as if it said auto, so that one slip is one finding.
        tp = fixed if fixed is not None and is_power_of_two(fixed) else None
        # Of a model over several hosts each host has its part.
        tp = tp and max(1, tp // max(1, len(desired.items("api_server_nodes"))))
        gpus = tuple(number for number in map(whole, instance.items("gpus")) if number is not None)
        found.append(Wanted(instance.unit, tp, gpus, size_of(desired, instance, survey), _given_ratio(instance)))
    return found


def layout(desired: Desired, survey: Survey) -> list[tuple[Instance, Dealt]]:
    """Return every instance with what it gets."""
    dealt = deal(_wanted(desired, survey), survey["gpu"], wsl=survey["wsl"]["is_wsl"])
    return list(zip(desired.instances, dealt, strict=True))


def cards_of(dealt: Dealt, survey: Survey) -> list[Gpu]:
    """Return the cards that an instance will compute on."""
    return [card for card in survey["gpu"]["cards"] if card["index"] in dealt.gpus]


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
    for instance, dealt in layout(desired, survey):
        for card in cards_of(dealt, survey):
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
    """tp_gpus, tp_heads, gpu_index, gpu_shared: the cards are there, and the model can be split over that many."""
    if not survey["gpu"]["cards"]:
        return
    wanted, dealt = _wanted(desired, survey), [got for _instance, got in layout(desired, survey)]
    for fault in layout_faults(wanted, dealt, survey["gpu"]):
        instance = desired.instances[fault.number]
        names = {key: instance.variable(key) for key in ("tp", "gpus", "cache_max_entry_count")}
        value = {"gpus": instance.items("gpus"), "tp": _asked(instance)[1]}.get(
            fault.setting, instance.get(fault.setting)
        )
        why, fix = fault.why.format(**names), fault.fix.format(**names)
        yield desired.fault(fault.check, names[fault.setting], value, why, fix)
    for instance, got in layout(desired, survey):
        variable, value = _asked(instance)
        size = size_of(desired, instance, survey)
        if size and not tp_fits_heads(got.tp, size.heads, size.kv_heads):
            why = (
                f"{instance.text('model')} has {size.heads} attention heads and {size.kv_heads} KV heads (from "
                f"{size.source}), which can't be split over {got.tp} cards."
            )
            fix = f"Set {variable} to {automatic_tp(got.tp, size.heads, size.kv_heads)}."
            yield desired.fault("tp_heads", variable, value, why, fix)


def check_idle_cards(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """gpu_lost, gpu_idle: every card answers, and is used where the inventory leaves that to us."""
    gpu = survey["gpu"]
    for said in gpu["lost"]:
        why = f"A card of the host is lost, and the engine goes on without it. nvidia-smi says: {said}"
        fix = "Restart the host; a card that is lost again has a fault, in its seat, its power supply or itself."
        yield desired.warning("gpu_lost", "api_server_gpus", desired.items("api_server_gpus"), why, fix)
    wanted, dealt = _wanted(desired, survey), [got for _instance, got in layout(desired, survey)]
    idle = idle_cards(wanted, dealt, gpu, wsl=survey["wsl"]["is_wsl"])
    if not idle:
        return
    pairs = zip(desired.instances, wanted, strict=True)
    instance = next((each for each, want in pairs if not want.gpus and not want.tp), desired.instances[0])
    variable, value = _asked(instance)
    reasons: dict[str, list[str]] = {}
    for card in idle:
        reasons.setdefault(card.reason, []).append(str(card.index))
    names = {card["index"]: card["name"] for card in gpu["cards"]}
    parts = [f"{', '.join(numbers)} ({names[int(numbers[0])]}) {reason}" for reason, numbers in reasons.items()]
    used = ", ".join(str(number) for got in dealt for number in got.gpus)
    why = f"Of {len(gpu['cards'])} cards it takes {used or 'none'}. Of the rest, " + "; ".join(parts) + "."
    fix = f"Nothing, if that is meant; then set {variable} and {instance.variable('gpus')}, and this ends."
    if any("left over" in card.reason for card in idle):
        fix += " Further engines (api_server_instances) can use cards that are left over."
    yield desired.warning("gpu_idle", variable, value, why, fix)


def check_mig(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """mig: a sliced card is not the card that its size promises."""
    for instance, dealt in layout(desired, survey):
        sliced = [card for card in cards_of(dealt, survey) if card["mig"]]
        if not sliced:
            continue
        why = f"Card {sliced[0]['index']} ({sliced[0]['name']}) is in MIG mode: it is cut into slices."
        fix = f"Name cards without MIG in {instance.variable('gpus')}, or turn it off (nvidia-smi -mig 0)."
        yield desired.fault("mig", instance.variable("gpus"), instance.items("gpus"), why, fix)


def check_busy_cards(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """gpu_busy: others compute on the engine's cards."""
    for instance, dealt in layout(desired, survey):
        for card in cards_of(dealt, survey):
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
    for instance, dealt in layout(desired, survey):
        cards = cards_of(dealt, survey)
        variable, value = _asked(instance)
        if len(cards) < 2:
            continue
        names = sorted({card["name"] for card in cards})
        if len(names) > 1:
            why = f"The cards differ ({', '.join(names)}): all wait for the slowest and hold what the smallest can."
            yield desired.warning(
                "gpu_mixed", variable, value, why, f"Name equal cards in {instance.variable('gpus')}."
            )
        node = {card["index"]: card["numa"] for card in cards}
        # Some boards say SYS also for cards on one processor.
        far = [
            link
            for link in survey["gpu"]["links"]
            if link["link"] == "SYS"
            and {link["first"], link["second"]} <= node.keys()
            and (node[link["first"]] != node[link["second"]] or node[link["first"]] < 0)
        ]
        if far:
            why = (
                f"Its {len(cards)} cards are on several processors: {far[0]['first']} and {far[0]['second']} talk "
                "across (SYS in nvidia-smi topo -m), which costs speed."
            )
            fix = f"Set {variable} to {len(cards) // 2} if that holds the model: then its cards are near each other."
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


def _given_ratio(instance: Instance) -> float | None:
    try:
        ratio = float(instance.text("cache_max_entry_count"))
    except ValueError:
        return None
    return ratio if 0 < ratio < 1 else None


def _ratio(instance: Instance) -> float:
    return _given_ratio(instance) or CACHE_RATIO


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


def _left_by(others: list[tuple[ModelSize, int, float]], room: float) -> float:
    """Return what engines that came first leave of a card: each its weights, and of what it then finds its cache."""
    for size, tp, ratio in others:
        room = max(0.0, room - size.weight_bytes / tp - WORKSPACE_BYTES) * (1 - ratio)
    return room


def check_card_memory(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """memory: weights, room to work and one whole session fit on the cards, also for the engine that starts last."""
    free = {card["index"]: float(free_bytes(card, survey)) for card in survey["gpu"]["cards"]}
    layed = [(each, got, size_of(desired, each, survey)) for each, got in layout(desired, survey)]
    for number, (instance, dealt, size) in enumerate(layed):
        cards = cards_of(dealt, survey)
        if not cards or len(cards) < dealt.tp or any(card["mig"] or card["fault"] for card in cards):
            continue  # reported as tp_gpus, mig or gpu_lost
        if size is None:
            why = "Neither files on the host nor the name tell how large it is, so nobody knows whether it fits."
            fix = "Fetch it first, or put its size into the name of the folder (such as my-model-7B)."
            yield desired.warning("memory", instance.variable("model"), instance.text("model"), why, fix)
            continue
        room, shared = {}, {}
        for card in cards:
            others = [
                (each, other, got.tp)
                for place, (each, got, other) in enumerate(layed)
                if place != number and card["index"] in got.gpus and other is not None
            ]
            shared[card["index"]] = [each.unit for each, _size, _tp in others]
            taken = [(other, tp, _ratio(each)) for each, other, tp in others]
            room[card["index"]] = _left_by(taken, free[card["index"]])
        tightest = min(cards, key=lambda card: room[card["index"]])
        where = f"card {tightest['index']} ({tightest['name']}, {tightest['memory_mib'] / 1024:.0f} GiB)"
        finding = _judge_memory(desired, instance, size, dealt.tp, room[tightest["index"]], where)
        if finding and shared[tightest["index"]]:
            units = " and ".join(shared[tightest["index"]])
            hint = f" It shares the card with {units}: lower their cache_max_entry_count."
            finding = replace(finding, fix=finding.fix + hint)
        if finding:
            yield finding


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
    check_idle_cards,
    check_mig,
    check_busy_cards,
    check_joins,
    check_card_memory,
    check_host_memory,
)
CPU_CHECKS = (check_cpu_memory,)
