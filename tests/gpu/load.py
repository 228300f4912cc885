"""Ask an engine as many clients at once do, and count what comes back: answers, tokens, faults, seconds."""

from __future__ import annotations

import http.client
import json
import statistics
import threading
import time
from dataclasses import dataclass, field
from typing import Any

TIMEOUT_SECONDS = 120.0


class AskError(Exception):
    """The engine did not answer as it should; ``status`` is its HTTP status, 0 where there was none."""

    def __init__(self, status: int, text: str) -> None:
        """Keep both."""
        super().__init__(f"HTTP {status}: {text}" if status else text)
        self.status = status
        self.text = text


@dataclass(frozen=True)
class Engine:
    """Where an engine listens, what it serves, and its key ('' for none)."""

    port: int
    model: str
    key: str

    def connect(self, timeout: float = TIMEOUT_SECONDS) -> http.client.HTTPConnection:
        """Return a connection that can carry several requests."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def call(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        connection: http.client.HTTPConnection | None = None,
        timeout: float = TIMEOUT_SECONDS,
    ) -> Any:
        """Return the JSON of a 200 answer; everything else raises AskError."""
        own = connection or self.connect(timeout)
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            own.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body), headers)
            answer = own.getresponse()
            content = answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            own.close()
            raise AskError(0, f"{type(error).__name__}: {error}") from error
        finally:
            if connection is None:
                own.close()
        if answer.status != 200:
            raise AskError(answer.status, content[:500])
        return json.loads(content) if content.startswith(("{", "[")) else content

    def chat(self, content: Any, connection: http.client.HTTPConnection | None = None, **settings: Any) -> Any:
        """Return the answer to one message; at temperature 0 unless told otherwise."""
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0, **settings}
        timeout = float(body.pop("timeout", TIMEOUT_SECONDS))
        return self.call("/v1/chat/completions", body, connection, timeout)


@dataclass
class Load:
    """What a number of clients got."""

    clients: int
    seconds: float = 0.0
    answers: int = 0
    tokens: int = 0
    failures: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Return it as figures: per second, and the latency of one answer in seconds."""
        spread = statistics.quantiles(self.latencies, n=20) if len(self.latencies) > 1 else self.latencies * 19
        return {
            "clients": self.clients,
            "seconds": round(self.seconds, 2),
            "answers": self.answers,
            "failures": len(self.failures),
            "first_failures": self.failures[:3],
            "tokens_per_second": round(self.tokens / self.seconds, 1) if self.seconds else 0.0,
            "requests_per_second": round(self.answers / self.seconds, 2) if self.seconds else 0.0,
            "latency_p50_seconds": round(spread[9], 4) if spread else None,
            "latency_p95_seconds": round(spread[18], 4) if spread else None,
        }


def load(engine: Engine, clients: int, seconds: float, tokens: int = 128) -> Load:
    """Have ``clients`` ask without a pause for ``seconds``, ``tokens`` tokens an answer; running answers may end."""
    result, lock = Load(clients), threading.Lock()
    began = time.monotonic()

    def client(number: int) -> None:
        connection, asked = engine.connect(), 0
        while time.monotonic() - began < seconds:
            asked += 1
            started = time.monotonic()
            try:
                question = f"Client {number}, question {asked}: tell a story."
                answer = engine.chat(question, connection, max_tokens=tokens, ignore_eos=True)
                made = int(answer["usage"]["completion_tokens"])
                fault = "" if made == tokens else f"{made} tokens instead of {tokens}"
            except (AskError, KeyError, TypeError) as error:
                made, fault = 0, repr(error)
            with lock:
                result.tokens += made
                if fault:
                    result.failures.append(fault)
                else:
                    result.answers += 1
                    result.latencies.append(time.monotonic() - started)
        connection.close()

    threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_SECONDS + seconds)
    result.seconds = time.monotonic() - began
    return result
