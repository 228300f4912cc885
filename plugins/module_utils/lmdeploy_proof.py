# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""What must hold of an environment with LMDeploy before a service may use it, judged from its files alone.

LMDeploy asks for CUDA 12 libraries, torch for those that it was built with. Where they differ, two packages own the
same libnccl.so.2, and the order of installation decides which one the engine loads. So each is to be there once.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

# Found in the environment, or the engine loads another one than the lock names.
LIBRARIES = ("libcublas.so", "libcublasLt.so", "libcudart.so", "libnccl.so")
# The driver's own library: it comes with the driver and not in a package.
DRIVER_LIBRARY = "libcuda.so.1"
# Since CUDA 13 these carry no release in their names.
UNNUMBERED = re.compile(r"nvidia-(cublas|cuda-[a-z-]+|cufft|cufile|curand|cusolver|cusparse|nvjitlink|nvtx)")


def owners(site_packages: Path, name: str) -> dict[str, list[str]]:
    """Return which packages say that they own files called ``name``: path below the environment, packages."""
    found: dict[str, list[str]] = {}
    for record in sorted(site_packages.glob("*.dist-info/RECORD")):
        text = record.read_text(encoding="utf-8")
        if name not in text:
            continue
        for row in csv.reader(text.splitlines()):
            if row and row[0].rsplit("/", 1)[-1] == name:
                found.setdefault(row[0], []).append(record.parent.name.removesuffix(".dist-info"))
    return found


def cuda_releases(site_packages: Path) -> dict[str, list[str]]:
    """Return the CUDA packages by the release of CUDA in their names, such as ``{"cu12": ["nvidia-nccl-cu12"]}``."""
    found: dict[str, list[str]] = {}
    for folder in sorted(site_packages.glob("nvidia_*.dist-info")):
        name = folder.name.split("-")[0].replace("_", "-")
        match = re.search(r"-(cu\d+)$", name)
        if match or UNNUMBERED.fullmatch(name):
            found.setdefault(match[1] if match else "cu13", []).append(name)
    return found


def loaded(ldd: str) -> tuple[dict[str, str], list[str]]:
    """Return what ``ldd`` printed: path of each library, and the libraries that were not found."""
    paths, missing = {}, []
    for line in ldd.splitlines():
        match = re.match(r"\s*(\S+) => (not found|\S+)", line)
        if match and match[2] == "not found":
            missing.append(match[1])
        elif match:
            paths[match[1]] = match[2]
    return paths, missing


def library_faults(prefix: Path, site_packages: Path, ldd: str) -> list[str]:
    """Return what is wrong with the libraries of an environment, a sentence each; an empty list is the proof."""
    faults = []
    releases = cuda_releases(site_packages)
    if len(releases) > 1:
        sets = "; ".join(f"{release}: {', '.join(names)}" for release, names in sorted(releases.items()))
        faults.append(f"it mixes CUDA releases ({sets})")
    nccl = owners(site_packages, "libnccl.so.2")
    copies = [str(path) for path in prefix.glob("lib/**/libnccl.so.2")]
    holders = sorted({package for packages in nccl.values() for package in packages})
    if len(holders) != 1 or len(copies) != 1:
        faults.append(
            f"libnccl.so.2 must be there once, with one owner, but {', '.join(copies) or 'no file'} belongs to "
            f"{', '.join(holders) or 'no package'}"
        )
    paths, missing = loaded(ldd)
    lost = [name for name in missing if name != DRIVER_LIBRARY]
    if lost:
        faults.append(f"TurboMind's library does not find {', '.join(sorted(lost))}")
    for name, path in sorted(paths.items()):
        if name.startswith(LIBRARIES) and not Path(path).resolve().is_relative_to(prefix.resolve()):
            faults.append(f"TurboMind would load {name} from {path}, which is outside the environment")
    return faults
