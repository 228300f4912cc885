"""The score of a document: exact, nearly so, or not at all. The reader here is a fake that knows the text."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import ocr
import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.openai_api import OpenAI
from serving import serving


class FakeReader:
    """An OpenAI-compatible server that sees nothing: it knows by its bytes which text a picture is to have."""

    def __init__(self) -> None:
        self.texts: dict[bytes, str] = {}
        reader = self

        class Handler(BaseHTTPRequestHandler):
            """Answers a chat about a picture."""

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

            def do_POST(self) -> None:
                """Tell the text of the picture, or fail where none is known."""
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                url = body["messages"][0]["content"][1]["image_url"]["url"]
                text = reader.texts.get(base64.b64decode(url.removeprefix("data:image/png;base64,")))
                content = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
                self.send_response(200 if text is not None else 500)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.api = OpenAI(f"http://127.0.0.1:{self.server.server_port}", "", 5.0)


@pytest.fixture
def reader() -> Iterator[FakeReader]:
    """Serve from a thread."""
    made = FakeReader()
    with serving(made.server):
        yield made


def test_documents_are_the_same_in_every_run_and_differ_from_each_other() -> None:
    made = ocr.samples(3)
    assert made == ocr.samples(3)
    assert len({document.text for document in made}) == len(made) == 12
    for document in made:
        words = document.text.split()
        assert len(words) > 15
        assert all(word.split("&")[0] in document.html for word in words)


def test_each_document_is_asked_for_and_scored(reader: FakeReader, tmp_path: Path) -> None:
    documents = ocr.samples(1)
    pictures = {document.name: tmp_path / f"{document.name}.png" for document in documents}
    for document in documents:
        pictures[document.name].write_bytes(document.name.encode())
        reader.texts[document.name.encode()] = document.text
    # One letter wrong, and one that is not answered at all.
    reader.texts[b"scan-1"] = documents[2].text.replace("e", "c", 1)
    del reader.texts[b"handwriting-1"]
    scores = ocr.ask(reader.api, "m", documents, pictures)
    assert [score.errors for score in scores[:3]] == [0, 0, 1]
    assert scores[3].rate == 1
    report = ocr.report(scores).splitlines()
    assert report[1].split()[:4] == ["print", "1", "1", "0.0%"]
    assert report[-1].split()[:3] == ["all", "4", "2"]


@pytest.mark.parametrize(
    ("wanted", "read", "count"),
    [("", "", 0), ("abc", "", 3), ("", "abc", 3), ("kitten", "sitting", 3), ("27,50", "27.50", 1), ("ab", "ba", 2)],
)
def test_errors_are_letters_to_add_take_out_or_change(wanted: str, read: str, count: int) -> None:
    assert ocr.errors(wanted, read) == count


def test_the_form_of_a_table_is_no_error() -> None:
    read = "```\n| Pos | Article |\n|-----|:--------|\n| 1 | Bolt M6 |\n```"
    assert ocr.plain(read) == "Pos Article 1 Bolt M6"
    assert ocr.plain("a - b --- c") == "a - b --- c"
