"""Score how exactly a vision model reads documents: print, tables, blurred scans, handwriting.

  script/bench ocr --url http://127.0.0.1:23333 [--model NAME] [--key-file FILE] [--samples 3]
  script/bench ocr --images-only      only make the documents, in artifacts/bench/ocr

The documents are made on the spot with the browser that the tests use, the same ones in every run, so their text is
known to the letter. Any OpenAI-compatible server with a vision model will do; one on another host's loopback is reached
by `ssh -L 23333:127.0.0.1:23333 HOST`. Two figures for each kind: how many documents came back without any error, and
the character error rate: the letters that would have to be changed, of all. White space and a table's lines are none.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ansible_collections.selfhost.lmdeploy.plugins.module_utils.openai_api import ApiFault, OpenAI, first_key
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "artifacts/bench/ocr"
QUESTION = (
    "Write down all text in this image, exactly as it stands there, line by line. Separate the cells of a table by |. "
    "Answer with the text alone."
)
ANSWER_TOKENS = 512
WIDTH = 720
HAND = "Breip"
WORDS = (
    "harbour", "invoice", "seventeen", "copper", "garden", "window", "receipt", "bridge", "yellow", "number", "street",
    "quarter", "little", "engine", "paper", "monday", "winter", "signal", "between", "without", "tomorrow", "kitchen",
    "letter", "account", "balance", "market", "station", "copy", "north", "river",
)  # fmt: skip
GOODS = ("Bolt M6", "Washer 8 mm", "Cable NYM 3x1.5", "Fuse 16 A", "Clamp", "Paint, white", "Brush No. 4", "Screw 4x40")
STYLE = "body{margin:0;padding:36px;width:648px;background:#fff;color:#111;line-height:1.5;font-size:22px}p{margin:0}"
CHROMIUM = ["--no-sandbox", "--disable-quic", "--disable-background-networking", "--no-first-run"]


@dataclass(frozen=True)
class Sample:
    """A document: what kind it is, its page, and the text that a reader must find."""

    name: str
    kind: str
    html: str
    text: str


@dataclass(frozen=True)
class Score:
    """What became of a document: the errors, of so many letters, and what was read instead."""

    name: str
    kind: str
    errors: int
    letters: int
    read: str

    @property
    def rate(self) -> float:
        """Return the character error rate; more than 1 where the model said much that is not there."""
        return self.errors / self.letters


# -- documents --------------------------------------------------------------------------------------------------------


def lines(dice: random.Random, count: int) -> list[str]:
    """Return lines of words, with the signs and numbers that documents have."""
    made = []
    for _ in range(count):
        words = dice.sample(WORDS, 5)
        words[dice.randrange(5)] = dice.choice(
            [f"{dice.randrange(2, 9999)}", f"{dice.randrange(1, 99)},50 EUR", "(see p. 3)"]
        )
        line = " ".join(words) + dice.choice([".", ";", "!", " -"])
        made.append(line[0].upper() + line[1:])
    return made


def paragraphs(texts: Iterable[str]) -> str:
    """Return lines as HTML."""
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def printed(dice: random.Random) -> tuple[str, str, list[str]]:
    """Return style, body and lines of a printed page."""
    found = lines(dice, 6)
    return "body{font-family:'DejaVu Serif'}", paragraphs(found), found


def table(dice: random.Random) -> tuple[str, str, list[str]]:
    """Return a bill."""
    rows = [["Pos", "Article", "Pieces", "EUR"]]
    for number, article in enumerate(dice.sample(GOODS, 5), 1):
        rows.append([str(number), article, str(dice.randrange(1, 400)), f"{dice.randrange(1, 90000) / 100:.2f}"])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    style = "body{font-family:'DejaVu Sans'}table{border-collapse:collapse}td{border:1px solid #333;padding:6px 14px}"
    return style, f"<table>{body}</table>", [" ".join(row) for row in rows]


def scan(dice: random.Random) -> tuple[str, str, list[str]]:
    """Return a page that lay askew on a poor scanner."""
    found = lines(dice, 5)
    turn = dice.uniform(-1.5, 1.5)
    style = (
        "body{font-family:'DejaVu Serif';background:#e9e6dc;filter:blur(.9px) contrast(.8)}"
        f"#page{{transform:rotate({turn:.2f}deg)}}"
        "#grain{position:absolute;inset:0;opacity:.35;mix-blend-mode:multiply}"
    )
    grain = (
        '<svg id="grain" width="100%" height="100%"><filter id="n">'
        f'<feTurbulence baseFrequency=".8" seed="{dice.randrange(99)}"/>'
        '<feColorMatrix type="saturate" values="0"/></filter><rect width="100%" height="100%" filter="url(#n)"/></svg>'
    )
    return style, f'<div id="page">{paragraphs(found)}</div>{grain}', found


def hand(dice: random.Random) -> tuple[str, str, list[str]]:
    """Return a note in a typeface like handwriting, whose words dance a little."""
    found = lines(dice, 4)

    def dancing(word: str) -> str:
        turn, rise = dice.uniform(-2, 2), dice.uniform(-2, 2)
        moved = f"transform:rotate({turn:.1f}deg) translateY({rise:.1f}px)"
        return f'<span style="display:inline-block;{moved}">{escape(word)}</span>'

    moved = "".join(f"<p>{' '.join(map(dancing, line.split()))}</p>" for line in found)
    return f"body{{font-family:'{HAND}';font-size:32px;color:#1d2b64}}", moved, found


KINDS: dict[str, Callable[[random.Random], tuple[str, str, list[str]]]] = {
    "print": printed,
    "table": table,
    "scan": scan,
    "handwriting": hand,
}


def samples(count: int) -> list[Sample]:
    """Return so many documents of each kind, the same ones in every run."""
    made = []
    for kind, draw in KINDS.items():
        for number in range(1, count + 1):
            style, body, found = draw(random.Random(f"{kind} {number}"))  # noqa: S311 this is no secret
            html = f"<!doctype html><meta charset=utf-8><style>{STYLE}{style}</style><body>{body}"
            made.append(Sample(f"{kind}-{number}", kind, html, "\n".join(found)))
    return made


def render(documents: Sequence[Sample], folder: Path) -> dict[str, Path]:
    """Write each document as a picture and return where."""
    families = subprocess.run(["fc-list", ":", "family"], capture_output=True, text=True, check=True).stdout
    for family, package in (("DejaVu Serif", "fonts-dejavu-core"), (HAND, "fonts-breip")):
        if family not in families:
            sys.exit(f"bench: the typeface {family} is not there: apt install {package}")
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
        page = browser.new_page(viewport={"width": WIDTH, "height": 100})
        for document in documents:
            page.set_content(document.html)
            written[document.name] = folder / f"{document.name}.png"
            page.screenshot(path=written[document.name], full_page=True)
        browser.close()
    return written


# -- scores -----------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Return text without what no reader is blamed for: white space, a table's lines, the frame of a code block."""
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"^```\w*$", " ", text, flags=re.MULTILINE)
    # The line below a table's head: |---|---|.
    text = re.sub(r"^[|\s:-]*-{3,}[|\s:-]*$", " ", text, flags=re.MULTILINE)
    return " ".join(text.replace("|", " ").split())


