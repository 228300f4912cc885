#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Look at a host in one call and change nothing: system, memory, disks, ports, cards, mirrors, what is installed."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_survey
short_description: Look at a host in one call and change nothing
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Tells what M(selfhost.lmdeploy.preflight) needs to judge a host. Judges nothing itself.
  - Needs no facts, no packages and nothing of this collection on the host.
options:
  paths:
    description: Absolute paths whose file system is looked at; they need not exist.
    type: list
    elements: str
    default: []
  ports:
    description: TCP ports whose listeners are looked for.
    type: list
    elements: int
    default: []
  models:
    description: Absolute paths of model folders or files.
    type: list
    elements: str
    default: []
  environments:
    description: Python environments, and the names of the packages in them whose version is wanted.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Absolute path of the environment.
        type: str
        required: true
      packages:
        description: Names of distributions.
        type: list
        elements: str
        default: []
  units:
    description: Patterns of systemd units to tell the state of.
    type: list
    elements: str
    default: []
  urls:
    description: Addresses to try from the host. An HTTP answer of any kind but a gateway's error counts as reached.
    type: list
    elements: str
    default: []
  proxies:
    description: Proxy settings for O(urls), as the environment variables C(http_proxy), C(https_proxy) and C(no_proxy).
    type: dict
    default: {}
  ca_pem:
    description: Certificates in PEM form to trust for O(urls) beside those of the host.
    type: str
    default: ''
  trust_name:
    description: Name under which the host is to trust exactly O(ca_pem); empty for no look.
    type: str
    default: ''
  conda:
    description: The C(prefix), C(sha256) and C(profile) that M(selfhost.lmdeploy.conda_installation) would be called
      with; empty for no look.
    type: dict
    default: {}
  system_packages:
    description: Packages of the distribution to look for.
    type: list
    elements: str
    default: []
  watched:
    description:
      - What is looked at beside the places and units that the roles always use, to tell whether the host is as a whole
        run left it. C(trees) are looked at with all that is in them, of C(folders) owner and mode count, C(prefix) is
        conda's.
      - Without it, nothing of that is looked at.
    type: dict
    default: {}
  timeout_seconds:
    description: Seconds that all O(urls) together may take.
    type: float
    default: 4.0
attributes:
  check_mode:
    support: full
    description: Never changes anything.
"""

EXAMPLES = r"""
- name: See who holds the port and how much room the models have
  selfhost.lmdeploy.host_survey:
    ports: [23333]
    paths: [/var/lib/models]
  register: survey
"""

RETURN = r"""
survey:
  description:
    - The findings; see C(Survey) in C(plugins/module_utils/preflight_survey.py) for every field and its unit.
    - C(urls) is a list in the order of O(urls), so that passwords in addresses are not repeated.
  returned: always
  type: dict
  sample: {"os_id": "debian", "os_version": "12", "architecture": "x86_64", "memory_bytes": 25220354048}
"""

import base64
import os
import platform
import re
import ssl
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import preflight_survey as facts
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import settled
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.host_look import (
    in_parallel,
    read,
    run,
    survey_gpus,
    survey_model,
)
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.witness import look, read_note

if TYPE_CHECKING:
    from collections.abc import Iterable


def survey_wsl() -> facts.WslFacts:
    """Tell whether this is WSL, and what is special there."""
    is_wsl = "microsoft" in read("/proc/version").lower()
    drivers: list[str] = []
    if is_wsl:
        # The Windows driver brings its own libcuda below /usr/lib/wsl; one from a Linux package shadows it.
        drivers = [
            str(path)
            for path in Path("/usr/lib").glob("*-linux-gnu/libcuda.so.*")
            if "wsl" not in os.path.realpath(path)
        ]
    return {
        "is_wsl": is_wsl,
        "has_gpu_device": Path("/dev/dxg").exists(),
        "conf_systemd": facts.wsl_conf_systemd(read("/etc/wsl.conf")),
        "linux_drivers": sorted(drivers),
    }


def survey_path(path: str, mounts: str) -> facts.PathFacts:
    """Tell about the file system of the nearest existing parent."""
    nearest = Path(path)
    while not nearest.exists():
        nearest = nearest.parent
    real = nearest.resolve()
    room = os.statvfs(real)
    return {
        "exists": Path(path).exists(),
        "nearest": str(nearest),
        "device": real.stat().st_dev,
        "file_system": facts.file_system_of(str(real), mounts),
        "free_bytes": room.f_bavail * room.f_frsize,
    }


def owners_of(inodes: set[int]) -> dict[int, int]:
    """Return the process that holds each socket."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*/fd"):
        if len(found) == len(wanted):
            break
        try:
            for name in os.listdir(folder):  # noqa: PTH208 half a million paths of a busy host need no objects
                target = os.readlink(f"{folder}/{name}")  # noqa: PTH115 the text of the link is what counts, it is no path
                if target in wanted:
                    found[wanted[target]] = int(folder.parts[2])
        except OSError:
            continue  # the process ended meanwhile, or is not ours to see
    return found


