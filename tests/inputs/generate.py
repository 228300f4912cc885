"""Inventories with faults, made from the argument specs of all roles and from what contradicts itself between them.

Every inventory is a good one with one to three faults. The same seed gives the same inventories.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
GGUF = "/var/lib/models/SmolLM2-135M-Instruct.Q4_1.gguf"
KEY = "0123456789abcdef0123456789abcdef"
# Roles whose variables an inventory sets; preflight's own say how to judge.
ROLES = (
    "api_server", "backup", "conda_env", "gateway", "llama_cpp", "lmdeploy", "miniconda", "mirrors", "model_weights",
    "open_webui",
)  # fmt: skip
# Set by roles for other roles: an inventory that gives them means nothing by it.
INTERNAL = ("conda_env_name", "conda_env_lock", "conda_env_prefix", "conda_env_switched", "conda_env_release")

# What means something to a unit, a shell, an environment file, a template, a URL, a path or a terminal.
HOSTILE = {
    "quote": 'a"b',
    "apostrophe": "it's",
    "backtick": "a`id`b",
    "dollar": "$(touch /tmp/owned)",
    "variable": "${HOME}",
    "semicolon": "a; touch /tmp/owned",
    "and": "a && touch /tmp/owned",
    "newline": "a\nExecStartPre=/bin/touch /tmp/owned",
    "newline_env": "a\nLD_PRELOAD=/tmp/evil.so",
    "carriage_return": "a\rUser=root",
    "section": "x\n[Service]\nUser=root\n",
    "continuation": "a\\",
    "backslash": "a\\x41\\n",
    "percent": "100%",
    "specifier": "%h/%i",
    "comment": "#a",
    "template": "{{ 7 * 7 }}",
    "template_open": "{{",
    "statement": "{% for x in y %}",
    "nul": "a\x00b",
    "bell": "a\x07\x1b[31mb",
    "long": "a" * 20_000,
    "greek": "Ελληνικά",
    "emoji": "模型🙂",
    "right_to_left": "a\u202eb",
    "no_break_space": "a\u00a0b",
    "line_separator": "a\u2028User=root",
    "dash": "-rf",
    "dashes": "--api-keys",
    "dot_dot": "../../../etc/shadow",
    "absolute": "/etc/shadow",
    "blank": " ",
    "inner_blank": "a b",
    "outer_blank": " a ",
    "tab": "a\tb",
    "colon": "a:b:c",
    "comma": "a,b",
    "at": "a@b",
    "equals": "A=B",
    "url": "file:///etc/shadow",
    "script": "javascript:alert(1)",
    "bracket": "[::1",
    "plus": "+/bin/sh",
    "bang": "!id",
    "star": "*",
    "lone_surrogate": "a\udc80b",
    "word_no": "no",
    "word_null": "null",
    "octal": "0o17",
}
# Values that are of another type than asked for.
WRONG: dict[str, tuple[Any, ...]] = {
    "int": ("many", "1.5", "", [1], {"a": 1}, 1.5, "0x10", None),
    "float": ("much", [0.5], {"a": 1}, "1,5", float("nan"), float("inf")),
    "bool": ("maybe", 2, [True], {"a": True}, ""),
    "str": ([["a"]], {"a": 1}, True, 7),
    "path": ({"a": 1}, [["a"]], 7),
    "list": ({"a": 1}, "a,b", 7, True, [None], [["a"]], [{"a": 1}]),
    "dict": ([1], "a=b", "x", 7, True),
}
NUMBERS: dict[str, tuple[Any, ...]] = {
    "int": (-1, 0, 70_000, 2**31, 2**63, 10**30, "-1", "70000"),
    "float": (-0.1, 0.0, 1.0001, 1e308, "-1"),
}


@dataclass(frozen=True)
class Fault:
    """One fault: what kind it is, the variable that a message should name, and what it does to an inventory."""

    kind: str
    variable: str
    detail: str
    apply: Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Case:
    """An inventory with its faults. ``base`` names the good one that it was."""

    number: int
    base: str
    variables: dict[str, Any]
    faults: tuple[Fault, ...]
    # Whether texts may be templates, as those written in an inventory are; those of a vault's lookup are not.
    trusted: bool

    def __str__(self) -> str:
        """Return a name for people."""
        told = "; ".join(f"{fault.kind}: {fault.variable} {fault.detail}" for fault in self.faults)
        return f"case {self.number} ({self.base}, {'template' if self.trusted else 'data'}): {told}"


BASES: dict[str, dict[str, Any]] = {
    "cpu": {"api_server_engine": "llama_cpp", "api_server_model": GGUF},
    "gpu": {"api_server_engine": "lmdeploy"},
    "named": {
        "api_server_engine": "llama_cpp",
        "api_server_model": GGUF,
        "api_server_instances": [{"name": "one", "port": 23401}, {"name": "two", "port": 23402, "model_name": "b"}],
        "open_webui_connections": [
            {"url": "http://127.0.0.1:23401/v1", "api_key": KEY, "models": ["a"], "prefix": "one"},
            {"url": "https://models.example.org/v1"},
        ],
        "open_webui_ollama_urls": ["http://10.0.0.6:11434"],
        "open_webui_settings": {"TASK_MODEL": "b"},
        "api_server_environment": {"OMP_NUM_THREADS": "2"},
        "mirrors_pip_index_url": "https://mirror.example.org/simple",
        "gateway_name": "models.example.org",
        "gateway_engines": [
            {"name": "one-23401", "address": "10.0.0.7", "port": 23401, "model": "a", "api_key": KEY},
            {"name": "two-23402", "address": "fd00::7", "port": 23402, "model": "org/b", "api_key": KEY, "requests": 8},
        ],
        "gateway_web_uis": [{"name": "ui", "address": "10.0.0.8", "port": 8080}],
        "gateway_api_keys": [{"name": "ann", "key": KEY}],
        "backup_copy_to": "/mnt/backups",
    },
}  # fmt: skip


def specs() -> dict[str, dict[str, Any]]:
    """Return every option of the roles by its name."""
    found: dict[str, dict[str, Any]] = {}
    for role in ROLES:
        text = (ROOT / "roles" / role / "meta/argument_specs.yml").read_text(encoding="utf-8")
        for entry in yaml.safe_load(text)["argument_specs"].values():
            found.update(entry.get("options") or {})
    return {name: option for name, option in sorted(found.items()) if name not in INTERNAL}


def setting(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Return what sets a variable."""
    return lambda variables: variables.__setitem__(name, copy.deepcopy(value))


