# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Checks that need the inventory only: values by themselves and against each other. Pure, no Ansible."""

from __future__ import annotations

import posixpath
import re
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from ansible_collections.selfhost.lmdeploy.plugins.module_utils import engine, gateway, open_webui
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.addresses import split_address
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.environment_file import NAME
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_desired import (
    ERROR,
    LOOPBACK,
    Desired,
    Finding,
    Instance,
    is_power_of_two,
    overlaps,
    version_key,
    whole,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

# Below these versions stand known security faults.
FLOORS = {"lmdeploy": "0.18.0", "open_webui": ".".join(str(part) for part in open_webui.VERSION_FLOOR)}
KEY_LENGTH = 32
# What systemd, C libraries and llama.cpp hold in 32 bits.
NUMBER_END = 2**31

# Longest name of a file or folder.
NAME_END = 255
# What OnCalendar= takes, in short: weekdays, date, time, zone (systemd.time(7)). The role has systemd judge the rest.
DAY = r"(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*"
PART = r"[\d*/,.]+"
SCHEDULE = re.compile(
    r"(?:minutely|hourly|daily|weekly|monthly|quarterly|semiannually|yearly|annually|"
    rf"(?=\S)(?:{DAY}(?:(?:,|\.\.|-){DAY})*\b)?(?:(?:^| ){PART}(?:[-~]{PART}){{1,2}})?"
    rf"(?:(?:^| ){PART}(?::{PART}){{1,2}})?)"
    r"(?: (?:UTC|[A-Za-z_]+/[A-Za-z_+/-]+))?",
    re.IGNORECASE,
)

# Names of settings that end in a unit, an environment file or a command line.
TEXT_NAME = re.compile(
    r"(^|_)(url|urls|dir|path|prefix|name|host|model|user|group|version|email|file|lock|template|parser|endpoint|"
    r"revision|id|proxy|gpus|python|channels|parsers|schedule|recipient|copy_to)$"
)
# The prefix of a connection is a word; one in a variable of a role is a folder.
PATH_NAME = re.compile(r"(^|_)(dir|path|copy_to)$|_prefix$")
CONNECTIONS = "open_webui_connections"
# A person's name may hold quotes; it is data in one file that quotes it.
FREE_TEXT = frozenset({"open_webui_admin_name"})
HOSTILE = (
    (re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]"), "a line break or another control character"),
    (re.compile(r"[\"'`]"), "a quote"),
    (re.compile(r"\{\{|\{%|\{#"), "the start of a template"),
    (re.compile(r"%"), "a percent sign"),
    (re.compile(r"[\\$]"), "a backslash or a dollar sign"),
    (re.compile(r"^-"), "a dash at its start"),
)
# Never a folder of ours.
SYSTEM_FOLDER = re.compile(
    r"/(bin|boot|dev|etc|home|lib|lib64|opt|proc|root|run|sbin|srv|sys|tmp|usr(/(bin|lib|local|sbin|share))?|var(/(lib|log))?)?"
)
# Flags that the role's own variables set, and what sets them.
OWN_FLAGS = {
    "--api-keys": "api_server_api_key",
    "--trust-remote-code": "api_server_trust_remote_code",
    **{flag: f"api_server_{key}" for flag, key in engine.LMDEPLOY_FLAGS},
}
# Flags whose values are names that the version's description lists apart.
NAMED_FLAGS = {"--reasoning-parser": ("reasoning_parser", "reasoning_parsers")}


def check_ports(desired: Desired) -> Iterator[Finding]:
    """port_range: a port is a number from 1 to 65535."""
    for variable, port, _address, _unit in desired.endpoints():
        if port is not None and not 1 <= port <= 65535:
            yield desired.fault(
                "port_range",
                variable,
                port,
                "A TCP port is a number from 1 to 65535.",
                f"Set {variable} to a free port.",
            )


def check_numbers(desired: Desired) -> Iterator[Finding]:
    """number: no number of ours is negative, or larger than a unit and a program can hold."""
    for name, value in desired.values.items():
        for full, _last, leaf in _leaves(name, value):
            if isinstance(leaf, int | float) and not 0 <= leaf < NUMBER_END:
                why = f"Every number here is 0 or more, and below {NUMBER_END}."
                yield desired.fault("number", full, leaf, why, f"Give {full} another number.")


def check_port_clashes(desired: Desired) -> Iterator[Finding]:
    """port_clash: two of our own services want one port."""
    seen: list[tuple[str, int, str, str]] = []
    for variable, port, address, unit in desired.endpoints():
        if port is None:
            continue
        for other_variable, other_port, other_address, other_unit in seen:
            if port == other_port and overlaps(address, other_address):
                yield desired.fault(
                    "port_clash",
                    variable,
                    port,
                    f"{other_unit} is to listen on port {port} too ({other_variable}).",
                    f"Give {unit} a port of its own.",
                )
                break
        seen.append((variable, port, address, unit))


def check_instance_names(desired: Desired) -> Iterator[Finding]:
    """instance_name: names of instances become names of units, so they are plain and each stands once."""
    seen: set[str] = set()
    for instance in desired.instances:
        if instance.index < 0:
            continue
        name = str(instance.own.get("name", ""))
        variable = f"{instance.entry}.name"
        if engine.name_faults([name]):
            why = "It becomes part of a unit's name, so it is made of small letters, digits and dashes."
            yield desired.fault("instance_name", variable, name, why, "Give the instance a short plain name.")
        elif name in seen:
            yield desired.fault("instance_name", variable, name, "Another instance has this name.", "Name each once.")
        seen.add(name)


def check_tp_form(desired: Desired) -> Iterator[Finding]:
    """tp_form: LMDeploy splits a model over 1, 2, 4, 8, ... cards."""
    if desired.engine == "llama_cpp":
        return
    for instance in desired.instances:
        value = instance.get("tp")
        tp = whole(value)
        if value in (None, "", "auto") or (tp is not None and is_power_of_two(tp)):
            continue
        yield desired.fault(
            "tp_form",
            instance.variable("tp"),
            value,
            "LMDeploy splits a model over a number of cards that is a power of two.",
            f"Set {instance.variable('tp')} to auto, or to 1, 2, 4 or 8.",
        )


def check_floors(desired: Desired) -> Iterator[Finding]:
    """version_floor: releases below the security floor are not installed."""
    for environment in desired.environments:
        floor = FLOORS.get(environment.role, "0.0")
        version = desired.text(environment.version_variable)
        key = version_key(version)
        if not version or (key is not None and key >= (version_key(floor) or ())):
            continue
        why = f"It is below {floor}, the oldest release of {environment.package} without known security faults."
        if key is None:
            why = "It is no version: numbers with dots between them, such as 1.2.3."
        fix = f"Set {environment.version_variable} to {floor} or later."
        yield desired.fault("version_floor", environment.version_variable, version, why, fix)


def check_locks(desired: Desired) -> Iterator[Finding]:
    """lock: the lock file exists, pins the version that the variables ask for, and has a hash for every file."""
    for environment in desired.environments:
        variable = environment.lock_variable
        if variable not in desired.locks:
            continue
        path, text = desired.text(variable), desired.locks[variable]
        version = desired.text(environment.version_variable)
        if text is None:
            why = "There is no such file on the controller."
            fix = f"Set {environment.version_variable} to a version with a lock, or make one with script/lock."
            yield desired.fault("lock", variable, path, why, fix)
            continue
        pinned = dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.MULTILINE))
        names = {re.sub(r"[-_.]+", "-", name).lower(): found for name, found in pinned.items()}
        if names.get(environment.package) != version:
            held = names.get(environment.package)
            why = (
                f"It pins {environment.package} {held}, but {environment.version_variable} is {version}."
                if held
                else f"It doesn't pin {environment.package}."
            )
            fix = f"Make {environment.version_variable} and {variable} agree."
            yield desired.fault("lock", variable, path, why, fix)
        elif text.count("--hash=sha256:") < len(names):
            why = "Not every requirement in it has a sha256, so what gets installed is not certain."
            yield desired.fault("lock", variable, path, why, "Make the lock with script/lock.")


