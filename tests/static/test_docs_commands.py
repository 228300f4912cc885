"""Every command in a page is one that a test runs, or its line says what it needs that no test machine has."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tree import Tree

ROOT = Path(__file__).parents[2]
TREE = Tree.of_checkout(ROOT)
PAGES = TREE.match("README.md", "CONTRIBUTING.md", "docs/en/*.md")
BLOCK = re.compile(r"^ *```(bash|powershell)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
# Said by the line itself: "needs a GPU", "needs Windows", "needs a container registry".
MARK = re.compile(r"#.*\bneeds \w+")
# Playbooks are found where tests and scripts name them, as are the variables that go with them. Other programs are
# listed here: how the command begins, the file that runs it, and the words there that do.
RUN: dict[str, tuple[str, str]] = {
    "script/lab": ("script/test", "script/lab"),
    "script/setup": ("script/test", "script/setup --test"),
    "script/test": (".ci/run", "script/test"),
    "script/docs": ("tests/static/test_commands.py", 'run("script/docs", "--check")'),
    "script/audit": ("tests/unit/test_script_audit.py", "script/audit"),
    "script/bench scale": ("tests/unit/test_bench_scale.py", '"script/bench", "scale"'),
    "script/bench trust": ("tests/unit/test_faults.py", '"script/bench", "trust"'),
    "script/sanity": ("script/test", "aside sanity script/sanity"),
    "script/versions": ("script/test", "aside versions script/versions"),
    "pytest tests/inputs": ("script/test", "pytest tests/inputs"),
    "INPUTS=1000 pytest tests/inputs": ("tests/inputs/test_inputs.py", "INPUTS"),
    "ansible-galaxy collection build": ("tests/static/test_commands.py", '"ansible-galaxy", "collection", "build"'),
    "ansible-galaxy collection install": ("molecule/site/tests/test_site.py", '"collection", "install"'),
    "ansible-playbook selfhost.lmdeploy.site": ("molecule/site/tests/test_site.py", 'f"selfhost.lmdeploy.{name}"'),
    "ansible-builder create": ("tests/static/test_commands.py", '"ansible-builder", "create"'),
    "age-keygen": ("tests/unit/test_webui_backup.py", "age-keygen"),
    "systemctl status": ("molecule/api_server/tests/test_api_server.py", "is_running"),
    "journalctl -u": ("molecule/site/tests/test_site.py", "journalctl"),
    "sudo cat /etc/open-webui/admin-password": ("molecule/site/tests/test_site.py", "/etc/open-webui/admin-password"),
    "python3 /usr/local/lib/api-server/engine_releases.py": (
        "molecule/releases/tests/test_releases.py",
        "engine_releases.py",
    ),
    # A newcomer's first steps are taken from the page itself.
    "sudo apt-get update": ("molecule/quickstart/tests/test_quickstart.py", "docs/en/quickstart.md"),
    "sudo apt-get install --yes git": ("molecule/quickstart/tests/test_quickstart.py", "docs/en/quickstart.md"),
    "git clone": ("molecule/quickstart/tests/test_quickstart.py", "docs/en/quickstart.md"),
    "cd": ("molecule/quickstart/tests/test_quickstart.py", "docs/en/quickstart.md"),
    # Every script/test runs with the environment's programs first.
    ". .venv/bin/activate": ("script/test", 'PATH="$PWD/.venv/bin:$PATH"'),
}
# What a person gives in place of a word of a page is not looked for: inventories, hosts, paths.
OPTIONS = {"-i": 1, "-K": 0, "--limit": 1, "--tags": 1, "--check": 0, "--diff": 0}


def commands(text: str) -> list[str]:
    """Return the command lines of a page's blocks, without those that say what they need."""
    blocks = [re.sub(r" *\\\n *", " ", block) for _kind, block in BLOCK.findall(text)]
    lines = [line.strip().removesuffix(" &") for block in blocks for line in block.splitlines()]
    marked = [line for line in lines if line and not line.startswith("#") and not MARK.search(line)]
    return [part.strip() for line in marked for part in re.sub(r"\s+#\s.*", "", line).split(" && ")]


