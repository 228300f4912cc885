# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""What a release of an environment is: the lock it is built from, its id, its marker, and which releases may go.

    PREFIX/releases/NAME/ID[-N]/                the environments, built in place; N counts repairs of a damaged one
    PREFIX/releases/NAME/ID[-N]/release.json    the marker, written last
    PREFIX/envs/NAME -> ../releases/NAME/ID     what people activate

Nothing here starts a program or changes a file.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

MARKER = "release.json"
# Raised when a release of an older format could not be used any more: it is part of the id.
FORMAT = 1

REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^\]]*\])?\s*(?:==\s*(?P<version>[^\s;,*]+)|@\s*\S+)"
)
DIST_INFO = re.compile(r"(?P<name>.+?)-(?P<version>[^-]+)\.dist-info")
# Places of packages may stand in a lock; other files may not, since they stay behind on the controller.
LOCK_OPTIONS = (
    "--index-url",
    "-i",
    "--extra-index-url",
    "--find-links",
    "-f",
    "--no-index",
    "--no-binary",
    "--only-binary",
)
PYTHON_LINE = re.compile(r"^#\s*python:\s*(?P<version>[0-9.]+)\s*$", re.MULTILINE)
SHOWN_FAULTS = 5


class LockError(ValueError):
    """A lock that can't be installed as it stands; the text names each fault with its line."""


@dataclass(frozen=True)
class Requirement:
    """One package of a lock."""

    name: str
    version: str | None
    conditional: bool


def logical_lines(text: str) -> list[tuple[int, str]]:
    """Join continued lines and drop comments; each line with the number of its first line."""
    lines: list[tuple[int, str]] = []
    start, held = 0, ""
    for number, raw in enumerate(text.splitlines(), 1):
        line = re.sub(r"(^|\s)#.*$", "", raw).strip()
        start = start if held else number
        if line.endswith("\\"):
            held += line[:-1].strip() + " "
            continue
        whole, held = " ".join((held + line).split()), ""
        if whole:
            lines.append((start, whole))
    if held.strip():
        lines.append((start, " ".join(held.split())))
    return lines


def parse_lock(text: str) -> list[Requirement]:
    """Read a lock: requirements pinned to one version, each with the hashes of its files.

    Raises LockError, which names up to five faults.
    """
    found: list[Requirement] = []
    faults: list[str] = []
    for number, line in logical_lines(text):
        if line.startswith("-"):
            if not line.startswith(LOCK_OPTIONS):
                faults.append(f"line {number}: {line.split()[0]} points to something that is not in the lock")
            continue
        words = [word for word in line.split() if not word.startswith("--hash=")]
        requirement, _semicolon, marker = " ".join(words).partition(";")
        match = REQUIREMENT.fullmatch(requirement.strip())
        if match is None:
            faults.append(f"line {number}: {requirement.strip()} is not pinned to one version with ==")
        elif len(words) == len(line.split()):
            faults.append(f"line {number}: {match['name']} has no --hash")
        else:
            found.append(Requirement(canonical_name(match["name"]), match["version"], bool(marker.strip())))
    if faults:
        more = f" and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise LockError("; ".join(faults[:SHOWN_FAULTS]) + more)
    return found


def lock_python(text: str) -> str | None:
    """Return the Python version that a lock says it was made for, from its line `# python: 3.11`."""
    match = PYTHON_LINE.search(text)
    return match["version"] if match else None