def _known(names: list[str]) -> str:
    return "It knows " + ", ".join(sorted(names)) + "."


def check_names_of_engine(desired: Desired) -> Iterator[Finding]:
    """chat_template, tool_call_parser: names that this version of LMDeploy knows."""
    known = desired.command_line
    if desired.engine != "lmdeploy" or not known:
        return
    kinds = (
        ("chat_template", "chat_templates", "the model's own template is the right one"),
        ("tool_call_parser", "tool_call_parsers", "tools are then refused"),
    )
    for instance in desired.instances:
        for key, listed, without in kinds:
            value = instance.text(key)
            # A chat template may also be a JSON file on the host.
            is_file = key == "chat_template" and (value.startswith("/") or value.endswith(".json"))
            names = [str(name) for name in known.get(listed, [])]
            if not value or is_file or value in names:
                continue
            why = f"LMDeploy {known.get('version')} does not know it. {_known(names)}"
            fix = f"Leave {instance.variable(key)} empty ({without}), or take one of these."
            yield desired.fault(key, instance.variable(key), value, why, fix)


def _judge_flag(desired: Desired, instance: Instance, flag: str, value: str) -> Finding | None:
    described = desired.command_line or {}
    known: dict[str, Any] = dict(described.get("flags", {}))
    variable, version = instance.variable("extra_args"), described.get("version")
    given = f"{flag} {value}".strip()
    if flag in OWN_FLAGS:
        # Two values of one flag would be a riddle, and keys on a command line are seen by every user of the host.
        fix = f"Set {OWN_FLAGS[flag]} instead."
        return desired.fault("flag", variable, flag, "The role sets this flag itself.", fix)
    if flag not in known:
        near = get_close_matches(flag, known, n=1)
        fix = f"Did you mean {near[0]}?" if near else "Take it out; lmdeploy serve api_server --help lists the flags."
        return desired.fault("flag", variable, flag, f"LMDeploy {version} does not know this flag.", fix)
    check, listed = NAMED_FLAGS.get(flag, ("flag", ""))
    choices = [str(choice) for choice in known[flag].get("choices") or described.get(listed) or []]
    if choices and value not in choices:
        why = f"LMDeploy {version} does not take this value. {_known(choices)}"
        return desired.fault(check, variable, given, why, "Take one of these, or leave the flag out.")
    return None