def in_entry(name: str, key: str, value: Any, blank: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """Return what sets a key in the first entry of a list of dicts; ``blank`` is an entry where there is none."""

    def apply(variables: dict[str, Any]) -> None:
        entries = variables.get(name)
        if not isinstance(entries, list) or not entries or not isinstance(entries[0], dict):
            entries = [dict(blank)]
        variables[name] = [{**entries[0], key: copy.deepcopy(value)}, *entries[1:]]

    return apply


def in_dict(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Return what adds a key to a dict."""

    def apply(variables: dict[str, Any]) -> None:
        known = variables.get(name)
        variables[name] = {**(known if isinstance(known, dict) else {}), key: copy.deepcopy(value)}

    return apply


ENTRIES: dict[str, dict[str, Any]] = {
    "gateway_engines": {"name": "one", "address": "10.0.0.7", "port": 23401, "model": "a"},
    "gateway_web_uis": {"name": "ui", "address": "10.0.0.8", "port": 8080},
    "gateway_api_keys": {"name": "ann", "key": KEY},
    "api_server_instances": {"name": "one"},
    "open_webui_connections": {"url": "http://127.0.0.1:9/v1"},
    "model_weights_models": {"id": "OpenGVLab/InternVL3-14B-Instruct"},
    "model_weights_packages": {"package": "p", "version": "1.0", "sha256": "0" * 64, "member": "p/x.gguf"},
}


def faults_of_option(name: str, option: dict[str, Any]) -> Iterator[Fault]:
    """Yield wrong types, numbers out of range, wrong words and hostile texts of one option, and of what is in it."""
    kind = option.get("type", "str")
    for value in WRONG.get(kind, ()):
        yield Fault("type", name, repr(value)[:40], setting(name, value))
    for number in NUMBERS.get(kind, ()):
        yield Fault("range", name, repr(number)[:40], setting(name, number))
    if option.get("choices"):
        yield Fault("choice", name, "'other'", setting(name, "other"))
    if kind in ("str", "path"):
        for called, text in HOSTILE.items():
            yield Fault("hostile", name, called, setting(name, text))
            if kind == "path":
                yield Fault("hostile", name, f"/srv/{called}", setting(name, f"/srv/{text}"))
    elements = option.get("elements")
    if kind == "list" and elements == "str":
        for called, text in HOSTILE.items():
            yield Fault("hostile", name, f"[{called}]", setting(name, [text]))
    if kind == "dict":
        for called, text in HOSTILE.items():
            yield Fault("hostile", name, f"value {called}", in_dict(name, "SOME_NAME", text))
            yield Fault("hostile", name, f"key {called}", in_dict(name, text, "x"))
    for key, inner in (option.get("options") or {}).items():
        yield from faults_of_entry(name, key, inner)


def faults_of_entry(name: str, key: str, inner: dict[str, Any]) -> Iterator[Fault]:
    """Yield the faults of one key of a list's entries."""
    blank, kind = ENTRIES.get(name, {}), inner.get("type", "str")
    for value in WRONG.get(kind, ()):
        yield Fault("type", name, f".{key} {value!r}"[:40], in_entry(name, key, value, blank))
    for number in NUMBERS.get(kind, ()):
        yield Fault("range", name, f".{key} {number!r}"[:40], in_entry(name, key, number, blank))
    if kind in ("str", "path"):
        for called, text in HOSTILE.items():
            yield Fault("hostile", name, f".{key} {called}", in_entry(name, key, text, blank))
    if kind == "dict":
        for called, text in HOSTILE.items():
            yield Fault("hostile", name, f".{key} {called}", in_entry(name, key, {text: text}, blank))
    if inner.get("required"):
        entry = {other: value for other, value in blank.items() if other != key}
        yield Fault("missing", name, f".{key}", setting(name, [entry or {"zzz": 1}]))
    yield Fault("unknown", name, f".{key}z", in_entry(name, f"{key}z", 1, blank))


def faults_of_names(names: list[str]) -> Iterator[Fault]:
    """Yield variables that are spelled wrong."""
    for name in names:
        for wrong in (f"{name}s", name[:-1], f"{name}_x"):
            if wrong not in names:
                yield Fault("unknown", wrong, "", setting(wrong, "x"))


# LMDeploy with a model that it serves, whatever the inventory had.
GPU = {"api_server_engine": "lmdeploy", "api_server_model": "OpenGVLab/InternVL3-14B-Instruct"}


def contradictions() -> Iterator[Fault]:
    """Yield what is good by itself and wrong beside something else."""
    one, two = {"name": "one", "port": 23401}, {"name": "two", "port": 23401}
    for variable, detail, values in (
        ("api_server_instances", "one port for two", {"api_server_instances": [one, two]}),
        ("api_server_instances", "one name for two", {"api_server_instances": [one, {**one, "port": 23402}]}),
        ("open_webui_port", "the engine's port", {"api_server_port": 23500, "open_webui_port": 23500}),
        ("api_server_host", "open without networks", {"api_server_host": "0.0.0.0"}),
        ("api_server_host", "no address", {"api_server_host": "10.0.0.999", "api_server_allowed_networks": ["any"]}),
        ("api_server_allowed_networks", "no network", {
            "api_server_host": "0.0.0.0", "api_server_allowed_networks": ["10.0.0.0/99"]}),
        ("api_server_allowed_networks", "a second setting", {
            "api_server_host": "0.0.0.0", "api_server_allowed_networks": ["any\nUser=root"]}),
        ("open_webui_static_dir", "inside the data", {"open_webui_static_dir": "/var/lib/open-webui/data/static"}),
        ("open_webui_data_dir", "inside conda", {"open_webui_data_dir": "/opt/miniconda3/data"}),
        ("open_webui_data_dir", "in a home", {"open_webui_data_dir": "/home/me/data"}),
        ("open_webui_data_dir", "the root", {"open_webui_data_dir": "/"}),
        ("open_webui_data_dir", "the root, hidden", {"open_webui_data_dir": "/var/lib/open-webui/../../.."}),
        ("open_webui_data_dir", "the system", {"open_webui_data_dir": "/usr/lib"}),
        ("model_weights_dir", "inside conda", {"model_weights_dir": "/opt/miniconda3/models"}),
        ("model_weights_dir", "the root", {"model_weights_dir": "/"}),
        ("miniconda_prefix", "the root", {"miniconda_prefix": "/"}),
        ("miniconda_prefix", "the system", {"miniconda_prefix": "/usr"}),
        ("open_webui_version", "too old", {"open_webui_version": "0.6.5"}),
        ("open_webui_version", "without a lock", {"open_webui_version": "9.9.9"}),
        ("lmdeploy_version", "too old", {**GPU, "lmdeploy_version": "0.9.0"}),
        ("open_webui_env_name", "the engine's", {"open_webui_env_name": "llama-cpp", "api_server_engine": "llama_cpp"}),
        ("api_server_cache_max_entry_count", "not of llama.cpp", {
            "api_server_engine": "llama_cpp", "api_server_cache_max_entry_count": 0.5}),
        ("api_server_extra_args", "the key", {"api_server_extra_args": ["--api-keys", KEY]}),
        ("api_server_extra_args", "the key, by equals", {"api_server_extra_args": [f"--api-keys={KEY}"]}),
        ("api_server_extra_args", "the key, cut short", {
            **GPU, "api_server_extra_args": ["--api-key", KEY]}),
        ("api_server_extra_args", "the key of llama.cpp", {"api_server_extra_args": [f'api_keys=["{KEY}"]']}),
        ("api_server_extra_args", "the address", {"api_server_extra_args": ["--server-name", "0.0.0.0"]}),
        ("api_server_extra_args", "llama.cpp's address", {
            "api_server_engine": "llama_cpp", "api_server_extra_args": ['hostnames=["0.0.0.0"]']}),
        ("api_server_api_key", "short", {"api_server_api_key": "short"}),
        ("api_server_api_key", "with a line break", {"api_server_api_key": f"{KEY}\n{KEY}"}),
        ("api_server_api_key", "with a blank", {"api_server_api_key": f"{KEY} {KEY}"}),
        ("api_server_api_key", "not ASCII", {"api_server_api_key": f"{KEY}é"}),
        ("open_webui_admin_password", "short", {"open_webui_admin_password": "short"}),
        ("open_webui_admin_password", "too long", {"open_webui_admin_password": "x" * 73}),
        ("open_webui_secret_key", "short", {"open_webui_secret_key": "short"}),
        ("open_webui_settings", "sign-up behind the back", {"open_webui_settings": {"ENABLE_SIGNUP": True}}),
        ("open_webui_settings", "no accounts", {"open_webui_settings": {"WEBUI_AUTH": False}}),
        ("open_webui_environment", "no accounts", {"open_webui_environment": {"WEBUI_AUTH": "False"}}),
        ("open_webui_environment", "a code to run", {"open_webui_environment": {"A B": "x"}}),
        ("api_server_environment", "a name that is none", {"api_server_environment": {"A=B": "x"}}),
        ("api_server_environment", "a number", {"api_server_environment": {"A": 1}}),
        ("open_webui_connections", "a semicolon in a key", {
            "open_webui_connections": [{"url": "http://a/v1", "api_key": "a;b"}]}),
        ("open_webui_connections", "twice the same", {
            "open_webui_connections": [{"url": "http://a/v1"}, {"url": "http://a/v1/"}]}),
        ("miniconda_installer_sha256", "not one", {"miniconda_installer_sha256": "zz"}),
        ("api_server_tp", "three", {**GPU, "api_server_tp": "3"}),
        ("api_server_trust_remote_code", "a word", {
            # One engine: two would not fit on the card, and that alone would be refused.
            **GPU, "api_server_trust_remote_code": "false", "api_server_instances": []}),
        ("gateway_engines", "one name for two", {
            "gateway_engines": [{**ENTRIES["gateway_engines"]}, {**ENTRIES["gateway_engines"], "port": 23402}]}),
        ("gateway_engines", "a second server", {
            "gateway_engines": [{**ENTRIES["gateway_engines"], "address": "a\n    server evil 10.9.9.9:1"}]}),
        ("gateway_engines", "a second header", {
            "gateway_engines": [{**ENTRIES["gateway_engines"], "api_key": f'{KEY}"\n    http-request allow'}]}),
        ("gateway_api_keys", "short", {"gateway_api_keys": [{"name": "ann", "key": "short"}]}),
        ("gateway_api_keys", "one key for two", {
            "gateway_api_keys": [{"name": "ann", "key": KEY}, {"name": "bob", "key": KEY}]}),
        ("gateway_host", "a second door", {"gateway_host": "0.0.0.0\n    bind *:1"}),
        ("gateway_api_paths", "everything", {"gateway_api_paths": ["/"]}),
        ("gateway_port", "the interface's", {"gateway_port": 8443, "open_webui_port": 8443}),
        ("gateway_tls_key", "without a certificate", {"gateway_tls_key": "x"}),
        ("backup_schedule", "a second setting", {"backup_schedule": "daily\nUnit=evil.service"}),
        ("backup_copy_to", "a second setting", {"backup_copy_to": "/mnt/x\nUser=root"}),
        ("backup_dir", "a second setting", {"backup_dir": "/var/x\nUser=root"}),
        ("backup_dir", "the root", {"backup_dir": "/"}),
        ("backup_recipient", "a secret key", {"backup_recipient": "AGE-SECRET-KEY-1QQQ"}),
        ("open_webui_signup_enabled", "a word", {"open_webui_signup_enabled": "false"}),
    ):  # fmt: skip

        def apply(variables: dict[str, Any], values: dict[str, Any] = values) -> None:
            variables.update(copy.deepcopy(values))

        yield Fault("contradiction", variable, detail, apply)


def catalogue() -> dict[str, list[Fault]]:
    """Return every fault by its kind."""
    found: dict[str, list[Fault]] = {}
    options = specs()
    everything = [fault for name, option in options.items() for fault in faults_of_option(name, option)]
    for fault in [*everything, *faults_of_names(sorted(options)), *contradictions()]:
        found.setdefault(fault.kind, []).append(fault)
    return found


def cases(count: int, seed: int) -> Iterator[Case]:
    """Yield ``count`` inventories. Hostile texts are half of them; every contradiction comes before any comes twice."""
    chooser = random.Random(seed)  # noqa: S311  # chosen, not kept secret
    known = catalogue()
    decks: dict[str, list[Fault]] = {}

    def draw(kind: str) -> Fault:
        if not decks.get(kind):
            decks[kind] = chooser.sample(known[kind], len(known[kind]))
        return decks[kind].pop()

    kinds = {"hostile": 10, "type": 4, "range": 2, "contradiction": 4, "unknown": 1, "choice": 1, "missing": 1}
    for number in range(count):
        base = chooser.choice(sorted(BASES))
        wanted = chooser.choices(list(kinds), list(kinds.values()), k=chooser.choice((1, 1, 1, 2, 3)))
        faults = tuple(draw(kind) for kind in wanted)
        variables = copy.deepcopy(BASES[base])
        for fault in faults:
            fault.apply(variables)
        yield Case(number, base, variables, faults, chooser.random() < 0.7)
