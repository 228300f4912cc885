# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""What a survey of a host holds, and the parsers that read it out of /proc, /etc and nvidia-smi.

Shared by the module that surveys (on the host) and the checks that judge (on the controller). Pure: text in, data out.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any, TypedDict

# One csv query answers for all cards. The second form is for drivers older than 510, which don't know compute_cap.
GPU_FIELDS = (
    "index,uuid,name,driver_version,memory.total,memory.used,mig.mode.current,compute_cap",
    "index,uuid,name,driver_version,memory.total,memory.used,mig.mode.current",
)
# What stands in a row of a card that has fallen off the bus or hangs.
FAULTY = re.compile(r"GPU is lost|Unknown Error|GPU requires reset|ERR!", re.IGNORECASE)
PROCESS_FIELDS = "gpu_uuid,pid,process_name,used_memory"


class Listener(TypedDict):
    """A listening TCP socket; ``pid`` 0 and empty texts where the owner can't be seen."""

    address: str
    port: int
    pid: int
    process: str
    unit: str


class PathFacts(TypedDict):
    """The file system that a path is on, or would be on; ``free_bytes`` is what root's services can still write."""

    exists: bool
    nearest: str
    device: int
    file_system: str
    free_bytes: int


class Gpu(TypedDict):
    """One card as nvidia-smi tells it; memory in MiB, ``compute_capability`` empty where the driver doesn't tell.

    ``fault`` is what nvidia-smi says of a card that no longer answers. ``numa`` is the node that it hangs on, -1 where
    nobody tells or there are several, and ``cpus`` the list of the CPUs beside it.
    """

    index: int
    uuid: str
    name: str
    driver: str
    memory_mib: int
    used_mib: int
    mig: bool
    compute_capability: str
    fault: str
    numa: int
    cpus: str


class GpuProcess(TypedDict):
    """A process that computes on a card; ``used_mib`` is -1 where the driver doesn't tell (WSL, MIG)."""

    uuid: str
    pid: int
    process: str
    used_mib: int
    unit: str


class GpuLink(TypedDict):
    """How two cards are joined: NV1 to NV18 (NVLink), PIX, PXB, PHB, NODE or SYS, as in ``nvidia-smi topo -m``."""

    first: int
    second: int
    link: str


class GpuFacts(TypedDict):
    """All about cards: ``program`` is nvidia-smi's path ('' = none), ``error`` why it gave no answer.

    ``lost`` are nvidia-smi's words about cards that it can't even list. ``numa_nodes`` counts the host's nodes with
    CPUs. ``dealt`` are the cards that units of the role api_server have, by their numbers.
    """

    program: str
    error: str
    pci_devices: int
    cards: list[Gpu]
    processes: list[GpuProcess]
    links: list[GpuLink]
    lost: list[str]
    numa_nodes: int
    dealt: dict[str, list[int]]


class ModelFacts(TypedDict):
    """A model on the host's disk; numbers are 0 where its files don't tell."""

    exists: bool
    weight_bytes: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_session: int


class EnvironmentFacts(TypedDict):
    """A Python environment: the versions of the packages that were asked for."""

    exists: bool
    packages: dict[str, str]


class UnitFacts(TypedDict):
    """One of our systemd units; ``memory_bytes`` is what its control group holds."""

    active: str
    memory_bytes: int


class UrlFacts(TypedDict):
    """Whether an address answered within the time given, and what it said or why not."""

    reached: bool
    detail: str


class WslFacts(TypedDict):
    """Windows Subsystem for Linux: ``conf_systemd`` is what wsl.conf asks for, ``linux_drivers`` what must not be."""

    is_wsl: bool
    has_gpu_device: bool
    conf_systemd: bool
    linux_drivers: list[str]


class SettledFacts(TypedDict):
    """What is as wanted already: the certificates of the mirrors, conda, and which packages of the distribution."""

    trust: bool
    conda: bool
    packages: list[str]


