"""Which cards engines get: on machines of 4 and 8 cards as nvidia-smi tells them, and on any that can be thought of."""

from __future__ import annotations

import re
from itertools import combinations
from typing import TYPE_CHECKING, Any

import preflight_hosts as hosts
import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import gpu_layout, model_memory
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.gpu_layout import Wanted, deal
from hypothesis import given
from hypothesis import strategies as st

if TYPE_CHECKING:
    from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_survey import Gpu, GpuFacts

SEVENTY_B = model_memory.from_table("InternVL3-78B")  # 64 heads, 8 KV heads
EIGHT_B = model_memory.from_table("InternVL3-8B")  # 28 heads, 4 KV heads
FOURTEEN_B = model_memory.from_table("InternVL3-14B")


def want(*tps: int | None, **changes: Any) -> list[Wanted]:
    """Return engines with these tp, None for auto."""
    return [Wanted(f"api-server-{number}.service", tp, **changes) for number, tp in enumerate(tps)]


def groups(gpu: GpuFacts, *wanted: Wanted, wsl: bool = False) -> list[list[int]]:
    """Return the numbers of the cards of each engine."""
    return [list(each.gpus) for each in deal(wanted, gpu, wsl=wsl)]


ALONE: list[tuple[str, Any, list[int]]] = [
    # All that there are, where the heads allow it.
    ("h100_8_nvlink", SEVENTY_B, [0, 1, 2, 3, 4, 5, 6, 7]),
    ("a100_8_four_nodes", SEVENTY_B, [0, 1, 2, 3, 4, 5, 6, 7]),
    ("v100_4_no_nodes", SEVENTY_B, [0, 1, 2, 3]),
    # 28 heads can't be cut in eight: four on one node.
    ("h100_8_nvlink", EIGHT_B, [0, 1, 2, 3]),
    ("v100_8_mesh", EIGHT_B, [0, 1, 2, 3]),
    ("rtx4090_8_sys", EIGHT_B, [0, 1, 2, 3]),
    # Seven are no power of two, six neither.
    ("h100_8_one_lost", SEVENTY_B, [0, 1, 2, 3]),
    ("h100_8_some_mig", SEVENTY_B, [0, 1, 2, 3]),
    ("a6000_8_three_busy", SEVENTY_B, [0, 1, 2, 3]),
    ("rtx3090_4_one_gone", EIGHT_B, [0, 1]),
    # Equal cards: two 5090 rather than three 4090, which make two only.
    ("mixed_5090_4090", EIGHT_B, [0, 1]),
    # ... but what two 5090 don't hold gets four cards, unequal ones, with a warning.
    ("mixed_5090_4090", model_memory.from_table("InternVL3-38B"), [1, 2, 3, 4]),
    ("rtx3090", None, [0]),
    ("h100_mig", SEVENTY_B, [1]),
]


@pytest.mark.parametrize(("name", "size", "cards"), ALONE, ids=[f"{n}-{case[0]}" for n, case in enumerate(ALONE)])
def test_one_engine_gets_the_largest_power_of_two(name: str, size: Any, cards: list[int]) -> None:
    (dealt,) = deal(want(None, size=size), hosts.machine(name), wsl=False)
    assert (list(dealt.gpus), dealt.tp) == (cards, len(cards))


def test_on_wsl_auto_is_one_and_a_number_is_meant() -> None:
    pair = hosts.machine("wsl_rtx3090_pair")
    assert groups(pair, *want(None), wsl=True) == [[0]]
    assert groups(pair, *want(None, None), wsl=True) == [[0], [1]]
    assert groups(pair, *want(2), wsl=True) == [[0, 1]]