def errors(wanted: str, read: str) -> int:
    """Return how many letters must be added, taken out or changed (Levenshtein's distance)."""
    row = list(range(len(read) + 1))
    for number, letter in enumerate(wanted, 1):
        before, row[0] = row[0], number
        for place, other in enumerate(read, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (letter != other))
    return row[-1]


def score(document: Sample, answer: str) -> Score:
    """Compare what was read with what is there."""
    wanted, read = plain(document.text), plain(answer)
    return Score(document.name, document.kind, errors(wanted, read), len(wanted), answer)


def ask(server: OpenAI, model: str, documents: Sequence[Sample], pictures: dict[str, Path]) -> list[Score]:
    """Show each document to the model; an answer that does not come is one with every letter wrong."""
    scores = []
    for document in documents:
        data = base64.b64encode(pictures[document.name].read_bytes()).decode()
        try:
            answer, _, seconds = server.chat(model, QUESTION, ANSWER_TOKENS, f"data:image/png;base64,{data}")
        except ApiFault as fault:
            print(f"{document.name}: {fault}")
            answer, seconds = "", 0.0
        scores.append(score(document, answer))
        print(
            f"{document.name}: {scores[-1].errors} errors in {scores[-1].letters} letters, {seconds:.1f} s", flush=True
        )
    return scores


def report(scores: Sequence[Score]) -> str:
    """Return a table: for each kind how many were read exactly, and the error rate of all its letters."""
    rows = [("KIND", "DOCUMENTS", "EXACT", "ERROR RATE", "WORST")]
    for kind in [*KINDS, "all"]:
        own = [score for score in scores if kind in (score.kind, "all")]
        if own:
            exact = sum(score.errors == 0 for score in own)
            rate = sum(score.errors for score in own) / sum(score.letters for score in own)
            worst = max(own, key=lambda score: score.rate)
            rows.append((kind, str(len(own)), str(exact), f"{rate:.1%}", f"{worst.name} {worst.rate:.1%}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{word:<{widths[i]}}" for i, word in enumerate(row)).rstrip() for row in rows)


def main() -> None:
    """Make documents, have them read, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:23333", help="base address of the server")
    parser.add_argument("--model", default="", help="name of the model; the server's first one by default")
    parser.add_argument("--key-file", type=Path, help="file whose first line is the key")
    parser.add_argument("--samples", type=int, default=3, help="documents of each kind")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that an answer may take")
    parser.add_argument("--images-only", action="store_true", help="only make the documents")
    given = parser.parse_args()
    documents = samples(given.samples)
    pictures = render(documents, FOLDER)
    print(f"{len(pictures)} documents are in {FOLDER}")
    if given.images_only:
        return
    key = first_key(given.key_file.read_text(encoding="utf-8")) if given.key_file else ""
    server = OpenAI(given.url, key, given.timeout)
    try:
        model = given.model or next(iter(server.models()), "")
    except ApiFault as fault:
        sys.exit(f"bench: {fault}")
    scores = ask(server, model, documents, pictures)
    written = {"url": given.url, "model": model, "documents": [{**vars(score), "rate": score.rate} for score in scores]}
    (FOLDER.parent / "ocr.json").write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{model} at {given.url}\n{report(scores)}")


if __name__ == "__main__":
    main()
