# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""What the engine of a host is to be: pure functions from the role's variables to instances and their arguments.

The one place that knows how a variable becomes an argument of LMDeploy or a parameter of llama.cpp.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from ansible.module_utils.parsing.convert_bool import boolean
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.environment_file import NAME
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.gpu_layout import (
    Dealt,
    Wanted,
    deal,
    layout_faults,
    unit_lines,
)
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.model_memory import automatic_tp, estimate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_survey import GpuFacts

UNIT = "api-server"
ENGINES = ("lmdeploy", "llama_cpp")
# Where a unit with ProtectHome=yes and PrivateTmp=yes finds nothing.
HIDDEN_PLACES = ("/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/")  # noqa: S108  # refused, not used
# llama.cpp answers that many requests at once; they share the context.
LLAMA_SLOTS = 4
# Flags of LMDeploy that a variable of the role sets: (flag, key of the instance). Empty values set no flag.
LMDEPLOY_FLAGS = (
    ("--model-name", "model_name"),
    ("--backend", "backend"),
    ("--server-name", "host"),
    ("--server-port", "port"),
    ("--tp", "tp"),
    ("--session-len", "session_len"),
    ("--cache-max-entry-count", "cache_max_entry_count"),
    ("--max-batch-size", "max_batch_size"),
    ("--chat-template", "chat_template"),
    ("--tool-call-parser", "tool_call_parser"),
)
# The same for llama.cpp, by the names of its parameters.
LLAMA_PARAMETERS = (
    ("port", "port"),
    ("n_ctx", "session_len"),
    ("n_parallel", "max_batch_size"),
    ("chat_template", "chat_template"),
)
# Set by more than its own text.
LLAMA_HOSTS = (("hostnames", "host"), ("model.path", "model"), ("model_alias", "model_name"))
# What llama.cpp has no counterpart for.
LMDEPLOY_ONLY = ("cache_max_entry_count", "tool_call_parser")
# Addresses that mean every network of the host.
ANYWHERE = ("0.0.0.0", "::")  # noqa: S104  # compared, not bound
# What api_server_nodes sets, in place of extra arguments.
NODE_FLAGS = ("--nnodes", "--node-rank", "--dist-init-addr", "--distributed-executor-backend")
# Keys that each engine gets in no other way than by its role.
SECRET_ARGUMENTS = ("--api-keys", "api_keys")


class EngineFault(ValueError):
    """All faults of the variables, one a line."""


def model_path(model: str, directory: str) -> str:
    """Return where a model lies: ``ORG/NAME`` is ``directory/ORG--NAME``, a plain name is a file in the folder.

    An absolute path is itself.
    """
    if model.startswith("/"):
        return str(PurePosixPath(model))
    parts = model.split("/")
    if len(parts) > 2 or not all(parts) or any(part.startswith(".") for part in parts):
        message = f"'{model}' is no model: give its name on the hub as ORG/NAME, an absolute path, or a file's name."
        raise EngineFault(message)
    return str(PurePosixPath(directory) / "--".join(parts))


def model_name(model: str) -> str:
    """Return the name that clients ask for when none is given: the last part of the id or path, without .gguf."""
    return PurePosixPath(model).name.removesuffix(".gguf")


def tensor_parallel(wanted: str | int, gpus: int, *, wsl: bool) -> int:
    """Return over how many GPUs a model is cut where nothing but their number is known.

    On WSL NCCL finds no peer access between GPUs, so more than one must be asked for by number.
    """
    if wanted != "auto":
        try:
            return int(wanted)
        except OverflowError as error:
            # YAML's .inf: no number of cards, as a word is none.
            raise ValueError(str(error)) from error
    return 1 if wsl else automatic_tp(gpus)


def is_loopback(host: str) -> bool:
    """Tell whether only this host can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_address(host: str) -> bool:
    """Tell whether a server can listen on it: a number, or the one name that every host has."""
    try:
        return host == "localhost" or bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def is_network(text: str) -> bool:
    """Tell whether systemd takes it for a network."""
    try:
        return bool(ipaddress.ip_network(text, strict=False))
    except ValueError:
        return False


def client_address(host: str) -> str:
    """Return the address by which this host reaches a server that listens on ``host``."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "localhost": "127.0.0.1"}.get(host, host)  # noqa: S104  # asked, not bound