SEVERAL: list[tuple[str, tuple[int | None, ...], list[list[int]]]] = [
    # NVLink pairs stay together, whichever comes first.
    ("a6000_8_pairs", (2, 2), [[0, 1], [2, 3]]),
    ("a6000_8_pairs", (1, 2), [[2], [0, 1]]),
    ("a6000_8_pairs", (4, 2, 1), [[0, 1, 2, 3], [4, 5], [6]]),
    ("a6000_8_pairs", (1, 1, 1, 1), [[0], [1], [2], [3]]),
    ("rtx3090_8_switches", (2, 4, 2), [[4, 5], [0, 1, 2, 3], [6, 7]]),
    # The mesh of the V100: pairs with two lanes, fours that are joined each with each.
    ("v100_8_mesh", (2,), [[0, 3]]),
    ("v100_8_mesh", (4, 4), [[0, 1, 2, 3], [4, 5, 6, 7]]),
    # Everything says SYS: the node tells who is near.
    ("rtx4090_8_sys", (4, 4), [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("rtx4090_8_sys", (2, None), [[4, 5], [0, 1, 2, 3]]),
    # One node of four for each.
    ("a100_8_four_nodes", (2, 2, 2, 2), [[2, 3], [6, 7], [4, 5], [0, 1]]),
    # auto takes fair shares of what is left.
    ("h100_8_nvlink", (None, None), [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("h100_4_nvlink", (None, None, None, None), [[0], [1], [2], [3]]),
    ("h100_8_nvlink", (None, None, None), [[4, 5], [6, 7], [0, 1, 2, 3]]),
    # A number may need unequal or busy cards, which is a warning elsewhere.
    ("mixed_5090_4090", (4,), [[1, 2, 3, 4]]),
    ("a6000_8_three_busy", (8,), [[0, 1, 2, 3, 4, 5, 6, 7]]),
    # Too few cards: they are shared, least used first.
    ("rtx3090", (1, 1), [[0], [0]]),
    ("rtx3090_pair", (2, 1), [[0, 1], [0]]),
    ("rtx3090_pair", (1, 1, 1), [[0], [1], [0]]),
]


@pytest.mark.parametrize(("name", "tps", "cards"), SEVERAL, ids=[f"{n}-{case[0]}" for n, case in enumerate(SEVERAL)])
def test_several_engines_stay_near_and_apart(name: str, tps: tuple[int | None, ...], cards: list[list[int]]) -> None:
    found = groups(hosts.machine(name), *want(*tps))
    if name == "a100_8_four_nodes":  # any pair of one node will do, each once
        assert sorted(found) == sorted(cards)
    elif tps == (None, None, None):
        assert sorted(map(len, found)) == [2, 2, 4]
    else:
        assert found == cards


def test_named_cards_are_kept_and_taken_from_the_others() -> None:
    gpu = hosts.machine("a6000_8_pairs")
    named, other = Wanted("api-server-a.service", None, (0, 3)), Wanted("api-server-b.service", 2)
    assert groups(gpu, named, other) == [[0, 3], [4, 5]]
    assert groups(gpu, Wanted("a", 2, (1, 4, 5))) == [[4, 5]], "of three that are named, the two that are joined"


def test_an_engine_keeps_the_cards_that_its_unit_has() -> None:
    gpu = hosts.machine("a6000_8_pairs")
    gpu["dealt"] = {"api-server-0.service": [6, 7], "api-server-1.service": [4, 5], "api-server-9.service": [0, 1]}
    assert groups(gpu, *want(2, 2)) == [[6, 7], [4, 5]]
    # Also when others begin to compute there.
    gpu["processes"] = [{"uuid": gpu["cards"][6]["uuid"], "pid": 1, "process": "x", "used_mib": 1, "unit": ""}]
    assert groups(gpu, *want(2, 2)) == [[6, 7], [4, 5]]
    # Where keeping them would leave no room for a larger engine, they move.
    gpu["dealt"] = {"api-server-0.service": [0]}
    four = hosts.machine("rtx4090_4_two_sockets")
    four["dealt"] = {"api-server-0.service": [1, 2]}
    assert groups(four, *want(2, 2)) == [[1, 2], [0, 3]]
    assert groups(four, *want(4)) == [[0, 1, 2, 3]]


def test_a_card_that_is_lost_is_not_kept() -> None:
    gpu = hosts.machine("h100_8_one_lost")
    assert [card["fault"] for card in gpu["cards"]].count("GPU is lost") == 1
    assert gpu["cards"][5]["index"] == 5
    gpu["dealt"] = {"api-server-0.service": [4, 5]}
    assert groups(gpu, *want(2)) == [[4, 6]], "of the node that has but three left; the four of the other stay together"


# -- what can't run ---------------------------------------------------------------------------------------------------


def faults(gpu: GpuFacts, *wanted: Wanted) -> list[tuple[str, str]]:
    """Return check and text of every fault."""
    found = gpu_layout.layout_faults(wanted, deal(wanted, gpu, wsl=False), gpu)
    return [(fault.check, f"{fault.why} {fault.fix}") for fault in found]


def test_too_few_cards_and_cards_that_are_not_there_are_told() -> None:
    ((check, text),) = faults(hosts.machine("h100_4_nvlink"), *want(8))
    assert check == "tp_gpus"
    assert "It takes 8 cards, and the host has 4: 0 (NVIDIA H100 80GB HBM3)" in text
    assert text.endswith("Set {tp} to auto, or to at most 4.")
    ((check, text),) = faults(hosts.machine("h100_4_nvlink"), Wanted("a", None, (3, 9)))
    assert (check, text.split(";")[0]) == ("gpu_index", "There is no card 9")
    ((check, text),) = faults(hosts.machine("h100_8_one_lost"), Wanted("a", 2, (4, 5)))
    assert (check, text.split(".")[0]) == ("gpu_lost", "Card 5 does not answer: GPU is lost")


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ((None, None), "unset (0.8), unset (0.8)"),
        ((0.4, None), "0.4, unset (0.8)"),
        ((0.7, 0.5), "0.7, 0.5"),
        ((0.4, 0.4), ""),
    ],
)
def test_engines_that_share_a_card_need_ratios_that_fit_together(ratios: tuple[float | None, ...], said: str) -> None:
    wanted = [Wanted(f"api-server-{number}.service", 1, ratio=ratio) for number, ratio in enumerate(ratios)]
    found = faults(hosts.machine("rtx3090"), *wanted)
    assert len(found) == bool(said)
    for check, text in found:
        assert check == "gpu_shared"
        assert "api-server-0 and api-server-1 share card 0" in text
        assert said in text
        assert "Set cache_max_entry_count of each to 0.4 or less" in text


def test_one_quarrel_is_told_once() -> None:
    assert len(faults(hosts.machine("h100_4_nvlink"), *want(4, 4))) == 1


# -- NUMA -------------------------------------------------------------------------------------------------------------


def test_a_unit_is_bound_to_the_node_of_its_cards() -> None:
    gpu = hosts.machine("h100_8_nvlink")
    assert gpu_layout.unit_lines(gpu, [4, 5]) == ["NUMAPolicy=preferred", "NUMAMask=1", "CPUAffinity=numa"]
    assert gpu_layout.unit_lines(gpu, range(8)) == [], "cards on both nodes"
    assert gpu_layout.unit_lines(hosts.machine("h100_4_nvlink"), [0]) == [], "a host with one node"
    assert gpu_layout.unit_lines(hosts.machine("v100_4_no_nodes"), [0]) == [], "a host that does not tell"
    assert gpu_layout.unit_lines(hosts.machine("a100_8_four_nodes"), [0, 1])[1] == "NUMAMask=3"
    assert gpu_layout.unit_lines(hosts.machine("h100_4_small_nodes"), [0]) == [], "four cores are too few"
    assert gpu_layout.unit_lines(gpu, []) == []


@pytest.mark.parametrize(
    ("text", "count"), [("0-31,64-95", 64), ("6,14,22,30", 4), ("0", 1), ("", 0), ("N/A", 0), ("0-", 1), ("a-b", 0)]
)
def test_cpus_are_counted(text: str, count: int) -> None:
    assert gpu_layout.cpu_count(text) == count


# -- for any machine --------------------------------------------------------------------------------------------------


@st.composite
def machines(draw: st.DrawFn) -> GpuFacts:
    """Return a host with up to twelve cards of up to two kinds, joined somehow, some busy, cut up or lost."""
    count = draw(st.integers(1, 12))
    kinds = draw(st.lists(st.sampled_from([("A", 24576, "8.6"), ("B", 49140, "8.9")]), min_size=count, max_size=count))
    states = draw(st.lists(st.sampled_from(["", "", "", "busy", "mig", "lost"]), min_size=count, max_size=count))
    words = st.sampled_from(["NV4", "PIX", "NODE", "SYS"])
    cards: list[Gpu] = [
        {
            "index": number, "uuid": f"GPU-{number}", "name": name, "driver": "580.1", "memory_mib": memory,
            "used_mib": 0, "mig": state == "mig", "compute_capability": capability,
            "fault": "GPU is lost" if state == "lost" else "", "numa": number % 2, "cpus": "0-31",
        }
        for number, ((name, memory, capability), state) in enumerate(zip(kinds, states, strict=True))
    ]  # fmt: skip
    return {
        **hosts.NO_CARD,
        "cards": cards,
        "links": [{"first": a, "second": b, "link": draw(words)} for a, b in combinations(range(count), 2)],
        "processes": [
            {"uuid": f"GPU-{number}", "pid": 1, "process": "x", "used_mib": 1, "unit": ""}
            for number, state in enumerate(states)
            if state == "busy"
        ],
        "numa_nodes": 2,
    }


SIZES = st.sampled_from([None, EIGHT_B, FOURTEEN_B, SEVENTY_B])


@given(machines(), st.lists(st.tuples(st.sampled_from([None, None, 1, 2, 4]), SIZES), min_size=1, max_size=4))
def test_whatever_the_machine_the_deal_keeps_its_rules(gpu: GpuFacts, asked: list[tuple[int | None, Any]]) -> None:
    wanted = [Wanted(f"api-server-{n}.service", tp, size=size) for n, (tp, size) in enumerate(asked)]
    dealt = deal(wanted, gpu, wsl=False)
    cards = {card["index"]: card for card in gpu["cards"]}
    healthy = [card for card in gpu["cards"] if not card["fault"] and not card["mig"]]
    for want_, got in zip(wanted, dealt, strict=True):
        assert got.tp & (got.tp - 1) == 0
        assert len(got.gpus) <= got.tp
        assert want_.tp in (None, got.tp)
        if want_.tp is None:
            assert len(got.gpus) == got.tp, "auto never asks for more than it gets"
            assert want_.size is None or model_memory.tp_fits_heads(got.tp, want_.size.heads, want_.size.kv_heads)
            if len({cards[index]["name"] for index in got.gpus}) > 1:
                assert want_.size, "auto takes unequal cards only for a model that equal ones don't hold"
        if healthy:
            assert not any(cards[index]["fault"] or cards[index]["mig"] for index in got.gpus)
    # Cards are shared only where there are not enough for everybody, and never in silence.
    shared = gpu_layout.sharers(dealt)
    if shared:
        assert sum(tp or 1 for tp, _size in asked) > len(healthy)
        assert any(check == "gpu_shared" for check, _text in faults(gpu, *wanted))
    assert deal(wanted, gpu, wsl=False) == dealt, "the same host, the same deal"


@given(machines(), st.lists(st.sampled_from([None, 1, 2, 4]), min_size=1, max_size=3))
def test_a_second_run_moves_nobody(gpu: GpuFacts, tps: list[int | None]) -> None:
    wanted = want(*tps)
    first = deal(wanted, gpu, wsl=False)
    # What the first run wrote, and its units at work.
    gpu["dealt"] = {each.unit: list(got.gpus) for each, got in zip(wanted, first, strict=True)}
    gpu["processes"] += [
        {"uuid": f"GPU-{index}", "pid": 2, "process": "python", "used_mib": 1, "unit": each.unit}
        for each, got in zip(wanted, first, strict=True)
        for index in got.gpus
    ]
    assert deal(wanted, gpu, wsl=False) == first


@given(machines(), SIZES)
def test_every_card_is_used_or_has_a_reason(gpu: GpuFacts, size: Any) -> None:
    wanted = want(None, size=size)
    dealt = deal(wanted, gpu, wsl=False)
    idle = gpu_layout.idle_cards(wanted, dealt, gpu, wsl=False)
    assert {card.index for card in idle} | set(dealt[0].gpus) == {card["index"] for card in gpu["cards"]}
    assert all(card.reason for card in idle)


def test_sixteen_cards_take_no_time() -> None:
    cards: list[Gpu] = [
        {
            "index": number, "uuid": f"GPU-{number}", "name": "A", "driver": "580.1", "memory_mib": 81559,
            "used_mib": 0, "mig": False, "compute_capability": "9.0", "fault": "", "numa": number // 8, "cpus": "0-31",
        }
        for number in range(16)
    ]  # fmt: skip
    gpu: GpuFacts = {
        **hosts.NO_CARD,
        "cards": cards,
        "links": [
            {"first": a, "second": b, "link": "NV6" if a // 8 == b // 8 else "SYS"}
            for a, b in combinations(range(16), 2)
        ],
    }
    assert groups(gpu, *want(8, 8)) == [list(range(8)), list(range(8, 16))]
    assert len(groups(gpu, *want(None))[0]) == 16


def test_every_fixture_says_where_it_comes_from() -> None:
    text = (hosts.MACHINES / "README.md").read_text()
    named = set(re.findall(r"`([a-z0-9_]+)`", text))
    folders = {path.name for path in hosts.MACHINES.iterdir() if path.is_dir()}
    assert named & folders >= {"h200_pair_recorded", "v100_8_mesh", "a100_8_four_nodes"}
    assert {name for name in named if name.count("_") > 1} <= folders, "a page that names what is gone"