class WatchFacts(TypedDict):
    """Whether the host is as a whole run left it: what was seen now, and the note of then; see witness.py."""

    seen: str
    note: dict[str, Any]
    time: float


class Survey(TypedDict):
    """Everything that one call of the module ``host_survey`` tells about a host."""

    time: float
    is_root: bool
    os_id: str
    os_version: str
    architecture: str
    libc_version: str
    init: str
    systemd_version: int
    systemd_state: str
    unprivileged_port: int
    memory_bytes: int
    memory_free_bytes: int
    shm_bytes: int
    wsl: WslFacts
    gpu: GpuFacts
    paths: dict[str, PathFacts]
    listeners: list[Listener]
    models: dict[str, ModelFacts]
    environments: dict[str, EnvironmentFacts]
    units: dict[str, UnitFacts]
    urls: dict[str, UrlFacts]
    settled: SettledFacts
    watch: WatchFacts


def parse_os_release(text: str) -> dict[str, str]:
    """Return the assignments of an os-release file."""
    found = re.findall(r"^([A-Z_]+)=(.*)$", text, re.MULTILINE)
    return {name: value.strip().strip("\"'") for name, value in found}


def parse_meminfo(text: str) -> dict[str, int]:
    """Return the figures of /proc/meminfo in bytes."""
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def parse_properties(text: str) -> list[dict[str, str]]:
    """Return the blocks that ``systemctl show`` prints, one mapping for each unit."""
    blocks = [block for block in text.split("\n\n") if block.strip()]
    return [dict(line.split("=", 1) for line in block.splitlines() if "=" in line) for block in blocks]


def wsl_conf_systemd(text: str) -> bool:
    """Tell whether a wsl.conf asks for systemd."""
    section = ""
    answer = False
    for raw in text.splitlines():
        line = raw.split("#", 1)[0].strip().lower()
        if line.startswith("["):
            section = line.strip("[] ")
        elif section == "boot" and line.replace(" ", "").startswith("systemd="):
            answer = line.split("=", 1)[1].strip() == "true"
    return answer


def _address(text: str) -> str:
    # The kernel prints 32-bit words in the machine's own order, which is little endian on all that we support.
    raw = b"".join(bytes.fromhex(text[at : at + 8])[::-1] for at in range(0, len(text), 8))
    address = ipaddress.ip_address(raw)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def parse_listeners(text: str) -> list[tuple[str, int, int]]:
    """Return (address, port, inode) of every listening socket in a /proc/net/tcp or tcp6."""
    found = []
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 9 and fields[3] == "0A":
            address, port = fields[1].rsplit(":", 1)
            found.append((_address(address), int(port, 16), int(fields[9])))
    return found


def unit_of_cgroup(text: str) -> str:
    """Return the systemd unit that a /proc/PID/cgroup names, '' where there is none."""
    units = re.findall(r"/([^/\n]+\.(?:service|scope))(?=/|\n|$)", text)
    return units[-1] if units else ""


def file_system_of(path: str, mounts: str) -> str:
    """Return the file system type that /proc/mounts gives for an absolute path."""
    best, kind = "", ""
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ")
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        # Of two mounts on one place the later one is seen.
        if inside and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind


def _number(text: str) -> int:
    match = re.fullmatch(r"(\d+)(?:\.\d+)?(?: MiB)?", text.strip())
    return int(match.group(1)) if match else -1


def _rows(text: str, columns: int) -> list[list[str]]:
    rows = [[field.strip() for field in line.split(",")] for line in text.splitlines()]
    return [row for row in rows if len(row) >= columns]


