# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Load on an OpenAI-compatible server: so many questions, so fast, and what became of each. Standard library only.

``run(Plan(...))`` returns a Result for each request that was due; ``summary(results)`` adds them up. Nothing is lost: a
request that failed, was cut or was answered wrongly counts as that, and one that could not be sent counts as failed.

* closed loop: ``concurrency`` clients, each asks again as soon as it has its answer. Shows what a server can do.
* open loop: requests are due at ``rate`` a second whatever the server does, as people's are. Their seconds count from
  the moment that they were due, so a server that stalls can't make its figures better by slowing the client down.
"""

from __future__ import annotations

import http.client
import itertools
import json
import math
import random
import re
import ssl
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

GOOD, FAILED, CUT, WRONG = "good", "failed", "cut", "wrong"
OUTCOMES = (GOOD, FAILED, CUT, WRONG)
# What a server says of an answer that came to its own end.
ENDINGS = ("stop", "length")
PERCENTILES = (50, 90, 99)
DETAIL_LENGTH = 300


@dataclass(frozen=True)
class Question:
    """What is asked: text, or the content parts of a message (an image, say), and what the answer must match.

    ``expected`` is a regular expression that is searched for without regard to case; any answer will do when empty.
    """

    content: str | Sequence[dict[str, Any]]
    expected: str = ""
    max_tokens: int = 64


@dataclass(frozen=True)
class Plan:
    """What is sent, how fast, and for how long. ``url`` is the server's base; /v1 at its end does no harm.

    ``rate`` above 0 makes an open loop of so many requests a second, else ``concurrency`` clients make a closed one.
    The run ends after ``requests`` requests or ``seconds`` seconds, whichever is first; requests under way then have
    ``timeout_seconds`` to end, as every request has. ``streamed`` is the share of requests that are streamed, 0 to 1.
    """

    url: str
    model: str
    questions: Sequence[Question]
    key: str = ""
    concurrency: int = 1
    rate: float = 0.0
    requests: int = 20
    seconds: float = 30.0
    streamed: float = 1.0
    timeout_seconds: float = 60.0
    # Most requests under way in an open loop; further ones count as failed: the client is full, not the server.
    most_in_flight: int = 256
    # Requests come at random as people do, or evenly spaced.
    spread: bool = True
    seed: int = 1
    ca_file: str = ""
    temperature: float = 0.0
    # Further fields of each request's body.
    body: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What became of one request. Times are seconds; ``due`` counts from the begin of the run, others from ``due``."""

    number: int
    outcome: str
    streamed: bool
    due: float
    seconds: float
    first_token_seconds: float | None = None
    tokens: int = 0
    status: int = 0
    detail: str = ""
    answer: str = ""

    def line(self) -> str:
        """Return it as a line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


class Bad(Exception):
    """An answer that is none: the outcome, and what was seen."""

    def __init__(self, outcome: str, detail: str, status: int = 0) -> None:
        """Keep the outcome beside the text."""
        super().__init__(detail)
        self.outcome, self.status = outcome, status


@dataclass
class Seen:
    """What came of an answer so far."""

    status: int = 0
    text: str = ""
    tokens: int = 0
    ending: str = ""
    first_token: float | None = None


class Server:
    """The server that a plan names; every request has a connection of its own, as browsers behind proxies do."""

    def __init__(self, plan: Plan) -> None:
        """Take the address apart; nothing is asked yet."""
        parts = urlsplit(plan.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            message = f"'{plan.url}' is no URL: it begins with http:// or https://"
            raise ValueError(message)
        self._plan, self._host, self._port = plan, parts.hostname, parts.port
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        self._tls = None
        if parts.scheme == "https":
            self._tls = ssl.create_default_context(cafile=plan.ca_file or None)

    def ask(self, question: Question, *, streamed: bool) -> Seen:
        """Return a whole answer, or raise Bad with what it was instead."""
        plan, seen = self._plan, Seen()
        deadline = time.monotonic() + plan.timeout_seconds
        connection: http.client.HTTPConnection
        if self._tls:
            connection = http.client.HTTPSConnection(
                self._host, self._port, timeout=plan.timeout_seconds, context=self._tls
            )
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=plan.timeout_seconds)
        try:
            connection.request("POST", self._path, *self._request(question, streamed=streamed))
            answer = connection.getresponse()
            seen.status = answer.status
            if answer.status != http.client.OK:
                text = answer.read(DETAIL_LENGTH).decode(errors="replace")
                raise Bad(FAILED, f"HTTP {answer.status}: {text}", answer.status)
            if streamed:
                read_stream(_lines(answer, deadline), seen)
            else:
                read_plain(answer.read(), seen)
        except http.client.IncompleteRead as error:
            raise Bad(CUT, f"the connection ended within the answer: {error}", seen.status) from error
        except (OSError, http.client.HTTPException) as error:
            # Before the first byte of an answer nothing was cut: there was none.
            outcome = CUT if seen.status else FAILED
            raise Bad(outcome, f"{type(error).__name__}: {error}", seen.status) from error
        finally:
            connection.close()
        judge(question, seen)
        return seen

    def _request(self, question: Question, *, streamed: bool) -> tuple[bytes, dict[str, str]]:
        """Return body and headers."""
        plan = self._plan
        content = question.content if isinstance(question.content, str) else list(question.content)
        body: dict[str, Any] = {
            "model": plan.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": question.max_tokens,
            "temperature": plan.temperature,
            "stream": streamed,
            **plan.body,
        }
        if streamed:
            body["stream_options"] = {"include_usage": True}
        headers = {"Content-Type": "application/json"}
        if plan.key:
            headers["Authorization"] = f"Bearer {plan.key}"
        return json.dumps(body).encode(), headers


def _lines(answer: http.client.HTTPResponse, deadline: float) -> Iterator[bytes]:
    """Yield the lines of a stream; one that trickles for ever ends at the deadline."""
    while line := answer.readline():
        yield line
        if time.monotonic() > deadline:
            message = "the stream went on longer than a request may take"
            raise TimeoutError(message)


def read_stream(lines: Iterable[bytes], seen: Seen) -> None:
    """Read server-sent events to their last; raise Bad where something is missing or is no chunk."""
    chunks, usage, finished = 0, 0, False
    for raw in lines:
        line = raw.decode(errors="replace").strip()
        if not line or line.startswith(":"):
            continue
        if finished:
            raise Bad(WRONG, f"something came after [DONE]: {line[:DETAIL_LENGTH]}", seen.status)
        if not line.startswith("data:"):
            raise Bad(WRONG, f"not an event: {line[:DETAIL_LENGTH]}", seen.status)
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            finished = True
            continue
        chunk = _parsed(data, seen)
        usage = int((chunk.get("usage") or {}).get("completion_tokens") or usage)
        for choice in chunk.get("choices") or []:
            delta = choice.get("delta") or {}
            text = (delta.get("content") or "") + (delta.get("reasoning_content") or "")
            if text:
                chunks += 1
                seen.text += text
                seen.first_token = seen.first_token or time.monotonic()
            seen.ending = choice.get("finish_reason") or seen.ending
    seen.tokens = usage or chunks
    if not finished:
        raise Bad(CUT, f"the stream ended without [DONE] after {chunks} chunks", seen.status)


def read_plain(raw: bytes, seen: Seen) -> None:
    """Read an answer that came in one piece."""
    content = _parsed(raw.decode(errors="replace"), seen)
    try:
        choice = content["choices"][0]
        message = choice["message"]
    except (KeyError, IndexError, TypeError) as error:
        raise Bad(WRONG, f"no completion: {str(content)[:DETAIL_LENGTH]}", seen.status) from error
    seen.text = (message.get("content") or "") + (message.get("reasoning_content") or "")
    seen.ending = choice.get("finish_reason") or ""
    seen.tokens = int((content.get("usage") or {}).get("completion_tokens") or 0)


def _parsed(text: str, seen: Seen) -> dict[str, Any]:
    """Return JSON that is an object and no error."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise Bad(CUT if text else FAILED, f"not JSON: {text[:DETAIL_LENGTH]}", seen.status) from error
    if not isinstance(content, dict):
        raise Bad(WRONG, f"no object: {text[:DETAIL_LENGTH]}", seen.status)
    if content.get("error"):
        raise Bad(FAILED, f"the server said: {str(content['error'])[:DETAIL_LENGTH]}", seen.status)
    return content