def check_flags(desired: Desired) -> Iterator[Finding]:
    """flag, reasoning_parser: extra arguments that this version of LMDeploy knows and that no variable sets."""
    if desired.engine != "lmdeploy" or not desired.command_line:
        return
    for instance in desired.instances:
        for flag, value in instance.flags():
            finding = _judge_flag(desired, instance, flag, value)
            if finding:
                yield finding


def check_known_version(desired: Desired) -> Iterator[Finding]:
    """engine_unknown: without a description of the version's command line the names above can't be checked."""
    if desired.engine == "lmdeploy" and desired.command_line is None:
        version = desired.text("lmdeploy_version")
        why = "Nothing is known here about this version's flags and templates, so they are checked only after install."
        fix = "Prefer a version that the role carries a description of."
        yield desired.warning("engine_unknown", "lmdeploy_version", version, why, fix)


def _urls(desired: Desired) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    web, any_place = ("http", "https"), ("http", "https", "file")
    for index, entry in enumerate(desired.items("open_webui_connections")):
        if isinstance(entry, dict):
            yield f"open_webui_connections[{index}].url", str(entry.get("url", "")), web
    for index, entry in enumerate(desired.items("open_webui_ollama_urls")):
        yield f"open_webui_ollama_urls[{index}]", str(entry), web
    for name in ("mirrors_pip_index_url", "mirrors_miniconda_url", "miniconda_installer_url"):
        if desired.text(name):
            yield name, desired.text(name), any_place
    for name in ("mirrors_hf_endpoint", "mirrors_http_proxy", "mirrors_https_proxy"):
        if desired.text(name):
            yield name, desired.text(name), web


def check_urls(desired: Desired) -> Iterator[Finding]:
    """url: an address has a scheme and a host. A slash at its end is fine: the roles take it off."""
    for variable, url, schemes in _urls(desired):
        parts = split_address(url)
        if parts.scheme in schemes and (parts.netloc or parts.scheme == "file"):
            continue
        example = "https://HOST/v1" if "connections" in variable else "https://HOST"
        why = "An address starts with " + " or ".join(f"{scheme}://" for scheme in schemes) + " and names a host."
        yield desired.fault("url", variable, url, why, f"Write {variable} as {example}.")
    bundle = desired.text("mirrors_bundle_dir")
    if bundle and not bundle.startswith("/"):
        fix = "Set mirrors_bundle_dir to the folder's whole path on the host, or to nothing."
        yield desired.fault("url", "mirrors_bundle_dir", bundle, "Addresses of packages are made of this path.", fix)