def parse_gpus(text: str) -> list[Gpu]:
    """Return the cards of ``nvidia-smi --query-gpu=GPU_FIELDS --format=csv,noheader,nounits``, either set of fields."""
    cards: list[Gpu] = []
    for place, row in enumerate(_rows(text, 7)):
        capability = row[7] if len(row) > 7 else ""
        fault = next((field.strip("[] ") for field in row if FAULTY.search(field)), "")
        number = _number(row[0])
        cards.append(
            {
                # A lost card may not even tell its number; the rows come in the order of the numbers.
                "index": number if number >= 0 else place,
                "uuid": row[1],
                "name": row[2],
                "driver": row[3],
                "memory_mib": max(0, _number(row[4])),
                "used_mib": max(0, _number(row[5])),
                "mig": row[6] == "Enabled",
                "compute_capability": capability if re.fullmatch(r"\d+\.\d+", capability) else "",
                "fault": fault,
                "numa": -1,
                "cpus": "",
            }
        )
    return cards


def parse_lost(text: str) -> list[str]:
    """Return what nvidia-smi says of cards that have no row."""
    return [line.strip() for line in text.splitlines() if re.match(r"\s*Unable to determine the device handle", line)]


def parse_gpu_processes(text: str) -> list[GpuProcess]:
    """Return the processes of ``nvidia-smi --query-compute-apps=... --format=csv,noheader,nounits``, units unknown."""
    found: list[GpuProcess] = []
    for row in _rows(text, 4):
        # A process name may hold commas; the ends of the row are fixed.
        name = ", ".join(row[2:-1])
        found.append(
            {"uuid": row[0], "pid": _number(row[1]), "process": name, "used_mib": _number(row[-1]), "unit": ""}
        )
    return [process for process in found if process["pid"] > 0]


def _matrix(text: str) -> list[tuple[int, dict[str, str]]]:
    """Return the rows of cards in ``nvidia-smi topo -m``: number of the card, and its fields by their headings."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [[field.strip() for field in line.split("\t")] for line in plain.splitlines()]
    # The header begins with a tab, which others may have stripped.
    header = next((line for line in lines if "GPU0" in line[:2] and {"GPU1", "CPU Affinity"} & set(line)), [])
    names = [name for name in header if name]
    found = []
    for line in lines:
        own = re.fullmatch(r"GPU(\d+)", line[0])
        if own and line is not header:
            found.append((int(own.group(1)), dict(zip(names, line[1:], strict=False))))
    return found


def parse_topology(text: str) -> list[GpuLink]:
    """Return the links between cards of ``nvidia-smi topo -m``, each pair once."""
    links: list[GpuLink] = []
    for own, fields in _matrix(text):
        for name, link in fields.items():
            other = re.fullmatch(r"GPU(\d+)", name)
            if other and own < int(other.group(1)):
                links.append({"first": own, "second": int(other.group(1)), "link": link})
    return links


def parse_nodes(text: str) -> dict[int, tuple[int, str]]:
    """Return for each card of ``nvidia-smi topo -m`` its NUMA node (-1: unknown, or several) and the CPUs beside it."""
    found = {}
    for own, fields in _matrix(text):
        node = fields.get("NUMA Affinity", "")
        found[own] = (int(node) if re.fullmatch(r"[0-9]{1,4}", node) else -1, fields.get("CPU Affinity", ""))
    return found


def _whole(config: dict[str, Any], *names: str) -> int:
    values = (config.get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)


def model_facts(config: Any, weight_bytes: int) -> ModelFacts:
    """Return what a model's config.json says about its language part (vision models nest that)."""
    root = config if isinstance(config, dict) else {}
    nested = root.get("llm_config") or root.get("text_config")
    text = nested if isinstance(nested, dict) else root
    heads = _whole(text, "num_attention_heads")
    hidden = _whole(text, "hidden_size")
    return {
        "exists": True,
        "weight_bytes": weight_bytes,
        "layers": _whole(text, "num_hidden_layers"),
        "heads": heads,
        "kv_heads": _whole(text, "num_key_value_heads") or heads,
        "head_dim": _whole(text, "head_dim") or (hidden // heads if heads else 0),
        "max_session": _whole(text, "max_position_embeddings"),
    }