def survey_listeners(ports: Iterable[int]) -> list[facts.Listener]:
    """Tell who listens on the ports."""
    wanted = set(ports)
    sockets = [
        socket
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for socket in facts.parse_listeners(read(table))
        if socket[1] in wanted
    ]
    owners = owners_of({inode for _address, _port, inode in sockets}) if sockets else {}
    found: list[facts.Listener] = []
    for address, port, inode in sorted(sockets):
        pid = owners.get(inode, 0)
        found.append(
            {
                "address": address,
                "port": port,
                "pid": pid,
                "process": read(f"/proc/{pid}/comm").strip() if pid else "",
                "unit": facts.unit_of_cgroup(read(f"/proc/{pid}/cgroup")) if pid else "",
            }
        )
    return found


def survey_environment(path: str, packages: Iterable[str]) -> facts.EnvironmentFacts:
    """Tell the installed versions of packages by the names of their metadata folders."""
    found: dict[str, str] = {}
    for name in packages:
        spelled = re.sub(r"[-_.]+", "_", name).lower()
        for folder in Path(path).glob("lib/python3*/site-packages/*.dist-info"):
            own, _dash, version = folder.name.removesuffix(".dist-info").rpartition("-")
            if re.sub(r"[-_.]+", "_", own).lower() == spelled:
                found[name] = version
    return {"exists": Path(path).is_dir(), "packages": found}


def survey_units(patterns: list[str]) -> dict[str, facts.UnitFacts]:
    """Tell the state and the memory of the loaded units that match."""
    if not patterns:
        return {}
    _status, text = run(["systemctl", "show", "--property=Id,ActiveState,MemoryCurrent,LoadState", *patterns], 5)
    found: dict[str, facts.UnitFacts] = {}
    for block in facts.parse_properties(text):
        if block.get("LoadState") == "loaded":
            memory = block.get("MemoryCurrent", "")
            # Without accounting systemd prints "[not set]" or 2^64-1.
            amount = int(memory) if memory.isdigit() and len(memory) < 19 else 0
            found[block["Id"]] = {"active": block.get("ActiveState", ""), "memory_bytes": amount}
    return found