def url(host: str, port: int) -> str:
    """Return the base URL by which this host reaches a server that listens on ``host``."""
    address = client_address(host)
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def is_set(value: Any) -> bool:
    """Tell whether a variable was given: an empty text, an empty list and null mean the engine's own default."""
    return value is not None and value not in ("", [], {})


def lmdeploy_arguments(instance: dict[str, Any]) -> list[str]:
    """Return what follows `lmdeploy serve api_server` for one instance."""
    arguments = [instance["model_path"]]
    for flag, key in LMDEPLOY_FLAGS:
        if is_set(instance.get(key)):
            arguments += [flag, str(instance[key])]
    # On the command line, false is a word: -e api_server_trust_remote_code=false.
    if boolean(instance.get("trust_remote_code"), strict=False):
        arguments.append("--trust-remote-code")
    arguments += node_arguments(instance)
    return arguments + [str(argument) for argument in instance.get("extra_args") or []]


def node_arguments(instance: dict[str, Any]) -> list[str]:
    """Return how LMDeploy runs one model over several hosts: TurboMind by itself, PyTorch on the cluster of Ray."""
    nodes = instance.get("nodes") or []
    if not nodes:
        return []
    if instance["backend"] == "pytorch":
        return ["--distributed-executor-backend", "ray"]
    address = f"{nodes[0]}:{instance['nodes_port']}"
    return ["--nnodes", str(len(nodes)), "--node-rank", str(instance["rank"]), "--dist-init-addr", address]