def release_id(lock: str, python_version: str) -> str:
    """Return a release's id: 12 hexadecimal digits over Python version and lock, whose comments do not count."""
    content = [FORMAT, python_version, [line for _number, line in logical_lines(lock)]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def canonical_name(name: str) -> str:
    """Spell a package's name as indexes do."""
    return re.sub(r"[-_.]+", "-", name).lower()


def canonical_version(version: str) -> tuple[tuple[int | str, ...], str]:
    """Reduce a version to what counts, so that 2024.07, 2024.7 and 2024.7.0 compare equal."""
    aliases = {"alpha": "a", "beta": "b", "c": "rc", "pre": "rc", "preview": "rc", "rev": "post", "r": "post"}
    public, _plus, local = version.lower().removeprefix("v").partition("+")
    epoch, bang, rest = public.rpartition("!")
    parts: list[int | str] = [
        int(part) if part.isdigit() else aliases.get(part, part) for part in re.findall(r"[0-9]+|[a-z]+", rest)
    ]
    end = next((index for index, part in enumerate(parts) if isinstance(part, str)), len(parts))
    release, suffix = parts[:end], parts[end:]
    while len(release) > 1 and release[-1] == 0:
        release.pop()
    words: list[int | str] = []
    for index, part in enumerate(suffix):
        words.append(part)
        is_numbered = index + 1 < len(suffix) and isinstance(suffix[index + 1], int)
        if isinstance(part, str) and not is_numbered:
            # A bare "a" means "a0".
            words.append(0)
    return (int(epoch) if bang else 0, *release, *words), re.sub(r"[-_]", ".", local)


def installed_versions(entries: Iterable[str]) -> dict[str, list[str]]:
    """Read names and versions of the installed packages from the names in a site-packages folder."""
    found: dict[str, list[str]] = {}
    for entry in sorted(entries):
        match = DIST_INFO.fullmatch(entry)
        if match is not None:
            found.setdefault(canonical_name(match["name"]), []).append(match["version"])
    return found


def deviations(wanted: Iterable[Requirement], installed: Mapping[str, Collection[str]]) -> list[str]:
    """Say where an environment is not what its lock says."""
    found: list[str] = []
    for requirement in wanted:
        versions = installed.get(requirement.name, [])
        if not versions:
            if not requirement.conditional:
                found.append(f"{requirement.name} is missing")
        elif requirement.version is not None and [*map(canonical_version, versions)] != [
            canonical_version(requirement.version)
        ]:
            found.append(f"{requirement.name} is {' and '.join(versions)}, the lock says {requirement.version}")
    return found


def read_marker(folder: Path) -> dict[str, Any] | None:
    """Read a release's marker; None when there is none, or none that says what it must."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    keys = {"id", "format", "created", "packages", "locked", "site_packages", "entries", "programs"}
    if not isinstance(marker, dict) or marker.get("format") != FORMAT or not keys <= marker.keys():
        return None
    return marker


def damage(folder: Path, marker: Mapping[str, Any]) -> str | None:
    """Say what a complete release has lost since, by the names in its folders; None when all is there."""
    wanted = {
        folder / "bin": marker["programs"],
        folder / marker["site_packages"]: marker["entries"],
        folder / "conda-meta": ["history"],
    }
    for place, names in wanted.items():
        try:
            lost = sorted(set(names) - {path.name for path in place.iterdir()})
        except OSError as error:
            return f"{place} can't be read: {error.strerror}"
        if lost:
            return f"{place} lost {', '.join(lost[:SHOWN_FAULTS])}"
    # A link to nothing is in the listing all the same.
    return None if (folder / "bin" / "python").exists() else f"{folder}/bin/python can't be started"


def releases(home: Path) -> list[Path]:
    """List the folders of an environment's releases, whole or not."""
    try:
        return sorted(path for path in home.iterdir() if path.is_dir() and not path.is_symlink())
    except FileNotFoundError:
        return []


def complete_release(home: Path, identity: str) -> tuple[Path, dict[str, Any]] | None:
    """Find a whole release by its id."""
    for folder in releases(home):
        if folder.name == identity or re.fullmatch(rf"{re.escape(identity)}-[0-9]+", folder.name):
            marker = read_marker(folder)
            if marker is not None and damage(folder, marker) is None:
                return folder, marker
    return None


def folder_for(home: Path, identity: str, used: Collection[Path]) -> Path:
    """Choose the folder for a build: the id's own, or a numbered one beside a damaged release or one in use."""
    folder, number = home / identity, 2
    while folder in used or read_marker(folder) is not None:
        folder, number = home / f"{identity}-{number}", number + 1
    return folder


def surplus(home: Path, current: Path, used: Collection[Path], kept: int) -> list[Path]:
    """Name the releases that may go: rubbish without a marker, damaged ones, and whole ones beyond the newest `kept`.

    Never the current one (which counts as kept) and never one in use.
    """
    whole: list[tuple[str, Path]] = []
    rubbish: list[Path] = []
    for folder in releases(home):
        marker = read_marker(folder)
        if folder == current:
            continue
        if marker is None or damage(folder, marker) is not None:
            rubbish.append(folder)
        else:
            whole.append((str(marker["created"]), folder))
    old = [folder for _age, folder in sorted(whole, reverse=True)[max(kept - 1, 0) :]]
    return [folder for folder in sorted([*rubbish, *old]) if folder not in used]


def folders_in_use(home: Path, proc: Path = Path("/proc")) -> dict[Path, list[int]]:
    """Find the releases that running processes started from or stand in, with the processes' ids."""
    found: dict[Path, list[int]] = {}
    prefix = f"{home}/"
    for process in proc.glob("[0-9]*"):
        for name in ("exe", "cwd"):
            try:
                target = str((process / name).readlink())
            except OSError:
                # It ended meanwhile, or is the kernel's.
                continue
            if target.startswith(prefix):
                folder = home / target[len(prefix) :].split("/", 1)[0]
                found.setdefault(folder, []).append(int(process.name))
    return {folder: sorted(set(pids)) for folder, pids in found.items()}


def package_lines(packages: Mapping[str, str]) -> str:
    """Write packages as a lock would, without hashes: what a diff shows."""
    return "".join(f"{name}=={version}\n" for name, version in sorted(packages.items()))
