"""The Chinese pages say what the English ones say: same pages, headings, code, names, links and figures."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Pages outside of docs/, with their twins.
PAIRS = {"README.md": "README.zh.md", "CONTRIBUTING.md": "CONTRIBUTING.zh.md"}
# Written by script/docs in both languages, and compared with the specs by its own test.
GENERATED = "<!-- Made by script/docs"
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"(^|\s)\s*#\s.*$", re.MULTILINE)
CODE = re.compile(r"(`+)(.+?)\1", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FIGURE = re.compile(r"(?<![\w.,/-])\d+(?:[.,]\d+)*(?![\w/-])")


def twins() -> dict[str, str]:
    """Return the name of every English page with that of its Chinese one."""
    pages = {f"docs/en/{path.name}": f"docs/zh/{path.name}" for path in sorted((ROOT / "docs/en").glob("*.md"))}
    return {**PAIRS, **pages}


def parts(text: str) -> dict[str, Counter[str]]:
    """Return what must be the same in both languages, by kind."""
    prose = FENCE.sub("", text)
    headings = Counter(re.findall(r"^#+(?= )", prose, re.MULTILINE))
    blocks = [f"{kind}\n{COMMENT.sub('', code)}" for kind, code in FENCE.findall(text)]
    names = Counter(" ".join(code.split()) for _marks, code in CODE.findall(prose))
    # Headings, and so their anchors, are translated; the pages are not.
    links = Counter(re.sub(r"#.*|(?<=docs/)(en|zh)/|(?<=[A-Z])\.zh(?=\.md)", "", link) for link in LINK.findall(prose))
    spoken = LINK.sub("", CODE.sub("", prose))
    figures = Counter(dict.fromkeys(FIGURE.findall(spoken), 1))
    return {"headings": headings, "code blocks": Counter(blocks), "names": names, "links": links, "figures": figures}


def differences(english: str, chinese: str) -> list[str]:
    """Return one line for each thing that only one of two pages has."""
    found = []
    there = parts(chinese)
    for kind, wanted in parts(english).items():
        found += [f"{kind}: the Chinese page lacks {one!r}" for one in (wanted - there[kind]).elements()]
        # A number may be a word in English and a figure in Chinese.
        if kind != "figures":
            found += [f"{kind}: only the Chinese page has {one!r}" for one in (there[kind] - wanted).elements()]
    return found


def test_every_page_has_its_twin() -> None:
    """No page stands in one language alone."""
    missing = [chinese for chinese in twins().values() if not (ROOT / chinese).exists()]
    assert not missing, f"to be translated: {', '.join(missing)}"
    orphans = {path.name for path in (ROOT / "docs/zh").glob("*.md")} - {Path(page).name for page in twins()}
    assert not orphans, f"in docs/zh without a page in docs/en: {', '.join(sorted(orphans))}"


@pytest.mark.parametrize("english", sorted(twins()))
def test_page_is_in_step(english: str) -> None:
    """What can be compared without knowing either language is the same."""
    text, path = (ROOT / english).read_text(encoding="utf-8"), ROOT / twins()[english]
    if text.startswith(GENERATED):
        pytest.skip("made by script/docs in both languages")
    if not path.exists():
        pytest.skip("the test above names it")
    found = differences(text, path.read_text(encoding="utf-8"))
    assert not found, f"{english} and {path.relative_to(ROOT)}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("english", "chinese", "word"),
    [
        ("# A\n\n## B\n", "# 甲\n", "headings"),
        ("```bash\nls -l  # look\n```\n", "```bash\nls  # 看\n```\n", "code blocks"),
        ("Set `a_b`.", "设置 `a_c`。", "names"),
        ("[A](a.md#x)", "[甲](b.md#x)", "links"),
        ("It takes 41.5 s.", "需要 41.6 s。", "figures"),
    ],
)
def test_a_difference_is_seen(english: str, chinese: str, word: str) -> None:
    """Each comparison refuses a page made to break it."""
    assert any(found.startswith(word) for found in differences(english, chinese))


def test_a_translation_is_not_a_difference() -> None:
    """Words, comments and anchors may differ."""
    english = "# A\n\n[A](a.md#one) `x` 5 s\n\n```bash\nls  # look\n```\n"
    assert differences(english, "# 甲\n\n[甲](a.md#一) `x` 5 s\n\n```bash\nls  # 看\n```\n") == []


def test_pages_have_quotes_that_ansible_test_takes() -> None:
    """Its no-smart-quotes, which runs with --full alone: Chinese pages quote with 「」."""
    quotes = re.compile("[\u2018\u2019\u201c\u201d]")
    pages = [name for pair in twins().items() for name in pair]
    assert not [name for name in pages if quotes.search((ROOT / name).read_text(encoding="utf-8"))]
