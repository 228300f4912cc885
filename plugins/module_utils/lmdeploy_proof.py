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

# Found in the environment, once, or the engine loads another one than the lock names. TurboMind's library asks for all.
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


def cuda_libraries(paths: dict[str, str]) -> dict[str, str]:
    """Return those of the loaded libraries that must come from the environment: name, path."""
    return {name: path for name, path in sorted(paths.items()) if name.startswith(LIBRARIES)}


def providers(site_packages: Path, ldd: str) -> dict[str, str]:
    """Return which package, with its version, brings each CUDA library that TurboMind loads."""
    found = {}
    for name in cuda_libraries(loaded(ldd)[0]):
        packages = sorted({package for holders in owners(site_packages, name).values() for package in holders})
        named = (package.rpartition("-") for package in packages)
        found[name] = ", ".join(f"{package.replace('_', '-')} {version}" for package, _dash, version in named)
    return found


def library_faults(prefix: Path, site_packages: Path, ldd: str) -> list[str]:
    """Return what is wrong with the libraries of an environment, a sentence each; an empty list is the proof."""
    faults = []
    releases = cuda_releases(site_packages)
    if len(releases) > 1:
        sets = "; ".join(f"{release}: {', '.join(names)}" for release, names in sorted(releases.items()))
        faults.append(f"it mixes CUDA releases ({sets})")
    paths, missing = loaded(ldd)
    lost = [name for name in missing if name != DRIVER_LIBRARY]
    # What ldd did not even mention is as bad: it judged nothing, or TurboMind came without it.
    lost += [f"{name}*" for name in LIBRARIES if not any(each.startswith(name) for each in [*paths, *missing])]
    if lost:
        faults.append(f"TurboMind's library does not find {', '.join(sorted(lost))}")
    there = sorted(str(copy) for copy in prefix.glob("lib/**/lib*.so.*"))
    for name, path in cuda_libraries(paths).items():
        if not Path(path).resolve().is_relative_to(prefix.resolve()):
            faults.append(f"TurboMind would load {name} from {path}, which is outside the environment")
        copies = [copy for copy in there if copy.endswith(f"/{name}")]
        holders = sorted({package for packages in owners(site_packages, name).values() for package in packages})
        if len(holders) != 1 or len(copies) != 1:
            faults.append(
                f"{name} must be there once, with one owner, but {', '.join(copies) or 'no file'} belongs to "
                f"{', '.join(holders) or 'no package'}"
            )
    if not any(prefix.glob("include/python3*/Python.h")):
        faults.append("its Python has no Python.h, which Triton needs to compile what the PyTorch backend runs")
    return faults
