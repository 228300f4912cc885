"""Rules on the repository as a whole: purpose lines, foreign places, exceptions, documents, scenarios, inventories."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from tree import Tree

MIN_WORDS = 4
HEAD_LINES = 6
# Files whose form has no room for a comment, or that a tool writes.
NO_PURPOSE = (
    "CHANGELOG.md",
    "LICENSE",
    "changelogs/changelog.yaml",
    "changelogs/fragments/*",
    "**.md",
    "**.json",
    "**.png",
    "tests/unit/fixtures/**",
)
GENERATED = ("roles/*/files/locks/**", "requirements/*.txt", "changelogs/changelog.yaml")
PLACES = re.compile(
    r"\b(?:[\w-]+\.)*(?:pypi|pythonhosted|npmjs|npmmirror|anaconda|debian|ubuntu|modelscope|tuna\.tsinghua\.edu)"
    r"\.(?:org|com|net|io|cn)\b"
)
# The official places that code must know to reach or to test them; each stands only where it is used.
OFFICIAL_PLACES = {
    "repo.anaconda.com": ("roles/miniconda/**", "roles/mirrors/**"),
    "pypi.org": ("plugins/module_utils/preflight_host.py", "tests/unit/test_preflight_checks.py"),
    "conda.anaconda.org": ("plugins/module_utils/preflight_host.py", "tests/unit/test_preflight_checks.py"),
    "modelscope.cn": ("plugins/module_utils/preflight_host.py",),
}
EXCEPTION = re.compile(
    r"#\s*(?:noqa|nosec|type:\s*ignore)(?::\s*[\w\[\]-]+(?:\s*,\s*[\w\[\]-]+)*|\[[^\]]*\])?(?P<reason>.*)"
)
LINK = re.compile(r"(?<!!)!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)


def _head(text: str) -> list[str]:
    return [line for line in text.splitlines()[:HEAD_LINES] if line.strip() and not line.startswith(("#!", "---"))]


def files_say_what_they_are_for(tree: Tree) -> Iterator[str]:
    """The first lines of a file say its purpose in a few words."""
    exempt = set(tree.match(*NO_PURPOSE, *GENERATED))
    for name in tree.names:
        text = tree.text(name)
        if name in exempt or not text.strip():
            continue
        words = max(
            (len(line.split()) for line in _head(text) if re.match(r'\s*("""|#|//|\{#|<!--|;)', line)), default=0
        )
        if words < MIN_WORDS:
            yield f"{name} does not say in its first lines what it is for"


def _index_hosts() -> set[str]:
    """Return the hosts of the package indexes that this machine uses: they must not travel with the repository."""
    names = ("PIP_INDEX_URL", "UV_INDEX_URL", "UV_DEFAULT_INDEX", "NPM_CONFIG_REGISTRY", "HF_ENDPOINT")
    return {host for n in names if (host := urlsplit(os.environ.get(n, "")).hostname)}


def no_foreign_places(tree: Tree) -> Iterator[str]:
    """No path of one machine and no package registry's host, but for official places where they are used."""
    hosts = _index_hosts()
    checkout = f"{tree.root}/"
    for name in tree.names:
        if name in ("tests/static/rules_repository.py", "tests/static/test_rules.py"):
            continue
        official = {place for place, globs in OFFICIAL_PLACES.items() if name in tree.match(*globs)}
        for number, line in enumerate(tree.text(name).splitlines(), 1):
            found = {*PLACES.findall(line), *(host for host in hosts if host in line)} - official
            if found or checkout in line:
                yield f"{name}:{number} names a place that is not everyone's: {line.strip()[:100]}"


def lint_has_no_skip_list(tree: Tree) -> Iterator[str]:
    """ansible-lint skips nothing: exceptions are local and give their reason."""
    for key in ("skip_list", "warn_list", "mock_modules", "mock_roles"):
        if key in (tree.yaml(".config/ansible-lint.yml") or {}):
            yield f".config/ansible-lint.yml has a {key}"
    for name in tree.match("**.ansible-lint-ignore", ".ansible-lint*", ".config/ansible-lint-ignore.txt"):
        yield f"{name} hides findings"


