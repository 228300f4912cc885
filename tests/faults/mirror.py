"""A package index and a conda channel that misbehave on demand; runs on the test host with its own Python.

Use: mirror.py PORT CHANNEL_FOLDER. The first part of a path names the fault: /good/simple/, /status-500/channel/...
The index holds one small wheel, `faultless`; `mirror.py --lock` prints a hashed lock of it.
"""

from __future__ import annotations

import hashlib
import io
import re
import sys
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAME, VERSION = "faultless", "1.0"
WHEEL = f"{NAME}-{VERSION}-py3-none-any.whl"
# So often a busy server refuses before it answers, for each path.
BUSY_TIMES = 2


def wheel(version: str = VERSION) -> bytes:
    """Return the wheel, the same bytes every time; with another version inside it is whole and not the one meant."""
    info = f"{NAME}-{VERSION}.dist-info"
    files = {
        # Large enough to be cut in the middle.
        f"{NAME}.py": f"VERSION = '{version}'\n" + "# nothing\n" * 20000,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), text)
    return buffer.getvalue()


def lock() -> str:
    """Return a lock of the wheel."""
    return f"{NAME}=={VERSION} \\\n    --hash=sha256:{hashlib.sha256(wheel()).hexdigest()}\n"


class Mirror(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    channel = Path("/srv/channel")
    refused: dict[str, int] = {}  # noqa: RUF012  # shared by all requests on purpose

    def log_message(self, form: str, *words: object) -> None:
        """Be silent."""

    def found(self, path: str) -> bytes | None:
        """Return what lies at a path."""
        if path.rstrip("/") == f"/simple/{NAME}":
            return f'<!DOCTYPE html><html><body><a href="../../files/{WHEEL}">{WHEEL}</a></body></html>'.encode()
        if path == f"/files/{WHEEL}":
            return wheel()
        file = self.channel / path.removeprefix("/channel/")
        return file.read_bytes() if path.startswith("/channel/") and ".." not in path and file.is_file() else None

    def reply(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        """Answer; with another length than the body's the client waits for what never comes."""
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if body.startswith(b"<!") else "application/octet-stream")
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        """Answer with the fault that the path names."""
        fault, slash, rest = self.path.lstrip("/").partition("/")
        body = self.found(slash + rest)
        is_page = rest.startswith("simple/")
        status = re.fullmatch(r"status-(\d+)", fault)
        if status:
            self.reply(int(status[1]), b"no", Retry_After="1")
        elif fault == "busy" and self.refused.get(rest, 0) < BUSY_TIMES:
            self.refused[rest] = self.refused.get(rest, 0) + 1
            self.reply(429 if self.refused[rest] == 1 else 503, b"later", Retry_After="1")
        elif body is None:
            self.reply(404, b"nothing here")
        elif fault == "wrong" and not is_page:
            other = wheel("6.6") if rest.startswith("files/") else body[:-100] + bytes(100)
            self.reply(200, other)
        elif fault == "half" and not is_page:
            self.reply(200, body[: len(body) // 2])
        elif fault == "cut" and not is_page:
            self.close_connection = True
            self.reply(200, body[: len(body) // 2], len(body))
        else:
            self.reply(200, body)

    do_HEAD = do_GET


def main() -> None:
    """Serve until killed, or print the lock."""
    if sys.argv[1] == "--lock":
        sys.stdout.write(lock())
        return
    Mirror.channel = Path(sys.argv[2])
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Mirror).serve_forever()


if __name__ == "__main__":
    main()