def judge(question: Question, seen: Seen) -> None:
    """Raise Bad unless an answer came to its own end and says what it must."""
    if seen.ending not in ENDINGS:
        raise Bad(CUT, f"the answer ended with {seen.ending or 'no'} finish_reason", seen.status)
    if not seen.text.strip():
        raise Bad(WRONG, "the answer is empty", seen.status)
    if question.expected and not re.search(question.expected, seen.text, re.IGNORECASE):
        raise Bad(WRONG, f"no {question.expected!r} in {seen.text[:DETAIL_LENGTH]!r}", seen.status)


class Run:
    """One run of a plan."""

    def __init__(
        self, plan: Plan, tell: Callable[[Result], None] | None = None, stopped: threading.Event | None = None
    ) -> None:
        """Prepare; ``tell`` is called with each result as it comes, from the thread that has it."""
        if not plan.questions:
            message = "a plan without a question"
            raise ValueError(message)
        self._plan, self._tell, self._server = plan, tell, Server(plan)
        self._stopped = stopped or threading.Event()
        self._lock = threading.Lock()
        self._results: list[Result] = []
        # Which requests are streamed and when they are due is the same in every run.
        self._random = random.Random(plan.seed)  # noqa: S311 this is no secret
        self._began = time.monotonic()

    def __call__(self) -> list[Result]:
        """Send everything and return the results by their number."""
        self._began = time.monotonic()
        if self._plan.rate > 0:
            self._open()
        else:
            self._closed()
        return sorted(self._results, key=lambda result: result.number)

    def _streamed(self, number: int) -> bool:
        """Tell whether a request is streamed: the share is kept at every moment."""
        share = min(max(self._plan.streamed, 0.0), 1.0)
        return math.floor((number + 1) * share) > math.floor(number * share)

    def _one(self, number: int, due: float) -> None:
        """Ask one question and keep what became of it."""
        plan, streamed = self._plan, self._streamed(number)
        question = plan.questions[number % len(plan.questions)]
        seen, outcome, detail = Seen(), GOOD, ""
        try:
            seen = self._server.ask(question, streamed=streamed)
        except Bad as bad:
            outcome, detail, seen.status = bad.outcome, str(bad), bad.status
        except Exception as error:  # noqa: BLE001 what nobody foresaw is a failed request, not a lost one
            outcome, detail = FAILED, f"{type(error).__name__}: {error}"
        first = None if seen.first_token is None else round(seen.first_token - self._began - due, 6)
        seconds = round(time.monotonic() - self._began - due, 6)
        self._keep(
            Result(
                number, outcome, streamed, round(due, 6), seconds, first, seen.tokens, seen.status, detail, seen.text
            )
        )

    def _keep(self, result: Result) -> None:
        with self._lock:
            self._results.append(result)
        if self._tell:
            self._tell(result)

    def _closed(self) -> None:
        numbers = itertools.count()

        def client() -> None:
            while True:
                with self._lock:
                    number = next(numbers)
                now = time.monotonic() - self._began
                if number >= self._plan.requests or now >= self._plan.seconds or self._stopped.is_set():
                    return
                self._one(number, now)

        threads = [threading.Thread(target=client, daemon=True) for _n in range(max(self._plan.concurrency, 1))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _open(self) -> None:
        threads: list[threading.Thread] = []
        for number, due in enumerate(self._arrivals()):
            if self._stopped.wait(max(0.0, self._began + due - time.monotonic())):
                break
            threads = [thread for thread in threads if thread.is_alive()]
            if len(threads) >= self._plan.most_in_flight:
                late = round(time.monotonic() - self._began - due, 6)
                detail = f"not sent: {len(threads)} requests are under way, and most_in_flight is no more"
                self._keep(Result(number, FAILED, self._streamed(number), round(due, 6), late, detail=detail))
                continue
            thread = threading.Thread(target=self._one, args=(number, due), daemon=True)
            threads.append(thread)
            thread.start()
        for thread in threads:
            thread.join()

    def _arrivals(self) -> Iterator[float]:
        """Yield when requests are due, in seconds from the begin."""
        due = 0.0
        for _n in range(self._plan.requests):
            if due >= self._plan.seconds:
                return
            yield due
            due += self._random.expovariate(self._plan.rate) if self._plan.spread else 1 / self._plan.rate


def run(
    plan: Plan, tell: Callable[[Result], None] | None = None, stopped: threading.Event | None = None
) -> list[Result]:
    """Send what a plan says and return a result for each request that was due, by number.

    Once ``stopped`` is set, nothing new is sent; what is under way ends.
    """
    return Run(plan, tell, stopped)()


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return the smallest value that so many percent of all don't exceed; None without any."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)] if ordered else None


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Return p50, p90, p99 and max of values."""
    shown = {f"p{percent}": percentile(values, percent) for percent in PERCENTILES}
    return {**shown, "max": max(values, default=None)}


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """Return figures of a run. Speeds and times are of good answers only; every other answer is counted beside them."""
    counts = {outcome: sum(result.outcome == outcome for result in results) for outcome in OUTCOMES}
    good = [result for result in results if result.outcome == GOOD]
    wall = max((result.due + result.seconds for result in results), default=0.0)
    streams = [(r, r.first_token_seconds) for r in good if r.first_token_seconds is not None]
    paces = [(r.seconds - first) / (r.tokens - 1) for r, first in streams if r.tokens > 1]
    details: dict[str, int] = {}
    for result in results:
        if result.outcome != GOOD:
            told = f"{result.outcome}: {result.detail}"
            details[told] = details.get(told, 0) + 1
    return {
        "requests": len(results),
        **counts,
        "passed": bool(results) and counts[GOOD] == len(results),
        "wall_seconds": round(wall, 3),
        "requests_per_second": round(len(good) / wall, 3) if wall else 0.0,
        "tokens_per_second": round(sum(r.tokens for r in good) / wall, 2) if wall else 0.0,
        "seconds": spread([r.seconds for r in good]),
        "first_token_seconds": spread([stream[1] for stream in streams]),
        "token_seconds": spread(paces),
        # The most frequent first; ten tell enough.
        "faults": dict(sorted(details.items(), key=lambda pair: -pair[1])[:10]),
    }


def write_lines(path: Path, results: Iterable[Result]) -> None:
    """Write results as lines of JSON."""
    path.write_text("".join(result.line() + "\n" for result in results), encoding="utf-8")