def node_faults(
    plain: Mapping[str, Any], named: int, host: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[str]:
    """Return why one model can't run over the hosts of ``api_server_nodes``, each with variable, value and way out."""
    nodes = [str(node) for node in settings.get("nodes") or []]
    if not nodes:
        return []
    variable, shown = "api_server_nodes", ", ".join(nodes)
    faults = [
        f"{variable} has {node!r}: each is the IPv4 address of a host in the network between them"
        for node in nodes
        if not re.fullmatch(r"\d{1,3}(\.\d{1,3}){3}", node) or not is_address(node)
    ]
    if len(nodes) < 2 or len(set(nodes)) < len(nodes):
        faults.append(f"{variable} is {shown}: give two hosts or more, each once, or leave it empty for one host")
    own = set(nodes) & set(host.get("addresses") or [])
    if host.get("addresses") and len(own) != 1:
        faults.append(
            f"{variable} is {shown}, of which this host has {len(own)}: name each host by its one address there"
        )
    if settings["engine"] != "lmdeploy":
        faults.append(
            f"{variable} is {shown}, but the engine is {settings['engine']}: only LMDeploy runs over several hosts"
        )
    if named:
        faults.append(
            f"{variable} is {shown}, beside api_server_instances: a model over several hosts is a host's only engine"
        )
    try:
        if int(plain["tp"]) % len(nodes):
            faults.append(f"api_server_tp is {plain['tp']}: over {len(nodes)} hosts it is a multiple of {len(nodes)}")
    except ValueError:
        faults.append(
            f"api_server_tp is {plain['tp']}: over several hosts give the number of GPUs of all of them together"
        )
    return faults


def llama_arguments(instance: dict[str, Any]) -> list[str]:
    """Return llama.cpp's parameters for one instance as `attribute=value` items."""
    arguments = [f"model.path={instance['model_path']}", f'hostnames=["{client_or_any(instance["host"])}"]']
    fixed = {
        "n_parallel": LLAMA_SLOTS,
        # One context for all requests: each may use it whole while others are short.
        "kv_unified": "true",
        "endpoint_metrics": "true",
        # /slots shows other people's questions; the web page is Open WebUI's task.
        "endpoint_slots": "false",
        "ui": "false",
        # Warnings only: the default writes several lines for each request.
        "verbosity": 2,
        # Prompts kept in memory for reuse, in MiB; the default of 8192 is a surprise on a small host.
        "cache_ram_mib": 512,
        "offline": "true",
    }
    given = {name: instance[key] for name, key in LLAMA_PARAMETERS if is_set(instance.get(key))}
    arguments += [f"{name}={value}" for name, value in {**fixed, **given}.items()]
    return arguments + [str(argument) for argument in instance.get("extra_args") or []]


def client_or_any(host: str) -> str:
    """Return the address to listen on, spelled as a number."""
    return "127.0.0.1" if host == "localhost" else host


def engine_arguments(instance: dict[str, Any]) -> list[str]:
    """Return the arguments of one instance, by its engine."""
    return lmdeploy_arguments(instance) if instance["engine"] == "lmdeploy" else llama_arguments(instance)


def argument_variables(instance: dict[str, Any]) -> dict[str, str]:
    """Return which variable each argument comes from; "" stands for the model, "*" for everything else."""
    prefix = instance["variable_prefix"]
    table = LMDEPLOY_FLAGS if instance["engine"] == "lmdeploy" else LLAMA_PARAMETERS
    known = {argument: prefix + key for argument, key in table}
    return {
        **known,
        "--trust-remote-code": f"{prefix}trust_remote_code",
        **dict.fromkeys(NODE_FLAGS, "api_server_nodes"),
        "--server-port": f"{prefix}port",
        "": f"{prefix}model",
        "*": f"{prefix}extra_args",
    }


def instance_faults(instance: dict[str, Any], networks: list[str]) -> list[str]:
    """Return what is wrong with one instance: each a sentence with variable, value and way out."""
    prefix = instance["variable_prefix"]
    faults = []
    hidden = next((place for place in HIDDEN_PLACES if instance["model_path"].startswith(place)), None)
    if hidden:
        faults.append(
            f"{prefix}model is {instance['model']}, but the unit sees nothing under {hidden}: "
            "put the model under model_weights_dir"
        )
    if not 1 <= int(instance["port"]) <= 65535:
        faults.append(f"{prefix}port is {instance['port']}: a port is a number from 1 to 65535")
    if not is_address(instance["host"]):
        faults.append(
            f"{prefix}host is {instance['host']!r}, which is no address: 127.0.0.1, 0.0.0.0 or one of the host"
        )
    elif not is_loopback(instance["host"]) and not networks:
        faults.append(
            f"{prefix}host is {instance['host']}, but api_server_allowed_networks is empty, so nobody could reach it: "
            "name the networks of its clients, for example ['10.0.0.0/24']"
        )
    share = instance.get("cache_max_entry_count")
    if share not in (None, "") and not 0 <= float(share) <= 1:
        faults.append(f"{prefix}cache_max_entry_count is {share}: it is a part of the memory, from 0 to 1")
    faults += environment_faults(f"{prefix}environment", instance.get("environment") or {})
    managed = dict(LMDEPLOY_FLAGS + LLAMA_PARAMETERS + LLAMA_HOSTS)
    for argument in instance.get("extra_args") or []:
        name = str(argument).split("=", 1)[0]
        if name in SECRET_ARGUMENTS or re.fullmatch("--api(-k(e(ys?)?)?)?", name):
            faults.append(f"{prefix}extra_args holds {name}: keys are set by api_server_api_key, out of sight of `ps`")
        elif name in NODE_FLAGS and name != "--distributed-executor-backend":
            faults.append(f"{prefix}extra_args holds {name}: set api_server_nodes instead")
        elif name in managed:
            faults.append(f"{prefix}extra_args holds {name}: set {prefix}{managed[name]} instead")
    if instance["engine"] == "llama_cpp":
        faults += [
            f"{prefix}{key} is {instance[key]}, which the engine llama_cpp does not have: leave it empty"
            for key in LMDEPLOY_ONLY
            if is_set(instance.get(key))
        ]
    return faults


def environment_faults(variable: str, environment: dict[str, Any]) -> list[str]:
    """Return which variables no process can be given."""
    names = [
        f"{variable} has {name!r}, which is not a name for an environment variable: letters, digits and _ only"
        for name in map(str, environment)
        if NAME.match(name) is None
    ]
    values = [name for name, value in environment.items() if value is None or "\0" in str(value)]
    return names + [f"{variable} has no value for {name}, or a NUL character in it: give it one" for name in values]


def network_faults(networks: list[str]) -> list[str]:
    """Return which networks are none."""
    return [
        f"api_server_allowed_networks has {network!r}: a network is written as 10.0.0.0/24, and all of them as any"
        for network in map(str, networks)
        if network != "any" and not is_network(network)
    ]


def name_faults(names: list[str]) -> list[str]:
    """Return what is wrong with the names of instances."""
    faults = [
        f"api_server_instances has the name {name!r}: a name has small letters, digits and dashes, for example 'vision'"
        for name in names
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,31}", name)
    ]
    faults += [
        f"api_server_instances has the name {name!r}: names that end with twin are for the second of an engine that is "
        "being changed"
        for name in names
        if re.search(r"(^|-)twin$", name)
    ]
    double = sorted({name for name in names if names.count(name) > 1})
    return faults + [f"api_server_instances has the name {name!r} more than once" for name in double]


