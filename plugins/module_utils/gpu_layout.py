# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Which cards of a host each engine gets, over how many its model is cut, and why. Pure, no Ansible.

Preflight (on the controller, before a change) and the role api_server deal by the same rules, so what is judged is what
runs. An engine keeps the cards that its unit already has wherever the rules allow that.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING

from ansible_collections.selfhost.lmdeploy.plugins.module_utils.model_memory import (
    WORKSPACE_BYTES,
    ModelSize,
    automatic_tp,
    tp_fits_heads,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_survey import Gpu, GpuFacts

# How close two cards are, by the words of `nvidia-smi topo -m`. NVLink counts its lanes on top.
CLOSENESS = {"PIX": 60, "PXB": 50, "PHB": 40, "NODE": 30, "SYS": 10}
NVLINK = 100
SAME_NODE = 5
# TurboMind's kernels begin with Volta.
OLDEST_CAPABILITY = (7, 0)
# Above that many groups the closest one is grown card by card instead of looked for among all.
MOST_GROUPS = 500
# An engine's API, tokenizer and picture work want some cores: a node with fewer is no place to be bound to.
LEAST_CPUS = 8


@dataclass(frozen=True)
class Wanted:
    """What an engine asks for: ``tp`` None is `auto`, empty ``gpus`` are left to us, ``ratio`` None is unset."""

    unit: str
    tp: int | None = None
    gpus: tuple[int, ...] = ()
    size: ModelSize | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class Dealt:
    """What an engine gets. Fewer ``gpus`` than ``tp``: there are not enough."""

    tp: int
    gpus: tuple[int, ...]


@dataclass(frozen=True)
class Idle:
    """A card that no engine uses although one of them has tp `auto`, and the reason."""

    index: int
    reason: str


@dataclass(frozen=True)
class LayoutFault:
    """What can't run as it is asked for: the engine's place in the list, the setting at fault, cause and way out.

    ``check`` is the id in preflight. ``fix`` may hold ``{tp}`` and the like, the full name of a setting.
    """

    number: int
    check: str
    setting: str
    why: str
    fix: str


def _capability(card: Gpu) -> tuple[int, ...]:
    return tuple(int(part) for part in card["compute_capability"].split(".") if part)


def _kind(card: Gpu) -> tuple[str, int]:
    return card["name"], card["memory_mib"]


def free_to(card: Gpu, gpu: GpuFacts) -> bool:
    """Tell whether nobody but our own units computes on a card; one that our engine has stays its own."""
    if any(card["index"] in numbers for numbers in gpu["dealt"].values()):
        return True
    return not any(
        process["uuid"] == card["uuid"] and not process["unit"].startswith(("api-server", "open-webui."))
        for process in gpu["processes"]
    )


class Layout:
    """The cards of one host, how close they are, and what is still to be given away."""

    def __init__(self, gpu: GpuFacts, *, wsl: bool) -> None:
        """Sort out which cards may be used at all."""
        self.gpu = gpu
        self.wsl = wsl
        self.cards = {card["index"]: card for card in gpu["cards"]}
        self.links = {frozenset((link["first"], link["second"])): link["link"] for link in gpu["links"]}
        self.refused: dict[int, str] = {}
        for card in gpu["cards"]:
            capability = _capability(card)
            if card["fault"]:
                self.refused[card["index"]] = f"does not answer ({card['fault']})"
            elif card["mig"]:
                self.refused[card["index"]] = "is in MIG mode"
            elif capability and capability < OLDEST_CAPABILITY:
                self.refused[card["index"]] = f"has compute capability {card['compute_capability']}, which is too old"
        self.busy = [index for index, card in self.cards.items() if not free_to(card, gpu)]
        self.near = {(one, other): self.closeness(one, other) for one in self.cards for other in self.cards}
        self.known: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {}

    def closeness(self, first: int, second: int) -> int:
        """Return how fast two cards reach each other; larger is faster."""
        link = self.links.get(frozenset((first, second)), "")
        lanes = link.removeprefix("NV")
        score = NVLINK + int(lanes) if link.startswith("NV") and lanes.isdigit() else CLOSENESS.get(link, 0)
        one, other = self.cards[first]["numa"], self.cards[second]["numa"]
        return score + (SAME_NODE if one == other >= 0 else 0)

    def _rank(self, group: Sequence[int], pool: Sequence[int]) -> tuple[int, int, int]:
        """Order groups: by the weakest link, which all wait for, then by all links, then by those torn to the rest."""
        links = [self.near[pair] for pair in combinations(group, 2)]
        total = sum(links)
        # Each link inside is met twice in the sum over the whole pool, and is not torn.
        torn = sum(self.near[mine, other] for mine in group for other in pool if mine != other) - 2 * total
        return -min(links, default=0), -total, torn

    def closest(self, pool: Collection[int], size: int) -> tuple[int, ...]:
        """Return the ``size`` cards of a pool that are closest to each other, in the order of their numbers."""
        cards = tuple(sorted(pool))
        if size >= len(cards):
            return cards
        if (cards, size) not in self.known:
            exact = comb(len(cards), size) <= MOST_GROUPS
            groups = combinations(cards, size) if exact else (self._grown(seed, cards, size) for seed in cards)
            # Of equals the first, which has the lowest numbers.
            self.known[cards, size] = min(groups, key=lambda group: self._rank(group, cards))
        return self.known[cards, size]

    def _grown(self, seed: int, pool: Collection[int], size: int) -> tuple[int, ...]:
        group = [seed]
        while len(group) < size:
            rest = sorted(set(pool) - set(group))
            group.append(max(rest, key=lambda card: (min(self.near[card, own] for own in group), -card)))
        return tuple(sorted(group))

    def room(self, index: int) -> float:
        """Return the bytes of a card; what others hold on it is judged elsewhere."""
        return self.cards[index]["memory_mib"] * 2.0**20

    def holds(self, wanted: Wanted, group: Collection[int], tp: int) -> bool:
        """Tell whether a model's weights fit on each card of a group; of unknown size, they do."""
        if wanted.size is None or not group:
            return True
        return wanted.size.weight_bytes / tp + WORKSPACE_BYTES <= min(self.room(index) for index in group)

    def heads_fit(self, wanted: Wanted, tp: int) -> bool:
        """Tell whether a model's attention can be cut in ``tp``."""
        return wanted.size is None or tp_fits_heads(tp, wanted.size.heads, wanted.size.kv_heads)

    def kinds(self, pool: Collection[int]) -> list[list[int]]:
        """Return a pool by the kind of its cards, the best kind first."""
        found: dict[tuple[str, int], list[int]] = {}
        for index in sorted(pool):
            found.setdefault(_kind(self.cards[index]), []).append(index)
        # Memory decides what runs, the newer one of two equally large cards is faster.
        return sorted(
            found.values(),
            key=lambda group: (-self.cards[group[0]]["memory_mib"], [-n for n in _capability(self.cards[group[0]])]),
        )

    def place(
        self, wanted: Mapping[int, Wanted], sizes: Mapping[int, int], pool: Collection[int], mixed: Collection[int] = ()
    ) -> dict[int, tuple[int, ...]] | None:
        """Return a group of cards for each engine, none twice, or None where they don't fit beside each other.

        All sizes are powers of two, so to place the largest first never loses a solution. Engines in ``mixed`` may get
        unequal cards.
        """
        for kept in (True, False):
            left, found = set(pool), dict[int, tuple[int, ...]]()
            for number, want in wanted.items() if kept else ():
                before = tuple(self.gpu["dealt"].get(want.unit, ()))
                alike = len(self.kinds([index for index in before if index in left])) == 1 or number in mixed
                if len(before) == sizes[number] and left.issuperset(before) and alike:
                    found[number] = tuple(sorted(before))
                    left -= set(before)
            if all(
                self._fill(number, sizes, left, found, mixed) for number in self._largest_first(wanted, sizes, found)
            ):
                return found
        return None

    @staticmethod
    def _largest_first(
        wanted: Mapping[int, Wanted], sizes: Mapping[int, int], found: Mapping[int, tuple[int, ...]]
    ) -> list[int]:
        return sorted((number for number in wanted if number not in found), key=lambda number: (-sizes[number], number))

    def _fill(
        self,
        number: int,
        sizes: Mapping[int, int],
        left: set[int],
        found: dict[int, tuple[int, ...]],
        mixed: Collection[int],
    ) -> bool:
        """Give one engine its cards out of what is left, calm ones first; tell whether there were enough."""
        size = sizes[number]
        for pool in (left - set(self.busy), left):
            groups = [kind for kind in self.kinds(pool) if len(kind) >= size]
            if not groups and number in mixed and len(pool) >= size:
                groups = [sorted(pool)]
            if groups:
                found[number] = self.closest(groups[0], size)
                left.difference_update(found[number])
                return True
        return False

    def smallest(self, wanted: Wanted, pool: Collection[int]) -> int:
        """Return the smallest tp with which a model fits on cards of the pool, 1 where none does."""
        if wanted.tp is not None or self.wsl:
            return wanted.tp or 1
        tp = 1
        while tp <= len(pool):
            if self.heads_fit(wanted, tp):
                for kind in self.kinds(pool):
                    if len(kind) >= tp and self.holds(wanted, kind, tp):
                        return tp
            tp *= 2
        return 1


def _named(layout: Layout, wanted: Wanted) -> Dealt:
    """Deal to an engine whose cards the inventory names."""
    there = [index for index in dict.fromkeys(wanted.gpus) if index in layout.cards]
    usable = [index for index in there if not layout.cards[index]["fault"]]
    if wanted.tp is None:
        heads = (wanted.size.heads, wanted.size.kv_heads) if wanted.size else (0, 0)
        tp = 1 if layout.wsl else automatic_tp(len(usable), *heads)
    else:
        tp = wanted.tp
    return Dealt(tp, layout.closest(usable, tp))


def _grow(layout: Layout, wanted: Mapping[int, Wanted], sizes: dict[int, int], pool: Collection[int]) -> None:
    """Double the engines with tp `auto`, the smallest first, as long as all still fit beside each other."""
    growing = not layout.wsl
    while growing:
        growing = False
        for number in sorted(wanted, key=lambda number: (sizes[number], number)):
            larger = {**sizes, number: sizes[number] * 2}
            fits = wanted[number].tp is None and layout.heads_fit(wanted[number], larger[number])
            if fits and layout.place(wanted, larger, pool) is not None:
                sizes[number] = larger[number]
                growing = True
                break


def _shared(
    layout: Layout, wanted: Mapping[int, Wanted], sizes: Mapping[int, int], pool: Collection[int]
) -> dict[int, tuple[int, ...]]:
    """Deal where engines must share cards: each gets the least used ones."""
    use = dict.fromkeys(sorted(pool), 0)
    found = {}
    for number in sorted(wanted, key=lambda number: (-sizes[number], number)):
        size = sizes[number]
        level = sorted(use.values())[min(size, len(use)) - 1] if use else 0
        found[number] = layout.closest([index for index, users in use.items() if users <= level], size)
        for index in found[number]:
            use[index] += 1
    return found


def deal(wanted: Sequence[Wanted], gpu: GpuFacts, *, wsl: bool) -> list[Dealt]:
    """Return what each engine of a host gets, in the order of the engines.

    1. Named cards go to who names them.
    2. The others share what is left: cards that answer, without MIG, equal within one engine, calm before busy. Each
       gets the smallest tp that holds its weights, then all grow to the largest powers of two that fit beside each
       other and that the model's heads allow. On WSL `auto` is 1.
    3. Where there are fewer cards than that takes, engines share cards.
    """
    layout = Layout(gpu, wsl=wsl)
    dealt = {number: _named(layout, want) for number, want in enumerate(wanted) if want.gpus}
    taken = {index for each in dealt.values() for index in each.gpus} | {
        index for want in wanted for index in want.gpus
    }
    free = {number: want for number, want in enumerate(wanted) if not want.gpus}
    usable = [index for index in layout.cards if index not in layout.refused] or list(layout.cards)
    pool = [index for index in usable if index not in taken]
    calm = [index for index in pool if index not in layout.busy]
    # `auto` keeps off the cards of others as long as there are calm ones; a fixed tp may need them.
    fixed = sum(want.tp or 1 for want in free.values())
    for cards in (calm, pool):
        if len(dealt) < len(wanted) and len(cards) >= fixed:
            dealt.update(_beside(layout, free, cards) or {})
    if len(dealt) < len(wanted):
        sizes = {number: want.tp or 1 for number, want in free.items()}
        groups = _shared(layout, free, sizes, pool or usable)
        dealt.update({number: Dealt(sizes[number], group) for number, group in groups.items()})
    return [dealt[number] for number in range(len(wanted))]


def _beside(layout: Layout, free: Mapping[int, Wanted], pool: Collection[int]) -> dict[int, Dealt] | None:
    """Deal cards of a pool, none twice; None where they are too few."""
    sizes = {number: layout.smallest(want, pool) for number, want in free.items()}
    mixed = [number for number, want in free.items() if want.tp is not None]
    if layout.place(free, sizes, pool, mixed) is None:
        sizes = {number: want.tp or 1 for number, want in free.items()}
    if layout.place(free, sizes, pool, mixed) is None:
        return None
    _grow(layout, free, sizes, pool)
    # Unequal cards are better than none: a model that its equal cards don't hold may have others beside them.
    for number, want in free.items():
        groups = layout.place(free, sizes, pool, mixed) or {}
        if want.tp is not None or layout.wsl or layout.holds(want, groups.get(number, ()), sizes[number]):
            continue
        larger = {**sizes, number: sizes[number] * 2}
        if layout.heads_fit(want, larger[number]) and layout.place(free, larger, pool, [*mixed, number]) is not None:
            sizes, mixed = larger, [*mixed, number]
    groups = layout.place(free, sizes, pool, mixed) or {}
    return {number: Dealt(sizes[number], group) for number, group in groups.items()}


def idle_cards(wanted: Sequence[Wanted], dealt: Sequence[Dealt], gpu: GpuFacts, *, wsl: bool) -> list[Idle]:
    """Return the cards that nobody uses, with reasons; none where no engine has both cards and tp left to us."""
    automatic = [number for number, want in enumerate(wanted) if want.tp is None and not want.gpus]
    if not automatic:
        return []
    layout = Layout(gpu, wsl=wsl)
    used = {index for each in dealt for index in each.gpus}
    kinds = {_kind(layout.cards[index]) for number in automatic for index in dealt[number].gpus}
    found = []
    for index, card in layout.cards.items():
        if index in used:
            continue
        if index in layout.refused:
            reason = layout.refused[index]
        elif index in layout.busy:
            reason = "is busy with others"
        elif wsl:
            reason = "is left out because NCCL often hangs on WSL"
        elif _kind(card) not in kinds:
            reason = "is of another kind than those in use"
        else:
            reason = _size_reason(
                layout, [wanted[number] for number in automatic], [dealt[number] for number in automatic]
            )
        found.append(Idle(index, reason))
    return found


def _size_reason(layout: Layout, wanted: Sequence[Wanted], dealt: Sequence[Dealt]) -> str:
    for want, got in zip(wanted, dealt, strict=True):
        if want.size and not layout.heads_fit(want, got.tp * 2):
            heads = f"{want.size.heads} attention heads and {want.size.kv_heads} KV heads"
            return f"is left over because the model's {heads} can't be cut in {got.tp * 2}"
    return "is left over because a model is cut in 1, 2, 4, 8, ... parts"


def sharers(dealt: Sequence[Dealt]) -> dict[int, list[int]]:
    """Return the cards that more than one engine uses: number of the card, places of the engines in the list."""
    users: dict[int, list[int]] = {}
    for number, each in enumerate(dealt):
        for index in each.gpus:
            users.setdefault(index, []).append(number)
    return {index: numbers for index, numbers in users.items() if len(numbers) > 1}


def layout_faults(wanted: Sequence[Wanted], dealt: Sequence[Dealt], gpu: GpuFacts) -> Iterator[LayoutFault]:
    """Yield what can't run: cards that are not there, fewer cards than tp, engines that would fight over a card."""
    listed = ", ".join(f"{card['index']} ({card['name']})" for card in gpu["cards"])
    faulty = {card["index"]: card["fault"] for card in gpu["cards"] if card["fault"]}
    there = {card["index"] for card in gpu["cards"]}
    for number, (want, got) in enumerate(zip(wanted, dealt, strict=True)):
        unknown = [str(index) for index in want.gpus if index not in there]
        dead = [index for index in want.gpus if index in faulty]
        if unknown:
            why = f"There is no card {', '.join(unknown)}; the host has {listed}."
            yield LayoutFault(number, "gpu_index", "gpus", why, "Name cards of these.")
        elif dead:
            why = f"Card {dead[0]} does not answer: {faulty[dead[0]]}."
            fix = "Restart the host, which may bring it back, or name other cards."
            yield LayoutFault(number, "gpu_lost", "gpus", why, fix)
        elif got.tp > len(got.gpus):
            healthy = len(there) - len(faulty)
            which = f"{{gpus}} names {len(want.gpus)}" if want.gpus else f"the host has {healthy}: {listed}"
            fix = f"Set {{tp}} to auto, or to at most {automatic_tp(len(got.gpus))}."
            yield LayoutFault(number, "tp_gpus", "tp", f"It takes {got.tp} cards, and {which}.", fix)
    told = set()
    for index, numbers in sharers(dealt).items():
        ratios = [wanted[number].ratio for number in numbers]
        if tuple(numbers) in told or (None not in ratios and sum(ratio or 0 for ratio in ratios) <= 1):
            continue
        told.add(tuple(numbers))
        number = next((each for each in numbers if wanted[each].ratio is None), numbers[-1])
        units = " and ".join(wanted[each].unit.removesuffix(".service") for each in numbers)
        share = int(80 / len(numbers)) / 100
        given = ", ".join("unset (0.8)" if ratio is None else f"{ratio:g}" for ratio in ratios)
        why = (
            f"{units} share card {index}, and each takes its part of the memory that it finds free, so the parts "
            f"({given}) must be set for each and be 1 or less together."
        )
        fix = (
            f"Set cache_max_entry_count of each to {share:g} or less, or give them different cards ({{gpus}}, {{tp}})."
        )
        yield LayoutFault(number, "gpu_shared", "cache_max_entry_count", why, fix)


def cpu_count(listing: str) -> int:
    """Return how many CPUs a list such as ``0-31,64-95`` names; 0 for what is no such list."""
    total = 0
    for part in listing.split(","):
        first, _dash, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            return 0
        total += max(0, int(last or first) - int(first) + 1)
    return total


def unit_lines(gpu: GpuFacts, gpus: Collection[int]) -> list[str]:
    """Return what binds a unit to the NUMA node that all its cards hang on; nothing where that is none or the only one.

    Memory is preferred there, not bound: a model that passes through the page cache must not end in an out of memory
    kill while the other node is free.
    """
    cards = [card for card in gpu["cards"] if card["index"] in gpus]
    nodes = {card["numa"] for card in cards}
    if gpu["numa_nodes"] < 2 or len(nodes) != 1 or min(nodes) < 0:
        return []
    if min(cpu_count(card["cpus"]) for card in cards) < LEAST_CPUS:
        return []
    return ["NUMAPolicy=preferred", f"NUMAMask={min(nodes)}", "CPUAffinity=numa"]
