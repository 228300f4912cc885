# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Give the models of this host to other hosts of the fleet, read-only, as long as somebody takes them.

    python3 model_share_server.py STORE ADDRESS PORT PEM IDLE_SECONDS

The transient unit model-share.service runs it while models go round (module model_share). PEM holds a certificate and
its key that were made for this run. TLS is mutual with that one certificate: who has not got it is turned away in the
handshake, before a single byte of HTTP.

GET /NAME/ENTRY/PATH answers with a file of the store, whole or one range of it, also from an entry that this host is
still filling; what is not there (yet) is 404. Nobody trusts these bytes: whoever takes them compares them with
checksums that came another way. It ends by itself when nobody asked for IDLE_SECONDS.

Standard library only, Python 3.10 or later.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

CHUNK_BYTES = 1 << 20
SILENCE_SECONDS = 30
MOST_CONNECTIONS = 128


class Share(ThreadingHTTPServer):
    """The store behind TLS, for those that hold the run's certificate."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, store: Path, address: str, port: int, pem: Path) -> None:
        """Listen; the certificate is both ours and the only one that we take."""
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, port), Handler)
        self.store = store.resolve()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.load_cert_chain(pem)
        self.context.load_verify_locations(pem)
        self.context.verify_mode = ssl.CERT_REQUIRED
        self.asked_at = time.monotonic()
        self.free = threading.BoundedSemaphore(MOST_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take a connection where there is room; a crowd is turned away instead of piling up."""
        if self.free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Shake hands in the connection's own thread, so that a silent stranger blocks nobody."""
        try:
            request.settimeout(SILENCE_SECONDS)
            with self.context.wrap_socket(request, server_side=True) as secured:
                self.finish_request(secured, client_address)
        except OSError as error:
            sys.stderr.write(f"{client_address[0]}: {error}\n")
        finally:
            self.shutdown_request(request)
            self.free.release()

    def find(self, path: str) -> Path | None:
        """Return the file of the store that a request names, or None."""
        parts = unquote(path).strip("/").split("/")
        if len(parts) < 3 or any(part in ("", ".", "..") or part.startswith(".") for part in parts):
            return None
        name, entry, *rest = parts
        for folder in (entry, f"{entry}.partial"):
            base = self.store / name / folder
            file = (base / "/".join(rest)).resolve()
            if file.is_relative_to(base) and file.is_file():
                return file
        return None


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Share
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent: a line for each piece would fill the journal."""

    def do_GET(self) -> None:
        """Answer with a file or a range of it."""
        self.server.asked_at = time.monotonic()
        file = self.server.find(self.path)
        if file is None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        with file.open("rb") as source:
            size = os.fstat(source.fileno()).st_size
            begin, end, status = 0, size, 200
            if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                begin, status = min(int(match[1]), size), 206
                end = max(begin, min(int(match[2]) + 1 if match[2] else size, size))
            self.send_response(status)
            self.send_header("Content-Length", str(end - begin))
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
            self.end_headers()
            source.seek(begin)
            left = end - begin
            while left and (piece := source.read(min(left, CHUNK_BYTES))):
                self.wfile.write(piece)
                left -= len(piece)
                self.server.asked_at = time.monotonic()


def tell_systemd(text: str) -> None:
    """Tell the service manager our state: sd_notify(3), silent outside a unit."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.sendto(text.encode(), "\0" + address[1:] if address.startswith("@") else address)


def main(arguments: list[str]) -> int:
    """Serve until nobody asks any more."""
    store, address, port, pem, idle = arguments
    share = Share(Path(store), address, int(port), Path(pem))
    threading.Thread(target=share.serve_forever, kwargs={"poll_interval": 1}, daemon=True).start()
    tell_systemd("READY=1")
    while time.monotonic() - share.asked_at < float(idle):
        time.sleep(1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