def check_folders(desired: Desired) -> Iterator[Finding]:
    """data_dir: what people keep does not lie in what an update replaces."""
    for variable in ("miniconda_prefix", "model_weights_dir"):
        path = desired.text(variable)
        if path.startswith("/") and SYSTEM_FOLDER.fullmatch(posixpath.normpath(path).replace("//", "/")):
            why = "It belongs to the system, and what lies in this folder is replaced, and removed at the end."
            yield desired.fault("data_dir", variable, path, why, f"Set {variable} to a folder of its own.")
    prefix = desired.text("miniconda_prefix").rstrip("/")
    for variable in ("open_webui_data_dir", "model_weights_dir"):
        path = desired.text(variable)
        if prefix and path and f"{path}/".startswith(f"{prefix}/"):
            why = f"It lies below {prefix} (miniconda_prefix), where an update replaces and removes folders."
            yield desired.fault("data_dir", variable, path, why, f"Set {variable} to a folder below /var/lib or /srv.")


def check_password(desired: Desired) -> Iterator[Finding]:
    """admin_password, api_key: long enough, or left empty so that one is made."""
    key = desired.text("api_server_api_key")
    if key and len(key) < KEY_LENGTH and desired.instances:
        why = f"It has {len(key)} characters; the least is {KEY_LENGTH}."
        fix = "Take a longer one, or leave it empty: a strong one is made and kept on the host."
        yield desired.fault("api_key", "api_server_api_key", key, why, fix)
    elif re.search(r"[^!-~]", key):
        why = "It holds a blank, a line break or a letter that is not ASCII, which no HTTP header carries whole."
        fix = "Take letters and digits, or leave it empty: a strong one is made and kept on the host."
        yield desired.fault("api_key", "api_server_api_key", key, why, fix)
    password = desired.text("open_webui_admin_password")
    if password and len(password) < open_webui.PASSWORD_CHARACTERS_MIN:
        why = f"It has {len(password)} characters; the least is {open_webui.PASSWORD_CHARACTERS_MIN}."
        fix = "Take a longer one, or leave it empty: a strong one is made and kept on the host."
        yield desired.fault("admin_password", "open_webui_admin_password", password, why, fix)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield (full name, last name, value) of everything inside a variable."""
    if isinstance(value, dict):
        for key, entry in value.items():
            for full, last, leaf in _leaves(str(key), entry):
                yield f"{name}.{full}", last, leaf
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            called = (entry.get("name") if isinstance(entry, dict) else None) or index
            for full, last, leaf in _leaves(name, entry):
                yield f"{name}[{called}]{full.removeprefix(name)}", last, leaf
    else:
        yield name, name, value


def check_sha256(desired: Desired) -> Iterator[Finding]:
    """sha256: 64 hexadecimal digits."""
    for name, value in desired.values.items():
        for full, last, leaf in _leaves(name, value):
            if last.endswith("sha256") and not re.fullmatch(r"[0-9a-fA-F]{64}", str(leaf or "")):
                why = "A SHA-256 is 64 hexadecimal digits."
                fix = "Copy it from the page that the file comes from, or from sha256sum FILE."
                yield desired.fault("sha256", full, leaf, why, fix)


def _hostile(variable: str, last: str, text: str) -> str:
    """Return what is wrong with a text that ends in a unit, '' if nothing is."""
    for number, (pattern, name) in enumerate(HOSTILE):
        if last in FREE_TEXT and number > 0:
            return ""
        # A mirror's address may carry a user and a password, written with %XX.
        if name == "a percent sign" and variable.startswith("mirrors_"):
            continue
        if pattern.search(text):
            return name
    return "a blank" if PATH_NAME.search(last) and " " in text else ""


def check_texts(desired: Desired) -> Iterator[Finding]:
    """hostile_text, path: names, paths and addresses that mean the same in a unit, a file and a command line."""
    for name, value in desired.values.items():
        keys = [str(key) for key in value] if name.endswith("_environment") and isinstance(value, dict) else []
        for key in keys:
            if NAME.match(key) is None:
                why = f"It has {key!r}, which is not a name for an environment variable: letters, digits and _ only."
                yield desired.fault("hostile_text", name, key, why, f"Write {name} without it.")
        for full, last, leaf in _leaves(name, value):
            if not isinstance(leaf, str) or not leaf or not (TEXT_NAME.search(last) or TEXT_NAME.search(name)):
                continue
            wrong = _hostile(name, last, leaf)
            if wrong:
                why = f"It holds {wrong}, which would change the meaning of a unit or of an environment file."
                yield desired.fault("hostile_text", full, leaf, why, f"Write {full} without it.")
            elif PATH_NAME.search(last) and not leaf.startswith("/"):
                why = "It is no absolute path, so it would depend on who runs what where."
                yield desired.fault("path", full, leaf, why, f"Start {full} with a slash.")
            elif PATH_NAME.search(last) and max(map(len, leaf.split("/"))) > NAME_END:
                why = f"A name in it is longer than {NAME_END} characters, which no file system takes."
                yield desired.fault("path", full, f"{leaf[:40]}...", why, f"Give {full} a shorter path.")


def check_separate_environments(desired: Desired) -> Iterator[Finding]:
    """env_shared: each program has an environment of its own; their dependencies exclude each other."""
    seen: dict[str, str] = {}
    for environment in desired.environments:
        name = desired.text(environment.name_variable)
        if name in seen and name:
            why = f"{seen[name]} has the same value, and the two programs need other versions of the same packages."
            fix = "Give each its own environment."
            yield desired.fault("env_shared", environment.name_variable, name, why, fix)
        seen.setdefault(name, environment.name_variable)


def check_reach_of_engine(desired: Desired) -> Iterator[Finding]:
    """loopback: a gateway or a web host can't reach an engine that listens on its own host only."""
    asker, variable = ("The gateway", "gateway_engines") if "gateway" in desired.roles else ("Open WebUI", CONNECTIONS)
    if not desired.roles & {"gateway", "open_webui"} or desired.items(variable):
        return
    closed = [
        peer.host
        for peer in desired.peers
        if peer.host != desired.host and any(LOOPBACK.fullmatch(address) for address in peer.listens)
    ]
    if closed:
        named = ", ".join(closed[:3]) + (f" and {len(closed) - 3} more" if len(closed) > 3 else "")
        why = f"Engines there listen on their own host only, so {asker} on {desired.host} can't reach them."
        fix = (
            "Set it to the host's address in your network, with api_server_allowed_networks, or say in "
            f"{variable} which engines {desired.host} is to use."
        )
        yield desired.fault("loopback", f"api_server_host of {named}", "127.0.0.1", why, fix)


