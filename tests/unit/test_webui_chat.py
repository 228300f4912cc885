"""The module webui_chat against a stand-in of Open WebUI's API: the way through, and a reason for each fault."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.webui_api import WebuiError, detail
from ansible_collections.selfhost.lmdeploy.plugins.modules import webui_chat
from serving import serving

EMAIL, PASSWORD, TOKEN = "admin@localhost", "correct horse", "a-token"


class Interface(ThreadingHTTPServer):
    """What the stand-in says; a test changes it."""

    models: tuple[str, ...] = ("small", "large")
    answer: tuple[int, Any] = (200, {"choices": [{"message": {"content": " Paris, of course.\n"}}]})
    asked: dict[str, Any]


class Handler(BaseHTTPRequestHandler):
    """Open WebUI's three paths."""

    server: Interface

    def reply(self, status: int, body: Any) -> None:
        """Send JSON, or raw bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        """List the models to whom signed in."""
        if self.path != "/api/models" or self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.reply(401, {"detail": "Not authenticated"})
        else:
            self.reply(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        """Sign in, or answer."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/api/v1/auths/signin":
            right = body == {"email": EMAIL, "password": PASSWORD}
            self.reply(*((200, {"token": TOKEN}) if right else (400, {"detail": "The password is incorrect"})))
        elif self.headers["Authorization"] == f"Bearer {TOKEN}":
            self.server.asked = body
            self.reply(*self.server.answer)
        else:
            self.reply(401, {"detail": "Not authenticated"})

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def interface() -> Iterator[Interface]:
    """Serve the stand-in on a free port of loopback."""
    server = Interface(("127.0.0.1", 0), Handler)
    with serving(server):
        yield server


@pytest.fixture
def params(interface: Interface, tmp_path: Path) -> dict[str, Any]:
    """Return the module's parameters for the stand-in."""
    (tmp_path / "password").write_text(PASSWORD + "\n", encoding="utf-8")
    (tmp_path / "admin.json").write_text(json.dumps({"email": EMAIL, "name": "Admin"}), encoding="utf-8")
    return {
        "url": f"http://127.0.0.1:{interface.server_port}/",
        "account_file": str(tmp_path / "admin.json"),
        "password_file": str(tmp_path / "password"),
        "model": "",
        "question": "What is the capital of France? Answer in one sentence.",
        "expected": "paris",
        "max_tokens": 8,
        "timeout_seconds": 5,
    }


def test_the_first_model_answers(interface: Interface, params: dict[str, Any]) -> None:
    result = webui_chat.chat(params)
    assert (result["model"], result["answer"], result["models"]) == ("small", "Paris, of course.", ["small", "large"])
    assert 0 <= result["seconds"] < 5
    assert (interface.asked["stream"], interface.asked["max_tokens"]) == (False, 8)


def test_the_model_that_was_named_answers(interface: Interface, params: dict[str, Any]) -> None:
    assert webui_chat.chat({**params, "model": "large"})["model"] == "large"
    assert interface.asked["model"] == "large"


def test_the_password_is_never_repeated(params: dict[str, Any]) -> None:
    Path(params["password_file"]).write_text("a wrong one\n", encoding="utf-8")
    with pytest.raises(
        WebuiError, match=r"refused to sign admin@localhost in \(400\): The password is incorrect"
    ) as fault:
        webui_chat.chat(params)
    assert "a wrong one" not in str(fault.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "none"}, "does not list the model none; it lists small, large"),
        ({"expected": "Rome"}, "answered 'Paris, of course.', in which 'Rome' was expected"),
        ({"password_file": "/nonexistent"}, r"/nonexistent can't be read \(No such file"),
        ({"account_file": "/dev/null"}, "/dev/null is empty"),
        ({"account_file": __file__}, "is no account of the role open_webui"),
        ({"url": "127.0.0.1:8080"}, "starts with http"),
        ({"url": "http://127.0.0.1:1"}, "does not answer at http://127.0.0.1:1/api/v1/auths/signin: .*refused"),
    ],
)
def test_a_fault_is_named(params: dict[str, Any], change: dict[str, Any], words: str) -> None:
    with pytest.raises(WebuiError, match=words):
        webui_chat.chat({**params, **change})


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((400, {"detail": {"message": "tools need a parser"}}), r"no answer of small \(400\): tools need a parser"),
        ((200, {"choices": []}), "no answer of small"),
        ((200, {"choices": [{"message": {"content": "  "}}]}), "answered ''"),
        ((502, b"<html>"), "answered 502 with what is no JSON: '<html>'"),
    ],
)
def test_an_answer_that_is_none_is_a_fault(
    interface: Interface, params: dict[str, Any], answer: tuple[int, Any], words: str
) -> None:
    interface.answer = answer
    with pytest.raises(WebuiError, match=words):
        webui_chat.chat(params)


def test_an_empty_list_of_models_names_the_connection(interface: Interface, params: dict[str, Any]) -> None:
    interface.models = ()
    with pytest.raises(WebuiError, match=r"lists no model.*open_webui_connections"):
        webui_chat.chat(params)


def test_an_empty_password_file_is_named(params: dict[str, Any]) -> None:
    Path(params["password_file"]).write_text("\n", encoding="utf-8")
    with pytest.raises(WebuiError, match="is empty"):
        webui_chat.chat(params)


def test_detail_finds_the_reason_wherever_it_is() -> None:
    assert detail({"error": {"message": "deep"}}) == "deep"
    assert detail(["x"]) == "['x']"