def port_faults(instances: list[dict[str, Any]]) -> list[str]:
    """Return which instances want the same port of the same address."""
    faults = []
    for number, first in enumerate(instances):
        for second in instances[number + 1 :]:
            same = first["host"] == second["host"] or first["host"] in ANYWHERE or second["host"] in ANYWHERE
            if same and int(first["port"]) == int(second["port"]):
                faults.append(
                    f"{first['variable_prefix']}port and {second['variable_prefix']}port are both {first['port']}: "
                    "give each instance its own port"
                )
    return faults


def twin_faults(instances: list[dict[str, Any]], offset: int) -> list[str]:
    """Return why the engines can't have twins that many ports higher."""
    variable = f"api_server_twin_port_offset is {offset}"
    if offset < 0:
        return [f"{variable}: it is 0 for no twins, or what is added to an engine's port for that of its twin"]
    if offset and any(instance["nodes"] for instance in instances):
        return [f"{variable}, beside api_server_nodes: a model over several hosts has no twin; leave it 0"]
    ports = {int(instance["port"]) for instance in instances}
    taken = sorted(port for port in ports if offset and (port + offset in ports or port + offset > 65535))
    return [
        f"{variable}: the twin of the engine on port {port} can't have port {port + offset}; take an offset that leads "
        "to free ports up to 65535"
        for port in taken
    ]


