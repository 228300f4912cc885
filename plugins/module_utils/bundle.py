# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""The layout of a bundle: a folder from which a host installs everything without a network. Standard library only.

``simple/`` is a Python package index and ``wheels/`` its files, ``conda/`` a conda channel, ``installers/`` holds
conda's installer, ``apt/`` is a package source of the distribution, ``models/`` holds models as ORG--NAME,
``controller/`` the collection. ``manifest.json`` names every file with its size and SHA-256.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FORMAT = 1
MANIFEST = "manifest.json"
# Where the connected machine works; no host needs it.
WORK = ".work"
ORIGIN = "selfhost-bundle"
CHUNK_BYTES = 1 << 20
# What a channel's index tells of a package, out of all that an installed package's record holds.
RECORD_KEYS = (
    "arch", "build", "build_number", "constrains", "depends", "features", "license", "license_family", "md5", "name",
    "noarch", "platform", "python_site_packages_path", "sha256", "size", "subdir", "timestamp", "track_features",
    "version",
)  # fmt: skip


class BundleError(Exception):
    """A failure with its cause and its way out in one message."""


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def project_name(file: str) -> str:
    """Return the normalised project name of a wheel or source archive."""
    stem = file.split("-")[0] if file.endswith(".whl") else re.sub(r"\.(tar\.\w+|zip)$", "", file).rpartition("-")[0]
    return re.sub(r"[-_.]+", "-", stem).lower()


def index_pages(hashes: Mapping[str, str]) -> dict[str, str]:
    """Return the pages of a package index by path, for files named with their SHA-256. pip and uv read it as file://."""
    projects: dict[str, list[str]] = defaultdict(list)
    for file in sorted(hashes):
        projects[project_name(file)].append(file)
    pages = {}
    for project, files in projects.items():
        links = "".join(
            f'<a href="../../wheels/{quote(file)}#sha256={hashes[file]}">{html.escape(file)}</a><br>\n'
            for file in files
        )
        pages[f"simple/{project}/index.html"] = f"<!DOCTYPE html>\n<html><body>\n{links}</body></html>\n"
    names = "".join(f'<a href="{project}/">{project}</a><br>\n' for project in sorted(projects))
    pages["simple/index.html"] = f"<!DOCTYPE html>\n<html><body>\n{names}</body></html>\n"
    return pages


def channel_indexes(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the index of a conda channel for each platform, by path, from the records of installed packages."""
    indexes: dict[str, dict[str, Any]] = {
        subdir: {"info": {"subdir": subdir}, "packages": {}, "packages.conda": {}, "repodata_version": 1}
        for subdir in ("linux-64", "noarch")
    }
    for record in records:
        entry = {key: record[key] for key in RECORD_KEYS if record.get(key) is not None}
        kind = "packages.conda" if record["fn"].endswith(".conda") else "packages"
        empty = {"info": {"subdir": record["subdir"]}, "packages": {}, "packages.conda": {}, "repodata_version": 1}
        indexes.setdefault(record["subdir"], empty)[kind][record["fn"]] = entry
    return {
        f"conda/{subdir}/repodata.json": json.dumps(index, sort_keys=True) + "\n" for subdir, index in indexes.items()
    }


def release_file(packages: bytes) -> str:
    """Return the Release file of the apt source, which names the one list that it has."""
    digest = hashlib.sha256(packages).hexdigest()
    return f"Origin: {ORIGIN}\nLabel: {ORIGIN}\nSuite: bundle\nSHA256:\n {digest} {len(packages)} Packages\n"


def files_of(folder: Path) -> list[str]:
    """Return the paths of a bundle's files, without the manifest and what only the connected machine needs."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in found if path.parts[0] not in {WORK, MANIFEST})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a bundle's manifest; raises BundleError where there is none of this format."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(
            f"mirrors_bundle_dir is {folder}, and {path} can't be read ({error.strerror}): copy the whole folder that "
            "playbooks/bundle.yml made to that place on the host."
        ) from error
    except ValueError as error:
        raise BundleError(f"{path} is damaged ({error}): copy the bundle again.") from error
    if manifest.get("format") != FORMAT:
        raise BundleError(f"{path} has the format {manifest.get('format')!r}, known is {FORMAT}: make the bundle anew.")
    return dict(manifest)


def stamp_of(path: Path) -> list[int]:
    """Return what changes when a file is written to."""
    about = path.stat()
    return [about.st_size, about.st_mtime_ns, about.st_ino]


def verify(folder: Path, manifest: Mapping[str, Any], known: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return what is wrong with the bundle's files, each by name, and stamps of those that are right.

    A file whose stamp and digest are among the known ones is not read again.
    """
    faults: list[str] = []
    stamps: dict[str, Any] = {}
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{path} is missing")
            continue
        stamp = [entry["sha256"], *stamp_of(path)]
        if known.get(str(path)) != stamp:
            if stamp[1] != entry["size"]:
                faults.append(f"{path} has {stamp[1]} bytes, {entry['size']} are wanted")
                continue
            digest = sha256_of(path)
            if digest != entry["sha256"]:
                faults.append(f"{path} is damaged: its SHA-256 is {digest}, {entry['sha256']} is wanted")
                continue
        stamps[str(path)] = stamp
    return faults, stamps