def sources(tree: Tree) -> str:
    """Return the text of everything that script/test runs."""
    return "\n".join(tree.text(name) for name in tree.match("script/*", "tests/**.py", "molecule/**"))


def unproven(command: str, tree: Tree, text: str) -> str:
    """Return what no test runs of a command; empty when all of it is run."""
    words = shlex.split(command)
    if words[0] == "ansible-playbook" and words[1].endswith(".yml"):
        name = Path(words[1]).stem
        if not re.search(rf"\b{name}\.yml|verb\(\s*\"{name}\"|play\w*\(\s*\"{name}\"|\.lmdeploy\.{name}\b", text):
            return f"the playbook {name}"
        rest = iter(words[2:])
        for word in rest:
            if word == "-e":
                given = next(rest)
                for variable in re.findall(r"(\w+)\W*:", given) if given[0] == "{" else [given.partition("=")[0]]:
                    if variable not in text:
                        return f"{name} with {variable}"
            elif word in OPTIONS:
                _given = [next(rest) for _argument in range(OPTIONS[word])]
            else:
                return f"the option {word}"
        return ""
    for beginning, (file, proof) in RUN.items():
        if f"{command} ".startswith(f"{beginning} "):
            return "" if proof in tree.text(file) else f"{proof!r}, which {file} lacks"
    return "the program: name its test in RUN, or what it needs in a comment of the line"


@pytest.mark.parametrize("name", PAGES)
def test_commands_of_a_page_are_run(name: str) -> None:
    """A reader meets no command that was never seen to work."""
    text = sources(TREE)
    found = {command: unproven(command, TREE, text) for command in commands(TREE.text(name))}
    bad = [f"{command}: no test runs {why}" for command, why in found.items() if why]
    assert not bad, f"{name}\n" + "\n".join(bad)


def test_no_proof_is_left_over() -> None:
    """A row whose command left the pages goes too."""
    everywhere = [
        c for name in TREE.match("README.md", "CONTRIBUTING.md", "docs/en/*.md") for c in commands(TREE.text(name))
    ]
    unused = [row for row in RUN if not any(f"{command} ".startswith(f"{row} ") for command in everywhere)]
    assert not unused


def keys_of(value: Any) -> Iterator[str]:
    """Yield every key of a parsed block."""
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from keys_of(inner)


@pytest.mark.parametrize("name", PAGES)
def test_examples_of_a_page_are_yaml_with_known_variables(name: str) -> None:
    """What a reader copies into an inventory is read, and means something."""
    roles = TREE.roles()
    known = {option for role in roles for option in TREE.options(role)}
    for block in re.findall(r"^ *```yaml\n(.*?)^ *```$", TREE.text(name), re.MULTILINE | re.DOTALL):
        for key in keys_of(yaml.safe_load(block)):
            assert key in known or not key.startswith(tuple(f"{role}_" for role in roles)), f"{key} is no variable"


@pytest.mark.parametrize(
    "page",
    [
        "```bash\nansible-playbook playbooks/nothing.yml -i lab\n```\n",
        "```bash\nansible-playbook playbooks/smoke.yml -i lab -e smoke_unknown=1\n```\n",
        "```bash\nrm -rf everything\n```\n",
    ],
)
def test_a_command_that_nobody_runs_is_refused(page: str) -> None:
    """Each kind of command is refused when no test stands behind it."""
    tree = Tree.of_texts(ROOT, {"script/test": "playbooks/smoke.yml"})
    assert all(unproven(command, tree, sources(tree)) for command in commands(page))


def test_a_marked_line_is_left_alone() -> None:
    """What needs a GPU says so."""
    assert commands("```bash\nscript/x   # on the box; needs a GPU\n```\n") == []