def check_nodes(desired: Desired) -> Iterator[Finding]:
    """nodes: the hosts that serve one model together are all there, and want the same."""
    nodes = [str(node) for node in desired.items("api_server_nodes")]
    if "api_server" not in desired.roles or not nodes:
        return
    own = next((fellow for fellow in desired.fellows if fellow.host == desired.host), None)
    for fellow in desired.fellows:
        if own is None or fellow.host == desired.host:
            continue
        for variable, value in own.values.items():
            if fellow.values.get(variable) != value:
                why = (
                    f"{fellow.host}, with which {desired.host} serves one model (api_server_nodes), has "
                    f"{fellow.values.get(variable) or 'nothing'}."
                )
                fix = f"Give {variable} one value, in a group of these hosts."
                yield desired.fault("nodes", variable, value, why, fix)
    known = {fellow.address for fellow in desired.fellows}
    strange = [node for node in nodes if node not in known and re.fullmatch(r"[0-9.]+", node)]
    # Addresses between the hosts may be others than those by which Ansible reaches them; their number is the same.
    if strange and len(desired.fellows) != len(nodes):
        named = ", ".join(fellow.host for fellow in desired.fellows) or "none"
        why = f"It names {len(nodes)} hosts; in model_servers those with such a list are: {named}."
        fix = "Put all of these hosts into model_servers, with the same list."
        yield desired.fault("nodes", "api_server_nodes", nodes, why, fix)


def check_exposure(desired: Desired) -> Iterator[Finding]:
    """exposed: whoever opens an engine to the network should know what that means."""
    for instance in desired.instances:
        address, networks = instance.text("host"), desired.items("api_server_allowed_networks")
        if address and not LOOPBACK.fullmatch(address) and "any" in networks:
            why = "Every network may talk to it (api_server_allowed_networks), and the traffic is not encrypted."
            fix = "Name the networks of its clients, or bind the engine to 127.0.0.1 and put a TLS gateway before it."
            yield desired.warning("exposed", instance.variable("host"), address, why, fix)


