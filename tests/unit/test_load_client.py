"""The load client counts every answer as what it is: good, failed, cut or wrong; and keeps its pace."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import load_client as load
from serving import serving

WORDS = ["The ", "capital ", "is ", "Paris."]


def chunk(text: str = "", ending: str | None = None) -> str:
    return json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": ending}]})


def whole_stream() -> list[str]:
    """Return the events of a good stream."""
    usage = json.dumps({"choices": [], "usage": {"completion_tokens": 7}})
    return [*(chunk(word) for word in WORDS), chunk(ending="stop"), usage, "[DONE]"]


class Talker:
    """A server whose answers a test makes."""

    def __init__(self) -> None:
        self.events = whole_stream()
        self.plain: Any = {
            "choices": [{"message": {"content": "".join(WORDS)}, "finish_reason": "stop"}],
            "usage": {"completion_tokens": 7},
        }
        self.status, self.seconds, self.missing = 200, 0.0, 0
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        talker = self

        class Handler(BaseHTTPRequestHandler):
            """Says what the talker holds."""

            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

            def do_POST(self) -> None:
                """Answer a chat."""
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                talker.bodies.append(body)
                talker.keys.append(self.headers.get("Authorization"))
                time.sleep(talker.seconds)
                content = json.dumps(talker.plain) if talker.status == 200 else "no"
                if talker.status == 200 and body["stream"]:
                    content = "".join(f"data: {event}\n\n" for event in talker.events)
                data = content.encode()
                self.send_response(talker.status)
                self.send_header("Content-Length", str(len(data) + talker.missing))
                self.end_headers()
                self.wfile.write(data)
                self.close_connection = True

        class Server(ThreadingHTTPServer):
            """Takes as many callers as an engine does."""

            request_queue_size = 256
            daemon_threads = True

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def talker() -> Iterator[Talker]:
    """Serve from a thread."""
    made = Talker()
    with serving(made.server):
        yield made


QUESTION = load.Question("What is the capital of France?", expected="paris", max_tokens=9)


def asked(talker: Talker, **changes: Any) -> list[load.Result]:
    """Return what became of the requests of a short plan."""
    plan = {"url": talker.url, "model": "m", "questions": [QUESTION], "requests": 1, "timeout_seconds": 5.0}
    return load.run(load.Plan(**{**plan, **changes}))


@pytest.mark.parametrize("streamed", [0.0, 1.0])
def test_a_good_answer_is_good(talker: Talker, streamed: float) -> None:
    (result,) = asked(talker, streamed=streamed, key="secret")
    assert (result.outcome, result.tokens, result.answer) == ("good", 7, "The capital is Paris.")
    assert (result.first_token_seconds is not None) == bool(streamed)
    assert talker.keys == ["Bearer secret"]
    assert talker.bodies[0]["max_tokens"] == 9


def cut_tail(talker: Talker) -> None:
    talker.events = talker.events[:-1]


def cut_middle(talker: Talker) -> None:
    talker.events = talker.events[:2]


def no_ending(talker: Talker) -> None:
    talker.events = [event for event in talker.events if '"stop"' not in event]


def abort(talker: Talker) -> None:
    talker.events = [chunk("Paris"), chunk(ending="abort"), "[DONE]"]


def garbled(talker: Talker) -> None:
    talker.events = [chunk("Paris"), '{"choices": [{"del']


def other(talker: Talker) -> None:
    talker.events = [chunk("London."), chunk(ending="stop"), "[DONE]"]


def empty(talker: Talker) -> None:
    talker.events = [chunk(ending="stop"), "[DONE]"]


def talks_on(talker: Talker) -> None:
    talker.events = [*talker.events, chunk("more")]


def error_within(talker: Talker) -> None:
    talker.events = [chunk("Paris"), json.dumps({"error": {"message": "out of memory"}}), "[DONE]"]


def refused(talker: Talker) -> None:
    talker.status = 503


@pytest.mark.parametrize(
    ("spoil", "outcome", "words"),
    [
        (cut_tail, "cut", "without [DONE] after 4 chunks"),
        (cut_middle, "cut", "without [DONE]"),
        (no_ending, "cut", "no finish_reason"),
        (abort, "cut", "abort finish_reason"),
        (garbled, "cut", "not JSON"),
        (other, "wrong", "no 'paris' in 'London.'"),
        (empty, "wrong", "the answer is empty"),
        (talks_on, "wrong", "after [DONE]"),
        (error_within, "failed", "out of memory"),
        (refused, "failed", "HTTP 503: no"),
    ],
)
def test_a_bad_stream_is_called_what_it_is(
    talker: Talker, spoil: Callable[[Talker], None], outcome: str, words: str
) -> None:
    spoil(talker)
    (result,) = asked(talker)
    assert result.outcome == outcome
    assert words in result.detail


@pytest.mark.parametrize(
    ("plain", "missing", "outcome", "words"),
    [
        ({"choices": [{"message": {"content": "Paris"}, "finish_reason": "stop"}]}, 9, "cut", "within the answer"),
        ({"choices": []}, 0, "wrong", "no completion"),
        ({"choices": [{"message": {"content": "Paris"}}]}, 0, "cut", "no finish_reason"),
        ([], 0, "wrong", "no object"),
    ],
)
def test_a_bad_plain_answer_is_called_what_it_is(
    talker: Talker, plain: Any, missing: int, outcome: str, words: str
) -> None:
    talker.plain, talker.missing = plain, missing
    (result,) = asked(talker, streamed=0.0)
    assert result.outcome == outcome
    assert words in result.detail


def test_nobody_there_is_a_failed_request() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (result,) = load.run(load.Plan(f"http://127.0.0.1:{port}", "m", [QUESTION], requests=1))
    assert (result.outcome, result.status) == ("failed", 0)
    assert "refused" in result.detail


def test_a_silent_server_is_a_failed_request_in_time(talker: Talker) -> None:
    talker.seconds = 1.0
    (result,) = asked(talker, timeout_seconds=0.2)
    assert result.outcome == "failed"
    assert result.seconds < 0.9


def test_a_closed_loop_keeps_its_clients_busy_and_sends_no_more(talker: Talker) -> None:
    talker.seconds = 0.05
    results = asked(talker, requests=12, concurrency=4, streamed=0.5)
    assert [r.number for r in results] == list(range(12))
    assert [r.outcome for r in results] == ["good"] * 12
    assert sum(r.streamed for r in results) == 6
    told = load.summary(results)
    assert (told["requests"], told["good"], told["passed"]) == (12, 12, True)
    assert told["wall_seconds"] < 0.05 * 12, "the clients did not work side by side"


def test_a_loop_ends_in_time(talker: Talker) -> None:
    talker.seconds = 0.05
    assert 2 <= len(asked(talker, requests=10_000, seconds=0.3)) <= 7
    assert 3 <= len(asked(talker, requests=10_000, seconds=0.3, rate=20, spread=False)) <= 7


def test_an_open_loop_counts_from_when_a_request_was_due(talker: Talker) -> None:
    talker.seconds = 0.3
    results = asked(talker, requests=10, rate=100, spread=False)
    # All ten are under way together: a slow server does not slow the client down.
    assert [round(r.due, 2) for r in results] == [round(n / 100, 2) for n in range(10)]
    assert load.summary(results)["wall_seconds"] < 1.0
    assert all(r.seconds >= 0.3 for r in results)


def test_what_could_not_be_sent_counts_as_failed(talker: Talker) -> None:
    talker.seconds = 0.3
    results = asked(talker, requests=6, rate=1000, spread=False, most_in_flight=2)
    told = load.summary(results)
    assert (told["good"], told["failed"], told["passed"]) == (2, 4, False)
    assert "most_in_flight" in next(iter(told["faults"]))


def test_random_arrivals_are_the_same_in_every_run(talker: Talker) -> None:
    dues = [[r.due for r in asked(talker, requests=5, rate=200, seed=seed)] for seed in (1, 1, 2)]
    assert dues[0] == dues[1] != dues[2]


def test_a_summary_of_nothing_has_not_passed() -> None:
    told = load.summary([])
    assert (told["requests"], told["passed"], told["seconds"]["p50"]) == (0, False, None)


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(n) for n in range(1, 101)]
    assert load.spread(values) == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
    assert load.percentile([3.0], 50) == 3.0


def test_results_are_lines_of_json_without_the_key(talker: Talker, tmp_path: Path) -> None:
    load.write_lines(tmp_path / "r.jsonl", asked(talker, requests=2, key="secret-key"))
    text = (tmp_path / "r.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["outcome"] for line in text.splitlines()] == ["good", "good"]
    assert "secret-key" not in text


@pytest.mark.parametrize("changes", [{"url": "localhost:1"}, {"questions": []}])
def test_a_plan_that_can_not_work_is_refused(talker: Talker, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"is no URL|without a question"):
        asked(talker, **changes)


def test_a_stopped_run_ends_with_what_is_under_way(talker: Talker) -> None:
    stopped = threading.Event()
    plan = load.Plan(talker.url, "m", [QUESTION], rate=50.0, requests=10_000, seconds=600)
    results = load.run(plan, lambda result: stopped.set() if result.number == 3 else None, stopped)
    assert 4 <= len(results) < 1000
    assert load.summary(results)["passed"]
