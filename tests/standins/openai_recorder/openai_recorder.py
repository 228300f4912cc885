#!/usr/bin/python3
"""Stands in for an OpenAI-compatible server in tests, to look at what Open WebUI sends. It is no model.

Use: openai_recorder.py PORT FILE. Offers one model, `recorder`, whose answer is always ANSWER, streamed or not, and
appends each request to FILE as one line of JSON: path, key, body. It refuses tools, as LMDeploy without a parser for
them does. Listens on the loopback address alone.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODEL = "recorder"
ANSWER = "This was recorded."
REFUSAL = "Please launch the api_server with --tool-call-parser if you want to use tools."


class Handler(BaseHTTPRequestHandler):
    """Answer the two paths that Open WebUI asks."""

    record: Path

    def do_GET(self) -> None:
        """List the one model."""
        self.note(None)
        self.answer({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "tests"}]})

    def do_POST(self) -> None:
        """Complete a chat."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.note(body)
        if body.get("tools"):
            self.answer({"object": "error", "message": REFUSAL, "code": 400}, status=400)
            return
        head = {"id": "chatcmpl-1", "created": 0, "model": MODEL}
        message = {"role": "assistant", "content": ANSWER}
        if not body.get("stream"):
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.answer({**head, "object": "chat.completion", "choices": [choice]})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for delta, reason in ((message, None), ({}, "stop")):
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            piece = json.dumps({**head, "object": "chat.completion.chunk", "choices": [choice]})
            self.wfile.write(f"data: {piece}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def note(self, body: Any) -> None:
        """Append the request to the record."""
        line = json.dumps({"path": self.path, "key": self.headers.get("Authorization", ""), "body": body})
        with self.record.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def answer(self, content: Any, status: int = 200) -> None:
        """Send JSON."""
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main() -> None:
    """Serve until stopped."""
    Handler.record = Path(sys.argv[2])
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()


if __name__ == "__main__":
    main()
