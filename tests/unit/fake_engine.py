"""An engine without a model: it speaks the same HTTP, and fails in the ways that engines fail in."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeEngine:
    """Serves from a thread. Its attributes are what it does, and may change while it runs."""

    def __init__(self, model: str = "smol", key: str = "k" * 32, host: str = "127.0.0.1", port: int = 0) -> None:
        """Take the port; answer from start()."""
        self.model, self.key = model, key
        self.health_status, self.health_word = 200, "healthy"
        # Seconds that a token takes; None is for ever, and an event that the test sets ends it.
        self.token_seconds: float | None = 0.0
        self.token_status = 200
        self.guarded = True
        # As LMDeploy's middleware: its ``api_tokens`` are looked at for each request.
        self.doorman: Any = None
        self.released = threading.Event()
        # Counters of /metrics; None means that there is no /metrics.
        self.counter: Callable[[], float] | None = None
        self.tokens = 0
        engine = self

        class Handler(BaseHTTPRequestHandler):
            """Answers as an OpenAI-compatible server."""

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

            def answer(self, status: int, content: Any) -> None:
                """Send JSON, or text as it is."""
                body = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def may_enter(self) -> bool:
                """Tell whether the key is right, or nobody looks at it."""
                given = str(self.headers.get("Authorization")).removeprefix("Bearer ")
                known = engine.doorman.api_tokens if engine.doorman else [sha256(engine.key.encode()).digest()]
                return not engine.guarded or sha256(given.encode()).digest() in known

            def do_GET(self) -> None:
                """Health, models, metrics."""
                if self.path == "/health":
                    self.answer(engine.health_status, {"status": engine.health_word})
                elif not self.may_enter():
                    self.answer(401, {"error": "unauthorized"})
                elif self.path == "/v1/models":
                    self.answer(200, {"data": [{"id": engine.model}]})
                elif self.path == "/metrics" and engine.counter is not None:
                    text = "# HELP x\nprocess_cpu_seconds_total 3\n"
                    self.answer(200, f'{text}lmdeploy:generation_tokens_total{{model_name="x y"}} {engine.counter()}\n')
                else:
                    self.answer(404, {})

            def do_POST(self) -> None:
                """Make tokens."""
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if not self.may_enter():
                    self.answer(401, {"error": "unauthorized"})
                    return
                engine.released.wait(engine.token_seconds)
                engine.tokens += 1
                usage = {"completion_tokens": min(1, body["max_tokens"])}
                pictured = isinstance(body["messages"][0]["content"], list)
                message = {"role": "assistant", "content": "OPEN" if pictured else "The capital of France is Paris."}
                self.answer(engine.token_status, {"choices": [{"message": message}], "usage": usage})

        self.server = ThreadingHTTPServer((host, port), Handler, bind_and_activate=False)
        self.server.daemon_threads = True
        self.server.server_bind()
        self.port: int = self.server.server_address[1]

    def start(self) -> FakeEngine:
        """Open the door."""
        self.server.server_activate()
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __enter__(self) -> FakeEngine:
        """Start."""
        return self.start()

    def stop(self) -> None:
        """Close the door, and let whoever waits go."""
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()


def wait_until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for a condition, or fail."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.01)