def engine_instances(
    plain: dict[str, Any], instances: list[dict[str, Any]], host: dict[str, Any], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the instances of a host, complete, or raise EngineFault with everything that is wrong.

    plain: the role's plain variables without their prefix: the single instance, and the defaults of named ones.
    instances: ``api_server_instances``. host: what the module engine_info returned (``gpus``, ``gpu``, ``wsl``,
    ``models``, ``model_facts``, ``addresses``). settings: ``engine``, ``models_dir``, ``drain_seconds``,
    ``allowed_networks``, ``numa_affinity``, ``twin_port_offset``, and for one model over several hosts ``nodes`` and
    ``nodes_port``.
    """
    faults = name_faults([str(item.get("name", "")) for item in instances])
    faults += network_faults(settings["allowed_networks"])
    faults += node_faults(plain, len(instances), host, settings)
    nodes = [str(node) for node in settings.get("nodes") or []]
    rank = next((number for number, node in enumerate(nodes) if node in (host.get("addresses") or [])), 0)
    if rank and plain["backend"] == "pytorch" and not faults:
        # The engine on the first host drives the others through their nodes of Ray.
        return []
    result = []
    for given in instances or [{}]:
        name = str(given.get("name", ""))
        prefix = f"api_server_instances[{name}]." if name else "api_server_"
        # The plain name is that of the plain model.
        inherited = {**plain, "model_name": ""} if given.get("model") else plain
        own = {key: value for key, value in given.items() if value is not None}
        instance = {**inherited, **own, "engine": settings["engine"], "variable_prefix": prefix}
        instance["instance"] = f"{UNIT}-{name}" if name else UNIT
        instance |= {"nodes": nodes, "nodes_port": settings.get("nodes_port"), "rank": rank}
        if rank:
            # Clients ask the first host; the others only compute.
            instance["host"] = "127.0.0.1"
        try:
            path = model_path(instance["model"], settings["models_dir"])
            # Where the link leads now: a new revision of the model is a change, never a surprise at the next restart.
            instance["model_path"] = host.get("models", {}).get(path, path)
            instance["size"] = estimate(instance["model"], host.get("model_facts", {}).get(path))
        except ValueError as error:
            faults.append(f"{prefix}model: {error}")
            continue
        try:
            gpus = len(instance.get("gpus") or []) or int(host.get("gpus", 0))
            instance["wanted_tp"] = instance["tp"]
            instance["tp"] = tensor_parallel(instance["tp"], gpus, wsl=bool(host.get("wsl")))
        except (ValueError, TypeError):
            faults.append(f"{prefix}tp is {instance['tp']!r}: it is auto, or a number of GPUs such as 1, 2 or 4")
            continue
        instance["model_name"] = str(instance.get("model_name") or model_name(instance["model"]))
        instance["port"] = int(instance["port"])
        instance["url"] = url(instance["host"], instance["port"])
        faults += instance_faults(instance, settings["allowed_networks"])
        result.append(instance)
    faults += port_faults(result)
    faults += twin_faults(result, int(settings.get("twin_port_offset") or 0))
    faults += place(result, host, settings)
    if faults:
        raise EngineFault("\n".join(faults))
    return [complete(instance, settings) for instance in result]


def place(instances: list[dict[str, Any]], host: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Give each instance its GPUs, its tp and the lines that bind its unit; return what can't run as it is wanted."""
    gpu: GpuFacts | None = host.get("gpu")
    sizes = [instance.pop("size") for instance in instances]
    asked = [instance.pop("wanted_tp") for instance in instances]
    for instance in instances:
        instance["unit_lines"] = []
    if settings["engine"] != "lmdeploy" or not gpu or not gpu["cards"]:
        return []
    wanted = [
        Wanted(
            f"{instance['instance']}.service",
            # Of a model over several hosts each host has its part.
            None if tp == "auto" else int(tp) // max(1, len(instance["nodes"])),
            tuple(int(number) for number in instance.get("gpus") or []),
            size,
            None if not is_set(instance.get("cache_max_entry_count")) else float(instance["cache_max_entry_count"]),
        )
        for instance, size, tp in zip(instances, sizes, asked, strict=True)
    ]
    dealt = deal(wanted, gpu, wsl=bool(host.get("wsl")))
    for instance, got in zip(instances, dealt, strict=True):
        instance["tp"] = got.tp * max(1, len(instance["nodes"]))
        if len(gpu["cards"]) > 1:
            instance["gpus"] = list(got.gpus)
        if settings.get("numa_affinity", "auto") == "auto" and not host.get("wsl"):
            instance["unit_lines"] = unit_lines(gpu, got.gpus)
    return fault_sentences(instances, wanted, dealt, gpu)


def fault_sentences(
    instances: Sequence[Mapping[str, Any]], wanted: Sequence[Wanted], dealt: Sequence[Dealt], gpu: GpuFacts
) -> list[str]:
    """Return what can't run, each with variable, value, cause and way out."""
    found = []
    for fault in layout_faults(wanted, dealt, gpu):
        instance, want = instances[fault.number], wanted[fault.number]
        names = {key: f"{instance['variable_prefix']}{key}" for key in ("tp", "gpus", "cache_max_entry_count")}
        values = {"tp": want.tp or "auto", "gpus": list(want.gpus), "cache_max_entry_count": want.ratio}
        text = f"{fault.why} {fault.fix}".format(**names)
        found.append(f"{names[fault.setting]} is {values[fault.setting]}: {text}")
    return found


def complete(instance: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Add what the launcher reads: arguments, their variables, and the environment."""
    gpus = instance.get("gpus") or []
    environment = {
        # One line for each request is for debugging; it would also hold what clients ask for in paths.
        "UVICORN_LOG_LEVEL": "warning",
        # CUDA by itself counts the fastest card first; nvidia-smi and people count by the bus.
        **(
            {"CUDA_VISIBLE_DEVICES": ",".join(str(gpu) for gpu in gpus), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
            if gpus
            else {}
        ),
        **{str(key): str(value) for key, value in (instance.get("environment") or {}).items()},
    }
    launcher = {
        "name": instance["instance"],
        "engine": instance["engine"],
        "backend": instance["backend"],
        "model_path": instance["model_path"],
        "model_name": instance["model_name"],
        "host": client_address(instance["host"]),
        "port": instance["port"],
        "arguments": engine_arguments(instance),
        "variables": argument_variables(instance),
        "environment": environment,
        "drain_seconds": int(settings["drain_seconds"]),
        "rank": instance["rank"],
        # Where the first host of a model over several hosts is to be found by the others; empty on a single host.
        "head": f"{instance['nodes'][0]}:{instance['nodes_port']}" if instance["nodes"] else "",
    }
    allowed = [*peers(instance["host"], settings["allowed_networks"]), *instance["nodes"]]
    return {**instance, "launcher": launcher, "allowed_networks": allowed}


def peers(host: str, networks: list[str]) -> list[str]:
    """Return whom a unit may talk to beside this host itself: nobody when it listens on loopback."""
    if is_loopback(host):
        return []
    # The launcher asks the engine at its own address.
    return [*networks, *([] if host in ANYWHERE else [host])]
