#!/usr/bin/env python3
"""A model hub on loopback for tests: the paths of the Hugging Face hub and of ModelScope, and faults on demand.

    hub.py [--port 8799] [--big-mib 8]

It serves one model, test/tiny, with two commits that share one of their weight files, and test/gated, which wants the
token "hf_letmein". Weights are served as large files (SHA-256 in ETag and listing), the rest as git objects.

Faults are set by POST /control with a JSON list, each entry one of

    {"kind": "cut", "path": "model-*", "after": 3000000, "times": 2}    the connection ends after that many bytes
    {"kind": "status", "path": "*", "status": 429, "retry_after": 1, "times": 3}
    {"kind": "wrong", "path": "model-*"}                                one byte is another
    {"kind": "slow", "path": "model-*", "rate": 4000000}                bytes per second

"path" is a glob over the file's name ("" for listings), "times" is how often it strikes (default: always). GET /control
tells what was asked: a list of {"method", "path", "range", "status"}. POST replaces the faults and empties that list.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import random
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_letmein"
PIECE_BYTES = 1 << 16


def git_oid(content: bytes) -> str:
    """Return the name that git gives to this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass
class Repo:
    """A model: commits with their files, and the names of commits."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def add(self, name: str, files: dict[str, bytes]) -> str:
        """Add a commit that ``name`` points to and return its hash."""
        text = json.dumps({path: git_oid(content) for path, content in sorted(files.items())})
        commit = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.commits[commit] = files
        self.refs[name] = commit
        return commit

    def find(self, revision: str) -> str | None:
        """Return the commit that a commit, tag or branch stands for."""
        return revision if revision in self.commits else self.refs.get(revision)


def large(path: str) -> bool:
    """Tell whether a file is kept as a large file."""
    return path.endswith((".safetensors", ".bin", ".gguf"))


def repos(big_mib: int = 8) -> dict[str, Repo]:
    """Make the models that are served; the same bytes every time."""
    chance = random.Random(7)  # noqa: S311 -- content for tests
    first, second, other = (chance.randbytes(big_mib << 20) for _ in range(3))
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.dumps({"metadata": {}, "weight_map": {"a": names[0], "b": names[1]}}).encode()
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64}
    old = {
        "README.md": b"# tiny\n",
        "config.json": json.dumps(config).encode(),
        "model.safetensors.index.json": index,
        names[0]: first,
        names[1]: second,
        "pytorch_model.bin": chance.randbytes(1000),
        "sub/tokenizer.json": b"{}\n",
    }
    tiny = Repo()
    tiny.add("v1", old)
    tiny.add("main", {**old, "README.md": b"# tiny, second edition\n", names[1]: other})
    tiny.refs["master"] = tiny.refs["main"]
    gated = Repo(gated=True)
    gated.add("main", {"config.json": b"{}\n", "model.safetensors": first[:1000]})
    return {"test/tiny": tiny, "test/gated": gated}


class Hub(ThreadingHTTPServer):
    """The server with its models, faults and the list of what was asked."""

    daemon_threads = True

    def __init__(self, port: int = 0, big_mib: int = 8) -> None:
        """Listen on loopback; port 0 takes a free one."""
        super().__init__(("127.0.0.1", port), Handler)
        self.repos = repos(big_mib)
        self.faults: list[dict[str, Any]] = []
        self.log: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Return the address that HF_ENDPOINT takes."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def strike(self, kind: str, path: str) -> dict[str, Any] | None:
        """Return the fault that befalls this request, and count it."""
        with self.lock:
            for fault in self.faults:
                if (
                    fault["kind"] == kind
                    and fnmatch.fnmatch(path, fault.get("path", "*"))
                    and fault.get("times", 1) > 0
                ):
                    if "times" in fault:
                        fault["times"] -= 1
                    return fault
        return None


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent: GET /control tells what was asked."""

    def note(self, status: int) -> None:
        """Remember a request."""
        with self.server.lock:
            entry = {"method": self.command, "path": self.path, "range": self.headers.get("Range"), "status": status}
            self.server.log.append(entry)

    def answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        """Send a whole answer."""
        self.note(status)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def tell(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send JSON."""
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def refuse(self, status: int, code: str) -> None:
        """Say no as the hub does."""
        self.tell({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})

    def do_POST(self) -> None:
        """Take new faults."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path != "/control":
            self.answer(404)
            return
        with self.server.lock:
            self.server.faults = json.loads(body)
            self.server.log = []
        self.send_response(204)
        self.end_headers()

    def do_HEAD(self) -> None:
        """Tell about a file."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer a listing or a file."""
        url = urlsplit(self.path)
        path, query = unquote(url.path), {key: value[0] for key, value in parse_qs(url.query).items()}
        if path == "/control":
            with self.server.lock:
                content = json.dumps(self.server.log).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.listing(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo/files", path):
            self.modelscope_listing(match[1], query.get("Revision", "master"))
        elif match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo", path):
            self.file(match[1], query.get("Revision", "master"), query.get("FilePath", ""))
        else:
            self.answer(404)

    def busy(self, name: str) -> bool:
        """Answer with the status that a fault asks for, and tell whether one did."""
        fault = self.server.strike("status", name)
        if fault:
            headers = {"Retry-After": str(fault["retry_after"])} if "retry_after" in fault else {}
            self.answer(fault["status"], b"{}", headers)
        return fault is not None

    def found(self, model: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return commit and files, or answer why not."""
        repo = self.server.repos.get(model)
        if repo is None:
            self.refuse(404, "RepoNotFound")
        elif repo.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse(403, "GatedRepo")
        elif (commit := repo.find(revision)) is None:
            self.refuse(404, "RevisionNotFound")
        else:
            return commit, repo.commits[commit]
        return None

    def listing(self, model: str, revision: str) -> None:
        """Tell a model's commit and files as the Hugging Face hub does."""
        if self.busy("") or not (found := self.found(model, revision)):
            return
        commit, files = found
        siblings = []
        for path, content in files.items():
            item: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": git_oid(content)}
            if large(path):
                item["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            siblings.append(item)
        self.tell({"_id": "1", "id": model, "modelId": model, "sha": commit, "private": False, "siblings": siblings})

    def modelscope_listing(self, model: str, revision: str) -> None:
        """Tell a model's files as ModelScope does."""
        repo = self.server.repos.get(model)
        commit = repo.find(revision) if repo else None
        if self.busy(""):
            return
        if repo is None or commit is None:
            self.tell({"Code": 10010205001, "Message": "not found", "Success": False}, 404)
            return
        files = [
            {"Path": path, "Name": path, "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest(), "Type": "blob"}
            for path, data in repo.commits[commit].items()
        ]
        self.tell({"Code": 200, "Success": True, "Data": {"Files": files}})

    def file(self, model: str, revision: str, path: str) -> None:
        """Send a file or a range of it."""
        if self.busy(path) or not (found := self.found(model, revision)):
            return
        commit, files = found
        if path not in files:
            self.refuse(404, "EntryNotFound")
            return
        content = files[path]
        etag = hashlib.sha256(content).hexdigest() if large(path) else git_oid(content)
        begin, end, status = 0, len(content), 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            begin, end, status = int(match[1]), int(match[2]) + 1 if match[2] else len(content), 206
        if begin >= len(content) > 0:
            self.answer(416, headers={"Content-Range": f"bytes */{len(content)}"})
            return
        self.note(status)
        self.send_response(status)
        self.send_header("Content-Length", str(end - begin))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", commit)
        if large(path):
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("X-Linked-ETag", f'"{etag}"')
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.body(path, content[begin:end])

    def body(self, path: str, content: bytes) -> None:
        """Send the bytes, with the faults that befall them."""
        if self.server.strike("wrong", path):
            content = content[:-1] + bytes([content[-1] ^ 1])
        cut, slow = self.server.strike("cut", path), self.server.strike("slow", path)
        if cut:
            content = content[: cut["after"]]
        for begin in range(0, len(content), PIECE_BYTES):
            piece = content[begin : begin + PIECE_BYTES]
            self.wfile.write(piece)
            if slow:
                time.sleep(len(piece) / slow["rate"])
        if cut:
            self.close_connection = True
            self.connection.close()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8799)
    parser.add_argument("--big-mib", type=int, default=8, help="size of each weight file in MiB")
    options = parser.parse_args()
    Hub(options.port, options.big_mib).serve_forever()


if __name__ == "__main__":
    main()
