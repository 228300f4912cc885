"""What a bench asks and tells: true figures, counted faults, the change since the last run, a plot that is whole."""

from __future__ import annotations

import json
import struct
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.filter.bench_report import bench_report
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import bench
from ansible_collections.selfhost.lmdeploy.plugins.modules import engine_bench
from serving import serving


class Streamer:
    """A server that streams so many tokens, and refuses each question that a test names."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.refused = "none"
        streamer = self

        class Handler(BaseHTTPRequestHandler):
            """Answers a chat."""

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

            def do_POST(self) -> None:
                """Stream."""
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                streamer.bodies.append(body)
                streamer.keys.add(self.headers.get("Authorization"))
                if streamer.refused in str(body["messages"]):
                    self.send_error(503)
                    return
                chunks: list[dict[str, Any]] = [{"choices": [{"delta": {"content": "x "}}]}] * body["max_tokens"]
                chunks += [{"choices": [{"delta": {}, "finish_reason": "length"}]}]
                chunks += [{"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}]
                text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
                self.send_response(200)
                self.end_headers()
                self.wfile.write(text.encode())

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def streamer() -> Iterator[Streamer]:
    """Serve from a thread."""
    made = Streamer()
    with serving(made.server):
        yield made


def measured(streamer: Streamer, **changes: Any) -> list[dict[str, Any]]:
    params = {
        "kinds": ["text"],
        "clients": [1, 3],
        "requests": 2,
        "seconds": 20.0,
        "max_tokens": 5,
        "timeout_seconds": 9.0,
    }
    return engine_bench.measure({**params, "url": streamer.url, "model": "m", **changes}, "key")


def test_each_kind_and_number_of_clients_has_its_figures(streamer: Streamer) -> None:
    levels = measured(streamer, kinds=["text", "image"])
    assert [(level["kind"], level["clients"], level["good"]) for level in levels] == [
        ("text", 1, 2), ("text", 3, 6), ("image", 1, 2), ("image", 3, 6),
    ]  # fmt: skip
    assert all(level["tokens_per_second"] > 0 and level["first_token_seconds"]["p50"] > 0 for level in levels)
    assert streamer.keys == {"Bearer key"}
    assert all(body["ignore_eos"] and body["stream"] for body in streamer.bodies)


def test_no_question_is_asked_twice_and_every_run_asks_the_same(streamer: Streamer) -> None:
    measured(streamer, clients=[4], requests=3)
    texts = [body["messages"][0]["content"] for body in streamer.bodies]
    assert len(set(texts[1:])) == 12
    assert bench.contents("text", 12) == bench.contents("text", 12)
    pictures = [json.dumps(content) for content in bench.contents("image", 3)]
    assert len(set(pictures)) == 3


def test_a_refused_answer_is_counted_and_told(streamer: Streamer) -> None:
    streamer.refused = "Story 1:"
    (level,) = measured(streamer, clients=[2])
    assert (level["good"], level["failed"]) == (3, 1)
    report = bench_report({"moment": "now", "levels": [{"host": "gpu-1", **level}]})
    assert report["bad"] == 1
    assert "gpu-1, text, 2 clients: 1 times failed: HTTP 503" in report["table"]


def test_a_picture_is_one() -> None:
    data = bench.png(112, 7)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == (112, 112)
    begin = data.index(b"IDAT") + 4
    (length,) = struct.unpack(">I", data[begin - 8 : begin - 4])
    assert len(zlib.decompress(data[begin : begin + length])) == 112 * (1 + 112 * 3)


def level(clients: int = 1, speed: float = 100.0, first: float | None = 0.05, **changes: Any) -> dict[str, Any]:
    spread = {"p50": first, "p90": first, "p99": first, "max": first}
    made = {"host": "gpu-1", "url": "u", "model": "m", "kind": "text", "clients": clients, "requests": 4, "good": 4}
    figures = {"tokens_per_second": speed, "requests_per_second": 1.5, "faults": {}}
    return {**made, **figures, "seconds": {"p50": 12.3, "p99": 14.0}, "first_token_seconds": spread, **changes}


def test_a_table_tells_the_change_since_the_last_run() -> None:
    last = {"moment": "yesterday", "levels": [level(speed=80.0, first=0.1), level(4, speed=1.0)]}
    table = bench.table({"moment": "now", "levels": [level(), level(2)]}, last)
    heading, one, two, compared = table.splitlines()
    assert heading.split()[:4] == ["HOST", "MODEL", "KIND", "CLIENTS"]
    assert "100.0     +25%" in one
    assert "0.05 s           -50%" in one
    assert "%" not in two
    assert compared == "Compared with the run of yesterday."
    assert "Compared" not in bench.table({"moment": "now", "levels": [level()]}, {})


def test_a_level_of_another_model_is_not_compared() -> None:
    last = {"moment": "yesterday", "levels": [level(model="other")]}
    assert "%" not in bench.table({"moment": "now", "levels": [level()]}, last)


def test_figures_are_kept_with_their_change() -> None:
    last = {"moment": "yesterday", "levels": [level(speed=80.0, first=0.1), level(4, speed=1.0)]}
    report = bench_report({"moment": "now", "levels": [level(), level(2)]}, last)
    assert report["run"]["compared_with"] == "yesterday"
    changes = [kept["change"] for kept in report["run"]["levels"]]
    assert changes[0] == {"tokens_per_second": 25.0, "first_token_seconds": -50.0}
    assert changes[1] == {"tokens_per_second": None, "first_token_seconds": None}
    assert bench_report(report["run"], report["run"])["table"].count("+0%") == 4


def test_a_plot_shows_the_last_run_dashed() -> None:
    last = {"moment": "yesterday", "levels": [level(1, speed=80.0), level(8, model="other")]}
    lines = [line for line in bench.plot({"levels": [level(1), level(2)]}, last).splitlines() if "<polyline" in line]
    # Two diagrams: what was, then what is, in one colour; what is not measured any more is not drawn.
    assert len(lines) == 4
    assert ['class="last"' in line for line in lines] == [True, False, True, False]
    assert len({line.split('stroke="')[1].split('"')[0] for line in lines}) == 1


def test_a_plot_is_whole_and_has_every_line() -> None:
    levels = [level(1), level(8, speed=430.0), level(1, host="<gpu>&2"), level(8, host="<gpu>&2", first=None)]
    root = ET.fromstring(bench.plot({"levels": levels}, {}))  # noqa: S314 our own text
    space = "{http://www.w3.org/2000/svg}"
    lines = root.findall(f"{space}polyline")
    assert len(lines) == 4
    texts = [element.text for element in root.iter(f"{space}text")]
    assert "<gpu>&2 m text" in texts
    assert "500" in texts
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for line in lines:
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= width
            assert 0 <= y <= height


@pytest.mark.parametrize(("value", "top"), [(0, 1), (0.03, 0.05), (1, 1), (7, 10), (12, 20), (430, 500), (21, 25)])
def test_an_axis_ends_at_a_round_number(value: float, top: float) -> None:
    assert bench.ceiling(value) == pytest.approx(top)