def check_model_format(desired: Desired) -> Iterator[Finding]:
    """model_format: llama.cpp reads GGUF files, LMDeploy reads folders of safetensors."""
    if desired.engine not in engine.ENGINES:
        return
    is_auto = desired.text("api_server_engine") == "auto"
    chosen = "No NVIDIA card was found, so auto takes llama.cpp" if is_auto else "The engine is llama.cpp"
    for instance in desired.instances:
        model = instance.text("model")
        is_gguf = model.lower().endswith(".gguf")
        if not model or is_gguf == (desired.engine == "llama_cpp"):
            continue
        why = (
            "It is a GGUF file, which llama.cpp reads and LMDeploy does not."
            if is_gguf
            else f"{chosen}, which reads GGUF files; this is none."
        )
        fix = (
            "Name a model in safetensors form, or set api_server_engine to llama_cpp."
            if is_gguf
            else "Name a .gguf file, or run this model on a host with an NVIDIA GPU."
        )
        yield desired.fault("model_format", instance.variable("model"), model, why, fix)


def _backup_faults(desired: Desired) -> Iterator[str]:
    """Yield what the role backup would refuse."""
    folder, keep = desired.text("backup_dir"), desired.values["backup_keep"]
    if not re.fullmatch(r"/[^/\s]+/\S+", posixpath.normpath(folder)):
        yield f"backup_dir is {folder}: give the absolute path of a folder of its own, without a blank"
    schedule = desired.text("backup_schedule")
    if not SCHEDULE.fullmatch(schedule):
        yield f"backup_schedule is {schedule}: write it as OnCalendar of systemd takes it, such as daily"
    if int(keep) < 1:
        yield f"backup_keep is {keep}: keep one archive or more"
    if not re.fullmatch(r"(age1[a-z0-9]+)?", desired.text("backup_recipient")):
        yield "backup_recipient is no public key of age: it starts with age1; leave it empty for no encryption"


def _own_rules(desired: Desired) -> Iterator[str]:
    """Yield what the roles themselves would refuse later, each a sentence that begins with the variable."""

    def named(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in desired.values.items() if name.startswith(prefix)}

    try:
        if desired.engine in engine.ENGINES and desired.instances:
            settings = {
                "engine": desired.engine,
                "models_dir": desired.text("api_server_models_dir"),
                "drain_seconds": 0,
                "allowed_networks": desired.items("api_server_allowed_networks"),
                "nodes": desired.items("api_server_nodes"),
                "nodes_port": desired.values.get("api_server_nodes_port"),
                "twin_port_offset": desired.values.get("api_server_twin_port_offset"),
            }
            plain = named("api_server_")
            engine.engine_instances(plain, desired.items("api_server_instances"), {}, settings)
    except engine.EngineFault as faults:
        yield from str(faults).splitlines()
    except (KeyError, TypeError, ValueError, AttributeError):
        pass  # a value of the wrong type, which is reported as such
    try:
        if "backup" in desired.roles:
            yield from _backup_faults(desired)
    except (KeyError, TypeError, ValueError):
        pass
    try:
        if "gateway" in desired.roles:
            yield from gateway.faults(named("gateway_"))
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    try:
        if "open_webui" in desired.roles:
            yield from open_webui.faults({**named("open_webui_"), "prefix": desired.text("miniconda_prefix")})
    except (KeyError, TypeError, ValueError, AttributeError):
        pass


def check_rules_of_roles(desired: Desired, found: list[Finding]) -> Iterator[Finding]:
    """role_rule: whatever a role would refuse by itself, after others had changed the host."""
    # A warning is no refusal, and must not hide one.
    blamed = {finding.variable for finding in found if finding.severity == ERROR}
    values = dict(desired.values)
    for instance in desired.instances:
        for name in [name for name in desired.values if name.startswith("api_server_")]:
            key = name.removeprefix("api_server_")
            # The role names a setting by its instance, also where the plain variable gives it.
            values[f"{instance.entry}.{key}"] = instance.get(key)
            blamed |= {f"{instance.entry}.{key}"} if name in blamed else set()
    for sentence in _own_rules(desired):
        if any(variable in sentence for variable in blamed):
            continue
        variable = re.split(r"[ :]", sentence, maxsplit=1)[0]
        why, _colon, fix = sentence.partition(": ")
        fix = fix or f"correct {variable}"
        value = values.get(variable, "(set)")
        yield desired.fault("role_rule", variable, value, f"{why}.", f"{fix[0].upper()}{fix[1:]}.")


VALUE_CHECKS = (
    check_numbers,
    check_ports,
    check_port_clashes,
    check_instance_names,
    check_tp_form,
    check_floors,
    check_locks,
    check_names_of_engine,
    check_flags,
    check_known_version,
    check_urls,
    check_folders,
    check_password,
    check_sha256,
    check_texts,
    check_separate_environments,
    check_reach_of_engine,
    check_nodes,
    check_exposure,
    check_model_format,
)
