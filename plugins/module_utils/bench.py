# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""What a bench asks, and what it tells: questions, a table, a plot, and the comparison with the last run. Pure.

A run is ``{"moment": ..., "levels": [...]}``; a level is what load_client.summary() returned, with ``host``, ``url``,
``model``, ``kind`` (text or image) and ``clients``. Two levels of two runs are compared when these are equal.
"""

from __future__ import annotations

import base64
import random
import struct
import zlib
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

KINDS = ("text", "image")
SAME = ("host", "url", "model", "kind", "clients")
THINGS = (
    "a harbour",
    "an old clock",
    "a mountain railway",
    "two bakers",
    "a library",
    "the first snow",
    "a lost letter",
)
IMAGE_PIXELS = 448
CELL_PIXELS = 56
HEADINGS = (
    "HOST", "MODEL", "KIND", "CLIENTS", "GOOD", "BAD", "TOKENS/S", "CHANGE", "ANSWERS/S",
    "FIRST TOKEN p50", "CHANGE", "p99", "ANSWER p50", "p99",
)  # fmt: skip


def png(pixels: int, seed: int) -> bytes:
    """Return a square picture of coloured cells, another one for each seed."""
    dice = random.Random(seed)  # noqa: S311 this is no secret
    cells = pixels // CELL_PIXELS
    rows = []
    for _row_number in range(cells):
        colours = [dice.randbytes(3) for _cell in range(cells)]
        rows += [b"\0" + b"".join(colour * CELL_PIXELS for colour in colours)] * CELL_PIXELS

    def part(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    side = cells * CELL_PIXELS
    header = part(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + part(b"IDAT", zlib.compress(b"".join(rows))) + part(b"IEND", b"")


def contents(kind: str, count: int) -> list[Any]:
    """Return so many questions, all different, so that no cache answers; the same ones in every run."""
    dice = random.Random(count)  # noqa: S311 this is no secret
    made: list[Any] = []
    for number in range(count):
        first, second = dice.sample(THINGS, 2)
        text = f"Story {number}: tell me in detail about {first} and {second}, from the beginning to the end."
        if kind == "image":
            picture = base64.b64encode(png(IMAGE_PIXELS, number)).decode()
            asked = {"type": "text", "text": f"Picture {number}: tell me which colours you see, row by row."}
            made.append([asked, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}])
        else:
            made.append(text)
    return made


def change(now: float | None, before: float | None) -> float | None:
    """Return how a figure moved since the last run, in percent; None where there is none to compare with."""
    return round((now / before - 1) * 100, 1) if now and before else None


def compared(run: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run whose levels tell their change since the last one, in percent."""
    levels = []
    for level in run["levels"]:
        old = _last(level, last)
        first = change(level["first_token_seconds"]["p50"], old.get("first_token_seconds", {}).get("p50"))
        speed = change(level["tokens_per_second"], old.get("tokens_per_second"))
        levels.append({**level, "change": {"tokens_per_second": speed, "first_token_seconds": first}})
    return {**run, "levels": levels, "compared_with": last.get("moment", "")}


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def _last(level: Mapping[str, Any], last: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the level of the last run that a level is compared with; empty without one."""
    same = (old for old in last.get("levels", []) if all(old.get(key) == level[key] for key in SAME))
    return next(same, {})


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.0f}%"


def _row(level: Mapping[str, Any]) -> tuple[str, ...]:
    first, whole = level["first_token_seconds"], level["seconds"]
    return (
        level["host"],
        level["model"],
        level["kind"],
        str(level["clients"]),
        str(level["good"]),
        str(level["requests"] - level["good"]),
        f"{level['tokens_per_second']:.1f}",
        _percent(level["change"]["tokens_per_second"]),
        f"{level['requests_per_second']:.2f}",
        _seconds(first["p50"]),
        _percent(level["change"]["first_token_seconds"]),
        _seconds(first["p99"]),
        _seconds(whole["p50"]),
        _seconds(whole["p99"]),
    )


def table(run: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    """Return the figures as text, with the changes since the last run, and each fault that was met."""
    rows = [HEADINGS, *(_row(level) for level in compared(run, last)["levels"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = ["  ".join(f"{word:<{widths[i]}}" for i, word in enumerate(row)).rstrip() for row in rows]
    for level in run["levels"]:
        for fault, count in level["faults"].items():
            lines.append(f"{level['host']}, {level['kind']}, {level['clients']} clients: {count} times {fault}")
    if last.get("moment"):
        lines.append(f"Compared with the run of {last['moment']}.")
    return "\n".join(lines)


# -- the plot ---------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 460, 300, 56, 40, 44, 28
COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
STYLE = (
    "text{font-family:system-ui,sans-serif;fill:#1f2937}.title{font-size:15px;font-weight:600}.tick{font-size:12px}"
    ".grid{stroke:#e5e7eb}polyline{fill:none;stroke-width:2}.last{stroke-dasharray:4 5;opacity:.6}"
)
STEPS = (1, 2, 2.5, 5, 10)


def ceiling(value: float) -> float:
    """Return a round number that is not below a value, for the end of an axis."""
    if value <= 0:
        return 1.0
    power = 1.0
    while power * 10 <= value:
        power *= 10
    while power > value:
        power /= 10
    return next(step * power for step in STEPS if step * power >= value * 0.999)


def _panel(
    title: str,
    axis: str,
    offset: int,
    lines: Mapping[str, Sequence[tuple[int, float]]],
    last: Mapping[str, Sequence[tuple[int, float]]],
) -> list[str]:
    """Return one diagram: a line for each name, over the number of what the axis names; the last run dashed."""
    drawn = [point for points in (*lines.values(), *last.values()) for point in points]
    numbers = sorted({point[0] for point in drawn})
    top = ceiling(max((point[1] for point in drawn), default=1.0))
    right, base = offset + WIDTH, TOP + HEIGHT
    places = {x: offset + LEFT + (WIDTH - LEFT) * (i + 0.5) / len(numbers) for i, x in enumerate(numbers)}
    made = [f'<text class="title" x="{offset + LEFT}" y="{TOP - 16}">{escape(title)}</text>']
    for fifth in range(6):
        y = base - HEIGHT * fifth / 5
        made.append(f'<path class="grid" d="M{offset + LEFT} {y:.1f}H{right}"/>')
        made.append(
            f'<text class="tick" text-anchor="end" x="{offset + LEFT - 8}" y="{y + 4:.1f}">{top * fifth / 5:g}</text>'
        )
    for x, place in places.items():
        made.append(f'<text class="tick" text-anchor="middle" x="{place:.1f}" y="{base + 18}">{x}</text>')
    made.append(
        f'<text class="tick" text-anchor="middle" x="{(offset + LEFT + right) / 2}" y="{base + 36}">{escape(axis)}'
        "</text>"
    )
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        for kind, some in ((' class="last"', last.get(name, ())), ("", points)):
            dots = [(places[x], base - HEIGHT * y / top) for x, y in sorted(some)]
            if dots or not kind:
                path = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
                made.append(f'<polyline{kind} stroke="{colour}" points="{path}"/>')
        made += [f'<circle fill="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in dots]
    return made


def _lines(levels: Iterable[Mapping[str, Any]], figure: str) -> dict[str, list[tuple[int, float]]]:
    """Return the points of each host, model and kind."""
    found: dict[str, list[tuple[int, float]]] = {}
    for level in levels:
        value = level["first_token_seconds"]["p50"] if figure == "first" else level["tokens_per_second"]
        points = found.setdefault(f"{level['host']} {level['model']} {level['kind']}", [])
        if value is not None:
            points.append((level["clients"], value))
    return found


def drawing(
    axis: str,
    panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]],
    last: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]] | None = None,
) -> str:
    """Return an SVG picture that needs nothing else: a diagram for each title, over what the axis counts.

    Lines of ``last`` are those of the last run, in the colours of the same names.

    Every diagram has the same names in the same order, so that one list of colours explains all.
    """
    names = list(next(iter(panels.values())))
    width, base = len(panels) * (WIDTH + GAP) + 24, TOP + HEIGHT + BOTTOM
    height = base + 16 + 20 * len(names)
    made = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<style>{STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for number, (title, lines) in enumerate(panels.items()):
        made += _panel(title, axis, number * (WIDTH + GAP), lines, (last or {}).get(title, {}))
    for number, name in enumerate(names):
        y = base + 16 + 20 * number
        made.append(f'<circle fill="{COLOURS[number % len(COLOURS)]}" cx="{LEFT + 6}" cy="{y - 4}" r="5"/>')
        made.append(f'<text class="tick" x="{LEFT + 20}" y="{y}">{escape(name)}</text>')
    return "\n".join([*made, "</svg>", ""])


def _panels(levels: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    speed, wait = _lines(levels, "speed"), _lines(levels, "first")
    return {"Tokens a second": speed, "Seconds to the first token, median": wait}


def plot(run: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    """Return a picture of a run: speed, and the wait for the first token; what the last run had is dashed."""
    same = [old for level in run["levels"] if (old := _last(level, last))]
    return drawing("clients" + (", dashed: the run before" if same else ""), _panels(run["levels"]), _panels(same))
