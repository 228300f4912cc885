# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Checks of the inventory against a host: system, ports, disks, mirrors, WSL. Pure, no Ansible."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ansible_collections.selfhost.lmdeploy.plugins.module_utils.model_memory import GB, estimate
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_desired import (
    GATEWAY_UNIT,
    Desired,
    Environment,
    Finding,
    overlaps,
    version_key,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_survey import Listener, Survey

SYSTEMS = {"ubuntu": ("22.04", "24.04"), "debian": ("12", "13")}
SYSTEMS_TEXT = "Ubuntu 22.04 and 24.04, Debian 12 and 13, and these under WSL2"
# LMDeploy's wheels are built for manylinux_2_28 on x86-64 only.
LMDEPLOY_LIBC = "2.28"
CLOCK_WARNING_SECONDS = 300
CLOCK_ERROR_SECONDS = 86400
NETWORK_FILE_SYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "drvfs", "fuse.sshfs"})
OWN_UNITS = ("api-server*.service", "open-webui.service", GATEWAY_UNIT)

CONDA_BYTES = 1 * GB
ENVIRONMENT_BYTES = {"lmdeploy": 10 * GB, "llama_cpp": GB // 2, "open_webui": 8 * GB, "open_webui_slim": 1 * GB}
# What the roles llama_cpp and gateway have from the distribution.
SYSTEM_PACKAGES = ("haproxy", "keepalived", "libgomp1", "libstdc++6")
# Beside the weights there are tokenizer, code and what a download holds twice for a moment.
MODEL_ROOM = 1.1

FETCHED = {
    "packages": "Python packages come",
    "python": "Python comes",
    "conda": "Miniconda comes",
    "models": "Models come",
}
OFFICIAL_INDEX = "https://pypi.org/simple/"
OFFICIAL_CHANNELS = "https://conda.anaconda.org"
OFFICIAL_HUB = "https://huggingface.co"
OFFICIAL_MODELSCOPE = "https://modelscope.cn"


@dataclass(frozen=True)
class Source:
    """An address that the roles fetch from: ``kind`` says what, ``variable`` where it can be changed."""

    url: str
    variable: str
    kind: str


def is_own_unit(unit: str) -> bool:
    """Tell whether a unit is one that this collection makes."""
    return unit == "open-webui.service" or (unit.startswith("api-server") and unit.endswith(".service"))


def models(desired: Desired) -> list[tuple[str, str]]:
    """Return (variable, id or path) of every model that the host is to have."""
    named = [(instance.variable("model"), instance.text("model")) for instance in desired.instances]
    if "model_weights" in desired.roles:
        listed = desired.items("model_weights_models")
        named += [
            (f"model_weights_models[{index}].id", str(entry.get("id", "")))
            for index, entry in enumerate(listed)
            if isinstance(entry, dict)
        ]
    first: dict[str, str] = {}
    for variable, model in named:
        if model:
            first.setdefault(model, variable)
    return [(variable, model) for model, variable in first.items()]


def is_from_hub(model: str) -> bool:
    """Tell whether a model is a repository id; anything else is a path or a file that others bring."""
    return "/" in model and not model.startswith("/")


def sources(desired: Desired) -> list[Source]:
    """Return every address that the roles may fetch from. Offline means without the official model hub."""
    found: list[Source] = []
    if desired.environments:
        found.append(
            Source(desired.text("mirrors_pip_index_url") or OFFICIAL_INDEX, "mirrors_pip_index_url", "packages")
        )
        for channel in desired.items("conda_env_channels") or desired.items("mirrors_conda_channels"):
            url = str(channel) if "://" in str(channel) else f"{OFFICIAL_CHANNELS}/{channel}/"
            found.append(Source(url, "mirrors_conda_channels", "python"))
    if "miniconda" in desired.roles and desired.text("miniconda_installer_url"):
        found.append(Source(desired.text("miniconda_installer_url"), "miniconda_installer_url", "conda"))
    if any(is_from_hub(model) for _variable, model in models(desired)) and not desired.text("model_weights_source_dir"):
        own_hub, offline = desired.text("mirrors_hf_endpoint"), desired.values.get("mirrors_offline") is True
        if desired.text("model_weights_hub") == "modelscope":
            found += [] if offline else [Source(OFFICIAL_MODELSCOPE, "mirrors_modelscope_enabled", "models")]
        elif own_hub or not offline:
            found.append(Source(own_hub or OFFICIAL_HUB, "mirrors_hf_endpoint", "models"))
    return found


def survey_request(desired: Desired) -> dict[str, Any]:
    """Return the parameters of the module ``host_survey`` for this host."""
    folders = ("miniconda_prefix", "model_weights_dir", "open_webui_data_dir")
    places = {desired.text(name) for name in folders} | {desired.environment_path(e) for e in desired.environments}
    return {
        "paths": sorted(path for path in places if path.startswith("/") and "\0" not in path),
        "ports": sorted({port for _variable, port, _address, _unit in desired.endpoints() if port is not None}),
        "models": sorted({desired.model_path(model) for _variable, model in models(desired)} - {""}),
        "environments": [
            {"path": desired.environment_path(environment), "packages": [environment.package]}
            for environment in desired.environments
        ],
        "units": list(OWN_UNITS),
        "urls": sorted({source.url for source in sources(desired)}),
        # Where these are as wanted, the roles that bring them need not look themselves.
        "trust_name": "selfhost-mirrors" if "mirrors" in desired.roles else "",
        "conda": {
            "prefix": desired.text("miniconda_prefix"),
            "sha256": desired.text("miniconda_installer_sha256"),
            "profile": "/etc/profile.d/conda.sh",
        }
        if "miniconda" in desired.roles
        else {},
        "system_packages": sorted({*SYSTEM_PACKAGES, *(desired.values.get("lmdeploy_system_packages") or [])}),
        "proxies": {
            "http_proxy": desired.text("mirrors_http_proxy"),
            "https_proxy": desired.text("mirrors_https_proxy"),
            "no_proxy": desired.text("mirrors_no_proxy"),
        },
    }


def is_installed(desired: Desired, survey: Survey, environment: Environment) -> bool:
    """Tell whether an environment holds the version that is wanted."""
    facts = survey["environments"].get(desired.environment_path(environment))
    wanted = desired.text(environment.version_variable)
    return bool(facts and wanted and facts["packages"].get(environment.package) == wanted)


def is_fetched(desired: Desired, survey: Survey, model: str) -> bool:
    """Tell whether a model is on the host's disk."""
    facts = survey["models"].get(desired.model_path(model))
    return bool(facts and facts["exists"])


def check_privilege(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """privilege: the roles write to /etc and /opt."""
    if not survey["is_root"]:
        why = "The tasks on this host don't run as root, and the roles write to /etc, /opt and /var/lib."
        fix = "Connect as root, or set ansible_become to true (with ansible_become_password where sudo asks for one)."
        yield desired.fault("privilege", "ansible_become", "false", why, fix)


def check_system(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """os: the systems that the roles are tested on."""
    if survey["os_version"] not in SYSTEMS.get(survey["os_id"], ()):
        found = f"{survey['os_id']} {survey['os_version']}".strip() or "unknown"
        why = f"The operating system is {found}; supported are {SYSTEMS_TEXT}."
        fix = "Install one of these. To try it all the same, put os into preflight_skipped_checks."
        yield desired.fault("os", "ansible_host", desired.host, why, fix)


def check_systemd(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """systemd: services are systemd units, so it must be process 1 and answer."""
    if survey["init"] == "systemd" and survey["systemd_state"] not in {"", "offline", "stopping"}:
        return
    if survey["wsl"]["is_wsl"] and "wsl" in desired.roles:
        # That role turns systemd on and says how to go on; nothing else is changed before.
        return
    why = f"systemd does not run this host: process 1 is {survey['init'] or 'unknown'}."
    fix = "Use a host, a virtual machine or a container that boots systemd."
    if survey["init"] == "systemd":
        why = f"systemd runs this host but is {survey['systemd_state'] or 'not answering'}."
        fix = "See systemctl status on the host."
    elif survey["wsl"]["is_wsl"] and survey["wsl"]["conf_systemd"]:
        fix = "/etc/wsl.conf asks for systemd already: run wsl --shutdown on Windows, wait ten seconds, start again."
    elif survey["wsl"]["is_wsl"]:
        fix = "Put systemd=true below [boot] in /etc/wsl.conf, then run wsl --shutdown on Windows and start again."
    yield desired.fault("systemd", "ansible_host", desired.host, why, fix)


def check_architecture(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """architecture, libc: what the engine's wheels and the installer are built for."""
    machine = survey["architecture"]
    if desired.engine == "lmdeploy" and machine != "x86_64":
        why = f"LMDeploy is published for x86_64 only, and this host is {machine}."
        fix = "Run LMDeploy on an x86_64 host, or set api_server_engine to llama_cpp."
        yield desired.fault("architecture", "api_server_engine", desired.text("api_server_engine"), why, fix)
    libc = version_key(survey["libc_version"])
    if desired.engine == "lmdeploy" and libc and libc < (version_key(LMDEPLOY_LIBC) or ()):
        why = f"The host's glibc is {survey['libc_version']}; LMDeploy's wheels need {LMDEPLOY_LIBC} or later."
        yield desired.fault("libc", "ansible_host", desired.host, why, f"Install one of {SYSTEMS_TEXT}.")
    installer = desired.text("miniconda_installer")
    built_for = next((name for name in ("x86_64", "aarch64") if name in installer), "")
    if "miniconda" in desired.roles and built_for not in ("", machine):
        why = f"This installer is built for {built_for}, and the host is {machine}."
        fix = f"Set it to the {machine} file, with its own miniconda_installer_sha256."
        yield desired.fault("architecture", "miniconda_installer", installer, why, fix)


def check_clock(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """clock: certificates and sign-ins fail on a host that lives in another time."""
    offset = abs(desired.clock_offset_seconds)
    if offset < CLOCK_WARNING_SECONDS:
        return
    direction = "ahead of" if desired.clock_offset_seconds > 0 else "behind"
    why = f"The host's clock is {offset:.0f} s {direction} the controller's; certificates and sign-ins depend on it."
    fix = "Turn time synchronisation on: timedatectl set-ntp true."
    make = desired.fault if offset >= CLOCK_ERROR_SECONDS else desired.warning
    yield make("clock", "ansible_host", desired.host, why, fix)


def _holder(listener: Listener) -> str:
    if listener["unit"].endswith(".service"):
        return f"{listener['unit']} (process {listener['pid']}, {listener['process']})"
    if listener["pid"]:
        return f"process {listener['pid']} ({listener['process']})"
    return "a process that can't be seen from here"


def check_held_ports(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """port_held: nobody else listens where we will; our own unit may."""
    for variable, port, address, unit in desired.endpoints():
        for listener in survey["listeners"]:
            if listener["port"] != port or not overlaps(address, listener["address"]):
                continue
            # A unit of ours that is to move to another port frees this one itself; port_clash sees to the rest.
            if listener["unit"] == unit or listener["unit"] in desired.units:
                continue
            why = f"On {listener['address']}:{port} listens {_holder(listener)}."
            if is_own_unit(listener["unit"]):
                why += " The inventory no longer wants that unit."
            stop = f"systemctl disable --now {listener['unit']}" if listener["unit"].endswith(".service") else "stop it"
            yield desired.fault(
                "port_held", variable, port, why, f"Free the port ({stop}), or take another {variable}."
            )
            break


def check_low_ports(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """port_privileged: the services don't run as root, so low ports are not theirs."""
    lowest = survey["unprivileged_port"]
    for variable, port, _address, unit in desired.endpoints():
        # HAProxy has the one capability that low ports need.
        if port is not None and 1 <= port < lowest and unit != GATEWAY_UNIT:
            why = f"{unit} does not run as root, and this host keeps ports below {lowest} for root."
            fix = f"Take a port from {lowest} on; a gateway in front may listen on 80 and 443."
            yield desired.fault("port_privileged", variable, port, why, fix)


@dataclass(frozen=True)
class Need:
    """Room that something will take on a disk."""

    path: str
    amount: float
    what: str
    variable: str


def _needs(desired: Desired, survey: Survey) -> Iterator[Need]:
    prefix = desired.text("miniconda_prefix")
    if "miniconda" in desired.roles and prefix in survey["paths"] and not survey["paths"][prefix]["exists"]:
        yield Need(prefix, CONDA_BYTES, "Miniconda", "miniconda_prefix")
    for environment in desired.environments:
        path = desired.environment_path(environment)
        if path in survey["paths"] and not is_installed(desired, survey, environment):
            slim = environment.role == "open_webui" and desired.text("open_webui_profile") == "slim"
            amount = ENVIRONMENT_BYTES[environment.role + ("_slim" if slim else "")]
            yield Need(path, amount, f"{environment.package}'s environment", "miniconda_prefix")
    folder = desired.text("model_weights_dir")
    for _variable, model in models(desired):
        size = estimate(model, None)
        if size and folder in survey["paths"] and not model.startswith("/") and not is_fetched(desired, survey, model):
            yield Need(folder, size.weight_bytes * MODEL_ROOM, f"{model} (from {size.source})", "model_weights_dir")


def check_disk(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """disk: room for what is not there yet, summed for each file system."""
    by_device: dict[int, list[Need]] = defaultdict(list)
    for need in _needs(desired, survey):
        by_device[survey["paths"][need.path]["device"]].append(need)
    for needs in by_device.values():
        free = survey["paths"][needs[0].path]["free_bytes"]
        total = sum(need.amount for need in needs)
        if total <= free:
            continue
        largest = max(needs, key=lambda need: need.amount)
        parts = ", ".join(f"{need.amount / GB:.1f} GB for {need.what}" for need in needs)
        why = (
            f"{total / GB:.1f} GB are needed below {survey['paths'][largest.path]['nearest']} ({parts}), "
            f"and {free / GB:.1f} GB are free."
        )
        fix = f"Free or add {(total - free) / GB:.1f} GB, or set {largest.variable} to a folder on a larger disk."
        yield desired.fault("disk", largest.variable, desired.text(largest.variable), why, fix)


def check_file_systems(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """data_dir, wsl_models: databases on local disks, data and models on Linux disks."""
    data = desired.text("open_webui_data_dir")
    facts = survey["paths"].get(data)
    if "open_webui" in desired.roles and facts and facts["file_system"] in NETWORK_FILE_SYSTEMS:
        why = f"It is on {facts['file_system']}, and SQLite loses data on network file systems."
        yield desired.fault("data_dir", "open_webui_data_dir", data, why, "Set open_webui_data_dir to a local disk.")
    if not survey["wsl"]["is_wsl"]:
        return
    if "open_webui" in desired.roles and data.startswith("/mnt/"):
        why = "Below /mnt lie the disks of Windows, on which SQLite loses data."
        fix = "Set open_webui_data_dir to a folder of the Linux disk, such as /var/lib/open-webui/data."
        yield desired.fault("data_dir", "open_webui_data_dir", data, why, fix)
    places = [("model_weights_dir", desired.text("model_weights_dir"))]
    places += [(instance.variable("model"), instance.text("model")) for instance in desired.instances]
    for variable, place in places:
        if f"{place}/".startswith("/mnt/"):
            why = "Below /mnt lie the disks of Windows, from which loading a model takes many times longer."
            fix = f"Set {variable} to a place on the Linux disk, such as /var/lib/models."
            yield desired.fault("wsl_models", variable, place, why, fix)


def _is_needed(desired: Desired, survey: Survey, kind: str) -> bool:
    if kind == "conda":
        facts = survey["paths"].get(desired.text("miniconda_prefix"))
        return not (facts and facts["exists"])
    if kind == "models":
        return any(
            is_from_hub(model) and not is_fetched(desired, survey, model) for _variable, model in models(desired)
        )
    return any(not is_installed(desired, survey, environment) for environment in desired.environments)


def check_sources(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """mirror: every place that something must still be fetched from answers, and there is one for each thing."""
    asked = sources(desired)
    if not any(source.kind == "models" for source in asked) and not desired.text("model_weights_source_dir"):
        for variable, model in models(desired):
            if is_from_hub(model) and not is_fetched(desired, survey, model):
                why = "The model is not on the host, and with mirrors_offline no hub is asked for it."
                fix = "Name a folder with it (model_weights_source_dir) or a hub of your own (mirrors_hf_endpoint)."
                yield desired.fault("mirror", variable, model, why, fix)
    for source in asked:
        answer = survey["urls"].get(source.url)
        if answer is None or answer["reached"] or not _is_needed(desired, survey, source.kind):
            continue
        why = f"The host can't reach it: {answer['detail']}. {FETCHED[source.kind]} from there."
        fix = f"Set {source.variable} to a mirror that the host reaches"
        if "certificate" in answer["detail"].lower():
            fix = "Set mirrors_ca_file to the certificate (PEM) of the authority that signs here"
        elif urlsplit(source.url).scheme != "file":
            fix += ", or mirrors_https_proxy to the proxy that leads there"
        yield desired.fault("mirror", source.variable, source.url, why, f"{fix}.")


def _brought_by_packages(desired: Desired) -> set[str]:
    """Return the paths of the files that come out of Python packages."""
    folder, paths = desired.text("model_weights_dir"), set()
    for entry in desired.items("model_weights_packages") if "model_weights" in desired.roles else []:
        if isinstance(entry, dict):
            name = str(entry.get("file") or PurePosixPath(str(entry.get("member", ""))).name)
            paths.add(f"{folder}/{name}")
    return paths


def check_model_files(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """model_missing: a model given as a path or a file is there already, or comes out of a package."""
    brought = _brought_by_packages(desired)
    for instance in desired.instances:
        model = instance.text("model")
        path = desired.model_path(model)
        if not model or not path or is_from_hub(model) or path in brought or path not in survey["models"]:
            continue
        if not is_fetched(desired, survey, model):
            variable = instance.variable("model")
            why = f"Nothing is at {path} on the host, and no role brings it there."
            fix = f"Put the model there, or set {variable} to its name on a hub as ORG/NAME, which is fetched."
            yield desired.fault("model_missing", variable, model, why, fix)


def check_wsl_driver(desired: Desired, survey: Survey) -> Iterator[Finding]:
    """wsl_driver: on WSL the driver is Windows', and a Linux one breaks it."""
    drivers = survey["wsl"]["linux_drivers"]
    if survey["wsl"]["is_wsl"] and survey["wsl"]["has_gpu_device"] and drivers:
        why = f"A Linux driver is installed in WSL ({', '.join(drivers)}) and hides the one of Windows."
        fix = "Remove the packages of the Linux driver (dpkg -S shows them); the driver belongs to Windows."
        yield desired.fault("wsl_driver", "ansible_host", desired.host, why, fix)


HOST_CHECKS = (
    check_privilege,
    check_system,
    check_systemd,
    check_architecture,
    check_clock,
    check_held_ports,
    check_low_ports,
    check_disk,
    check_file_systems,
    check_sources,
    check_model_files,
    check_wsl_driver,
)
