# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""What can be seen to be as wanted by looking at a few files: certificates, conda, packages of the distribution.

The modules that bring these use it, and host_survey, so that a run on a converged host need not call those modules.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

CERTIFICATES = Path("/usr/local/share/ca-certificates")
BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----\s.*?\s-----END CERTIFICATE-----", re.DOTALL)
MARKER = ".installer.json"
PROFILE = """# Managed by Ansible (selfhost.lmdeploy): `conda` and `conda activate` for everyone.
if [ -r {prefix}/etc/profile.d/conda.sh ]; then
    . {prefix}/etc/profile.d/conda.sh
fi
"""


# -- certificates -----------------------------------------------------------------------------------------------------


def read(path: Path) -> str:
    """Return a file's text, empty when there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def split_certificates(text: str) -> list[str]:
    """Return the certificates of a PEM text, each with a newline at its end."""
    return [match.group().replace("\r", "") + "\n" for match in CERTIFICATE.finditer(text)]


def is_trusted(certificates: list[str], bundle: str) -> bool:
    """Tell whether a bundle holds all certificates."""
    return set(certificates) <= set(split_certificates(bundle))


def certificate_files(name: str, certificates: list[str]) -> dict[Path, str]:
    """Return the files that hold certificates under a name, with their texts."""
    return {CERTIFICATES / f"{name}-{number}.crt": block for number, block in enumerate(certificates, 1)}


def present_files(name: str) -> dict[Path, str]:
    """Return the files of a name that are there."""
    return {path: read(path) for path in sorted(CERTIFICATES.glob(f"{name}-*.crt"))}


def trusts(name: str, pem: str) -> bool:
    """Tell whether the host trusts these certificates under this name, and no others under it."""
    certificates = split_certificates(pem)
    return present_files(name) == certificate_files(name, certificates) and is_trusted(certificates, read(BUNDLE))


# -- conda ------------------------------------------------------------------------------------------------------------


def unfinished(prefix: Path) -> Path:
    """Return the file that tells an interrupted run; beside the prefix, which the installer wants to make itself."""
    return prefix.with_name(f".{prefix.name}.installing")


def is_whole(prefix: Path) -> bool:
    """Tell whether nothing of conda is missing and no installation was cut off."""
    needed = (prefix / "bin/conda", prefix / "bin/python", prefix / "conda-meta/history")
    return not unfinished(prefix).exists() and all(path.exists() for path in needed)


def has_profile(profile: Path, prefix: Path) -> bool:
    """Tell whether login shells get conda from this installation."""
    try:
        is_ours = profile.read_text(encoding="utf-8") == PROFILE.format(prefix=prefix)
    except (OSError, ValueError):
        return False
    return is_ours and not profile.is_symlink()


def has_conda(prefix: str, sha256: str, profile: str) -> bool:
    """Tell whether conda is there, made by the installer with this SHA-256, and known to login shells."""
    place = Path(prefix)
    try:
        made = json.loads((place / MARKER).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(made == sha256.lower()) and is_whole(place) and has_profile(Path(profile), place)


# -- packages ---------------------------------------------------------------------------------------------------------


def parse_states(names: list[str], text: str) -> dict[str, str]:
    """Return dpkg's word for each package: `installed`, `unpacked`, `half-configured` and so on."""
    found = dict.fromkeys(names, "not-installed")
    for words in (line.split() for line in text.splitlines()):
        # With several architectures one that is whole is enough.
        if len(words) == 2 and words[0] in found and found[words[0]] != "installed":
            found[words[0]] = words[1]
    return found


def states_command(names: list[str]) -> list[str]:
    """Return the command whose output ``parse_states`` reads; it ends with 1 where it does not know one of them."""
    return ["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\n", *names]


def installed_packages(names: list[str]) -> list[str]:
    """Return which of the packages are installed."""
    try:
        done = subprocess.run(states_command(names), capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return []
    return [name for name, state in parse_states(names, done.stdout).items() if state == "installed"]
