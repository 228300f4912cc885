"""Rules on roles: argument specs are the truth, and defaults, entry points and folders agree with them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tree import Tree

PARTS = ("README.md", "defaults/main.yml", "meta/argument_specs.yml", "tasks/main.yml")
TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "dict": (dict,),
    "float": (int, float),
    "int": (int,),
    "list": (list,),
    "path": (str,),
    "raw": (object,),
    "str": (str,),
}


def _computed(value: object) -> bool:
    """Return whether a default is a Jinja expression, whose value is known when it runs."""
    return isinstance(value, str) and "{{" in value


def _nested(options: dict[str, Any], above: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every option by its dotted name, the nested ones too."""
    for name, spec in options.items():
        yield above + name, spec
        yield from _nested(spec.get("options") or {}, f"{above}{name}.")


def role_has_all_parts(tree: Tree) -> Iterator[str]:
    """A role has tasks, defaults, specs, a page, and a molecule scenario of its name."""
    for role in tree.roles():
        for part in PARTS:
            if f"roles/{role}/{part}" not in tree.names:
                yield f"roles/{role}: {part} is missing"
        if f"molecule/{role}/molecule.yml" not in tree.names:
            yield f"roles/{role}: molecule/{role} is missing"


def spec_equals_defaults(tree: Tree) -> Iterator[str]:
    """A variable stands in the spec and in the defaults, with one value; only a required one has no default."""
    for role in tree.roles():
        defaults = tree.yaml(f"roles/{role}/defaults/main.yml") or {}
        for entry, spec in tree.specs(role).items():
            for name, option in (spec.get("options") or {}).items():
                where = f"roles/{role} ({entry}): {name}"
                if option.get("required"):
                    if name in defaults:
                        yield f"{where} is required and has a default"
                elif name not in defaults:
                    yield f"{where} is in the spec and not in the defaults"
                elif "default" not in option or option["default"] != defaults[name]:
                    yield f"{where} is {option.get('default')!r} in the spec and {defaults[name]!r} in the defaults"
        for name in defaults.keys() - tree.options(role).keys():
            yield f"roles/{role}: {name} is in the defaults and not in the spec"


def defaults_have_the_type_of_the_spec(tree: Tree) -> Iterator[str]:
    """A default is of the type that the spec promises; a Jinja expression is judged when it runs."""
    for role in tree.roles():
        for name, option in _nested(tree.options(role)):
            default, kind = option.get("default"), option.get("type")
            if default is None or _computed(default):
                continue
            number_is_bool = isinstance(default, bool) and kind in ("int", "float")
            if not isinstance(default, TYPES.get(kind or "", ())) or number_is_bool:
                yield f"roles/{role}: {name} is {default!r}, and its type is {kind}"


def options_are_described(tree: Tree) -> Iterator[str]:
    """Every option, nested ones too, has a type and a sentence; a list says of what; choices hold the default."""
    for role in tree.roles():
        for name, option in _nested(tree.options(role)):
            where = f"roles/{role}: {name}"
            described = option.get("description") or ""
            text = " ".join(described) if isinstance(described, list) else str(described)
            if not text.strip().endswith("."):
                yield f"{where} has no description that ends with a full stop"
            if option.get("type") not in TYPES:
                yield f"{where} has the type {option.get('type')!r}"
            if option.get("type") == "list" and "elements" not in option:
                yield f"{where} is a list without elements"
            choices, default = option.get("choices"), option.get("default")
            if choices and default is not None and default not in choices and not _computed(default):
                yield f"{where}: {default!r} is not one of its choices"


def entry_points_exist(tree: Tree) -> Iterator[str]:
    """Each entry point of the specs is a task file, and says in a line what it does."""
    for role in tree.roles():
        for entry, spec in tree.specs(role).items():
            if f"roles/{role}/tasks/{entry}.yml" not in tree.names:
                yield f"roles/{role}: the spec names {entry}, and tasks/{entry}.yml is missing"
            if not spec.get("short_description"):
                yield f"roles/{role}: {entry} has no short_description"


def variables_carry_the_role(tree: Tree) -> Iterator[str]:
    """Public variables start with the role's name, and internal ones (vars/) with two underscores before it."""
    for role in tree.roles():
        for name in tree.yaml(f"roles/{role}/defaults/main.yml") or {}:
            if not name.startswith(f"{role}_"):
                yield f"roles/{role}/defaults: {name} does not start with {role}_"
        for path in tree.match(f"roles/{role}/vars/**"):
            for name in tree.yaml(path) or {}:
                if not name.startswith(f"__{role}_"):
                    yield f"{path}: {name} does not start with __{role}_"


def units_have_a_user_of_their_own(tree: Tree) -> Iterator[str]:
    """A unit of a role runs as its own user; one that must be root's says why, by `# It is root, since`."""
    for name in tree.match("roles/*/templates/*.service.j2"):
        text = tree.text(name)
        users = re.findall(r"^(?:User=(?!root$|0$)\S|DynamicUser=yes$)", text, re.MULTILINE)
        if not users and "# It is root, since " not in text:
            yield f"{name}: the unit runs as root, and does not say why"