def exceptions_give_their_reason(tree: Tree) -> Iterator[str]:
    """A noqa, nosec or type: ignore is followed by its reason, or stands under a comment that gives it."""
    for name in tree.match("**.py", "**.yml", "**.yaml", "script/*", "**.sh"):
        if name.startswith("tests/static/"):
            continue
        lines = tree.text(name).splitlines()
        for number, line in enumerate(lines):
            found = EXCEPTION.search(line)
            above = lines[number - 1].strip() if number else ""
            if found and len(found["reason"].split()) < MIN_WORDS - 1 and not above.startswith("#"):
                yield f"{name}:{number + 1} has an exception without a reason: {line.strip()[:100]}"


def _slug(heading: str) -> str:
    """Return the anchor that a forge gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def links_in_documents_resolve(tree: Tree) -> Iterator[str]:
    """A link inside the repository leads to a file, and to a heading where it names one."""
    folders = {str(parent) for n in tree.names for parent in PurePosixPath(n).parents}
    for name in tree.match("**.md"):
        for target in LINK.findall(tree.text(name)):
            if urlsplit(target).scheme:
                continue
            path, _, anchor = target.partition("#")
            aim = os.path.normpath(PurePosixPath(name).parent / path) if path else name
            if aim not in tree.names and aim not in folders:
                yield f"{name} links to {target}, which does not exist"
            elif anchor and anchor not in {_slug(h) for h in HEADING.findall(tree.text(aim))}:
                yield f"{name} links to {target}, and there is no such heading"


def documented_variables_exist(tree: Tree) -> Iterator[str]:
    """A variable that a page or an inventory names is one of a role's, or a fact that a role leaves, spelled right."""
    roles = tree.roles()
    facts = {name for task in tree.tasks() for name in task.keys.get("ansible.builtin.set_fact") or {}}
    known = {name for role in roles for name in tree.options(role)} | facts
    pattern = re.compile(rf"\b(?:{'|'.join(roles) or '-'})_\w+\b")
    for name in tree.match("README.md", "docs/**.md", "inventories/**.yml", "molecule/*/converge.yml"):
        text = tree.text(name)
        words = re.findall(r"`([^`\n]+)`", text) if name.endswith(".md") else text.splitlines()
        for word in {found for w in words for found in pattern.findall(w)}:
            if word not in known and not any(f"/{word}" in n or f".{word}" in n for n in tree.names):
                yield f"{name} names {word}, which no role has"


def dependencies_are_told(tree: Tree) -> Iterator[str]:
    """A package that we ask for stands in docs/en/dependencies.md; what Open WebUI asks for is its own affair."""
    told = tree.text("docs/en/dependencies.md").lower() if "docs/en/dependencies.md" in tree.names else ""
    for name in tree.match("requirements/*.in", "roles/*/files/locks/*.in"):
        if name.startswith("roles/open_webui/"):
            continue
        for line in tree.text(name).splitlines():
            package = re.match(r"[A-Za-z0-9][\w.-]*", line)
            # Types of a package go with the package.
            if package and not re.search(
                rf"(?<![\w-]){re.escape(package[0].lower().removeprefix('types-'))}(?![\w-])", told
            ):
                yield f"{name} asks for {package[0]}, which docs/en/dependencies.md does not tell"


def scenarios_have_checks(tree: Tree) -> Iterator[str]:
    """A molecule scenario has tests: an empty folder would pass."""
    for path in tree.match("molecule/*/molecule.yml"):
        folder = path.removesuffix("/molecule.yml")
        checks = "".join(tree.text(n) for n in tree.match(f"{folder}/tests/test_*.py"))
        if folder != "molecule/default" and "def test_" not in checks:
            yield f"{folder} has no test"


def scripts_can_be_started(tree: Tree) -> Iterator[str]:
    """What a person starts has an interpreter line and the execute bit."""
    for name in tree.match("script/*", ".ci/*"):
        if not tree.text(name).startswith("#!"):
            yield f"{name} has no interpreter line"
        elif (tree.root / name).is_file() and not os.access(tree.root / name, os.X_OK):
            yield f"{name} is not executable"


def claims_name_tests_that_exist(tree: Tree) -> Iterator[str]:
    """A test that a page names is one that there is, so that nobody trusts what nothing shows."""
    there = "\n".join(tree.text(name) for name in tree.match("molecule/*/tests/*.py", "tests/*/*.py"))
    for name in tree.match("docs/**.md"):
        for test in sorted(set(re.findall(r"`(test_\w+)`", tree.text(name)))):
            if f"def {test}(" not in there:
                yield f"{name}: there is no {test}"
