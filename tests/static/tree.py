"""A view of the repository's files for the static rules: text, YAML with line numbers, roles and tasks."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

TASK_LISTS = ("tasks", "pre_tasks", "post_tasks", "handlers")
BLOCK_LISTS = ("block", "rescue", "always")
LINE = "__line__"


class PlainLoader(yaml.SafeLoader):
    """Safe YAML that reads Ansible's own tags (!vault, !unsafe) as text."""


class LinedLoader(PlainLoader):
    """The same, and every mapping knows its first line (from 0) under the key ``__line__``."""


def _tagged(_loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> str:
    return f"!{suffix} {node.value}"


def _mapping(loader: LinedLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    pairs = {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}
    return {**pairs, LINE: node.start_mark.line}


PlainLoader.add_multi_constructor("!", _tagged)
LinedLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


@dataclass
class Task:
    """One task or handler: its file, its role ('' in a playbook), its keys, its first line (from 0)."""

    path: str
    role: str
    handler: bool
    keys: dict[str, Any]

    @property
    def line(self) -> int:
        """Return the first line of the task, from 0."""
        return int(self.keys[LINE])

    @property
    def where(self) -> str:
        """Return file, line and name, as a finding quotes them."""
        return f"{self.path}:{self.line + 1} ({self.keys.get('name', 'no name')})"

    @property
    def owners(self) -> tuple[str, ...]:
        """Return what names of this file start with: the role, or the playbook's or its folder's own name."""
        path = Path(self.path)
        return (self.role,) if self.role else (path.stem, path.parent.name)


def _pattern(glob: str) -> re.Pattern[str]:
    """Turn a glob into a regular expression: ``**`` crosses folders, ``*`` does not."""
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}
    return re.compile("".join(pieces.get(p, re.escape(p)) for p in re.split(r"(\*\*/|\*\*|\*)", glob)) + r"\Z")


@dataclass
class Tree:
    """Files of a repository by their relative names; each is read once."""

    root: Path
    names: list[str]
    texts: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_checkout(cls, root: Path) -> Tree:
        """Take what git tracks and what it would track: a new file is judged before it is committed."""
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=root,
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        names = {n for n in listed.split("\0") if n and (root / n).is_file() and not (root / n).is_symlink()}
        return cls(root, sorted(names))

    @classmethod
    def of_texts(cls, root: Path, texts: dict[str, str]) -> Tree:
        """Take made-up files: a sample that a rule must refuse."""
        return cls(root, sorted(texts), dict(texts))

    def match(self, *globs: str) -> list[str]:
        """Return the names that one of the globs matches."""
        patterns = [_pattern(g) for g in globs]
        return [n for n in self.names if any(p.match(n) for p in patterns)]

    def text(self, name: str) -> str:
        """Return a file's text; a binary file's is empty."""
        if name not in self.texts:
            try:
                self.texts[name] = (self.root / name).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                self.texts[name] = ""
        return self.texts[name]

    def yaml(self, name: str, *, lined: bool = False) -> Any:
        """Return the parsed YAML of a file, or None where there is no such file."""
        if name not in self.names:
            return None
        return yaml.load(self.text(name), Loader=LinedLoader if lined else PlainLoader)  # noqa: S506  both are safe loaders

    def roles(self) -> list[str]:
        """Return the names of the roles."""
        return sorted({n.split("/")[1] for n in self.match("roles/*/**")})

    def specs(self, role: str) -> dict[str, dict[str, Any]]:
        """Return the entry points of a role's argument specs."""
        return (self.yaml(f"roles/{role}/meta/argument_specs.yml") or {}).get("argument_specs") or {}

    def options(self, role: str) -> dict[str, dict[str, Any]]:
        """Return the options of all entry points of a role together."""
        return {k: v for spec in self.specs(role).values() for k, v in (spec.get("options") or {}).items()}

    def task_files(self) -> list[str]:
        """Return the files that hold tasks and nothing else."""
        return self.match("roles/*/tasks/**", "roles/*/handlers/**", "playbooks/tasks/**")

    def plays(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield every play (or import of a playbook) with its file."""
        for name in self.match("*.yml", "playbooks/*.yml", "molecule/*/*.yml"):
            content = self.yaml(name, lined=True)
            for play in content if isinstance(content, list) else []:
                yield name, play

    def tasks(self) -> Iterator[Task]:
        """Yield every task and handler of roles and playbooks, those inside blocks too."""
        for name in self.task_files():
            role = name.split("/")[1] if name.startswith("roles/") else ""
            handler = "/handlers/" in name
            for keys in _flat(self.yaml(name, lined=True) or []):
                yield Task(name, role, handler, keys)
        for name, play in self.plays():
            for part in TASK_LISTS:
                for keys in _flat(play.get(part) or []):
                    yield Task(name, "", part == "handlers", keys)


def _flat(tasks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for task in tasks:
        yield task
        for part in BLOCK_LISTS:
            yield from _flat(task.get(part) or [])


def plain(value: Any) -> Any:
    """Return a value without the line numbers."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k != LINE}
    return [plain(v) for v in value] if isinstance(value, list) else value