def try_url(url: str, opener: urllib.request.OpenerDirector, timeout_seconds: float) -> facts.UrlFacts:
    """Tell whether an address answers; a file is there or not."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        there = Path(unquote(parts.path)).exists()
        return {"reached": there, "detail": "exists" if there else "no such file on the host"}
    headers = {"User-Agent": "selfhost.lmdeploy"}
    user, at, place = parts.netloc.rpartition("@")
    if at:
        # urllib would take user and password for a part of the host's name.
        headers["Authorization"] = "Basic " + base64.b64encode(unquote(user).encode()).decode()
    plain = parts._replace(netloc=place).geturl()
    request = urllib.request.Request(plain, method="HEAD", headers=headers)  # noqa: S310 http(s) by our own checks
    try:
        with opener.open(request, timeout=timeout_seconds) as answer:
            return {"reached": True, "detail": f"HTTP {answer.status}"}
    except urllib.error.HTTPError as error:
        # 404 and 401 come from a live server; a proxy's refusal or a gateway without its server does not.
        return {"reached": error.code not in {407, 502, 503, 504}, "detail": f"HTTP {error.code} {error.reason}"}
    except urllib.error.URLError as error:
        return {"reached": False, "detail": str(error.reason)}
    except (OSError, ValueError) as error:
        return {"reached": False, "detail": str(error) or type(error).__name__}


def survey_urls(
    urls: Iterable[str], proxies: dict[str, str], ca_pem: str, timeout_seconds: float
) -> list[facts.UrlFacts]:
    """Try all addresses at once, through the proxies given, else those of the host's own environment.

    The answers come in the order of the addresses, which may hold passwords and so are not repeated in the result.
    """
    os.environ.update({name: value for name, value in proxies.items() if value})
    context = ssl.create_default_context()
    if ca_pem:
        context.load_verify_locations(cadata=ca_pem)
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))
    wanted = list(urls)
    found = in_parallel(
        {url: partial(try_url, url, opener, timeout_seconds) for url in wanted},
        timeout_seconds + 0.5,
    )
    late: facts.UrlFacts = {"reached": False, "detail": f"no answer within {timeout_seconds:g} s"}
    return [found.get(url, late) for url in wanted]


def survey_watched(watched: dict[str, Any]) -> facts.WatchFacts:
    """Tell what the host looks like, and what it looked like when a whole run found it as wanted."""
    seen = look(watched) if watched else ""
    return {"seen": seen, "note": read_note() if seen else {}, "time": time.time()}


def survey(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return everything that the parameters ask for: a Survey, but for the addresses' answers, which are a list."""
    system = facts.parse_os_release(read("/etc/os-release"))
    memory = facts.parse_meminfo(read("/proc/meminfo"))
    mounts = read("/proc/mounts")
    booted = Path("/run/systemd/system").is_dir()
    manager: dict[str, str] = {}
    if booted:
        blocks = facts.parse_properties(run(["systemctl", "show", "--property=Version,SystemState"], 5)[1])
        manager = blocks[0] if blocks else {}
    version = re.match(r"\d+", manager.get("Version", ""))
    shm = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None  # noqa: S108 its size is what is asked
    seconds = parameters["timeout_seconds"]
    return {
        "time": time.time(),
        "is_root": os.geteuid() == 0,
        "os_id": system.get("ID", ""),
        "os_version": system.get("VERSION_ID", ""),
        "architecture": platform.machine(),
        "libc_version": platform.libc_ver()[1],
        "init": read("/proc/1/comm").strip(),
        "systemd_version": int(version.group()) if version else 0,
        "systemd_state": manager.get("SystemState", ""),
        "unprivileged_port": int(read("/proc/sys/net/ipv4/ip_unprivileged_port_start") or 1024),
        "memory_bytes": memory.get("MemTotal", 0),
        "memory_free_bytes": memory.get("MemAvailable", 0),
        "shm_bytes": shm.f_blocks * shm.f_frsize if shm else 0,
        "wsl": survey_wsl(),
        "gpu": survey_gpus(),
        "paths": {path: survey_path(path, mounts) for path in parameters["paths"]},
        "listeners": survey_listeners(parameters["ports"]),
        "models": {path: survey_model(path) for path in parameters["models"]},
        "environments": {
            entry["path"]: survey_environment(entry["path"], entry["packages"]) for entry in parameters["environments"]
        },
        "units": survey_units(parameters["units"]) if booted else {},
        "urls": survey_urls(parameters["urls"], parameters["proxies"], parameters["ca_pem"], seconds),
        "settled": {
            "trust": bool(parameters["trust_name"]) and settled.trusts(parameters["trust_name"], parameters["ca_pem"]),
            "conda": bool(parameters["conda"]) and settled.has_conda(**parameters["conda"]),
            "packages": settled.installed_packages(parameters["system_packages"])
            if parameters["system_packages"]
            else [],
        },
        "watch": survey_watched(parameters["watched"]),
    }


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "paths": {"type": "list", "elements": "str", "default": []},
            "ports": {"type": "list", "elements": "int", "default": []},
            "models": {"type": "list", "elements": "str", "default": []},
            "environments": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "path": {"type": "str", "required": True},
                    "packages": {"type": "list", "elements": "str", "default": []},
                },
            },
            "units": {"type": "list", "elements": "str", "default": []},
            # Addresses may hold passwords, and modules are logged on the host with what they were called with.
            "urls": {"type": "list", "elements": "str", "default": [], "no_log": True},
            "proxies": {"type": "dict", "default": {}, "no_log": True},
            "ca_pem": {"type": "str", "default": "", "no_log": True},
            "trust_name": {"type": "str", "default": ""},
            "conda": {"type": "dict", "default": {}},
            "system_packages": {"type": "list", "elements": "str", "default": []},
            "watched": {"type": "dict", "default": {}},
            "timeout_seconds": {"type": "float", "default": 4.0},
        },
        supports_check_mode=True,
    )
    try:
        found = survey(module.params)
    except (ssl.SSLError, ValueError, OSError) as error:
        module.fail_json(msg=f"The survey of the host stopped: {error}")
    module.exit_json(changed=False, survey=found)


if __name__ == "__main__":
    main()
