"""Tells where a host differs from another that was left undisturbed, and where the moments of faults lie."""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

State = dict[str, Any]

# Content that is another on every host, each for its reason; that such a file is there, whose it is and who may read it
# is compared all the same.
OWN_CONTENT = (
    r"/etc/api-server/api-key",  # generated
    r"/etc/open-webui/(secret-key|admin-password|admin\.json|open-webui\.env)",  # generated, or holds what was
    r"/etc/gateway/(private/.*|keys\.map|ca\.crt|gateway\.pem)",  # generated keys, their digests and certificates
    r"/etc/machine-id",
    r"/etc/(passwd|group|shadow|gshadow)",  # numbers and days; the names are compared by themselves
    r"/etc/ld\.so\.cache",
    r".*/conda-meta/(history|.*\.json)",  # says when it was made
    r".*/(release|\.installer)\.json",  # says when it was made
    r"/etc/api-server/releases/.*\.json",  # says when it was judged, and how long that took
    r"/var/lib/(api-server|open-webui|haproxy)/.*",  # what a service writes while it runs
    r"/var/lib/models/.*\.json",  # says when it was fetched
    r"/var/backups/.*",
    # The stand-in's package cache (rattler's) counts in here how often a package was unpacked: once more after a cut.
    r"/opt/miniconda3/pkgs/[^/]+\.lock",
)
# Paths whose being there depends on time alone.
OWN_PATHS = (
    r"/etc/(passwd|group|shadow|gshadow|subuid|subgid)-",  # backups that the account tools make
    r"/etc/\.pwd\.lock",
    r"/var/lib/(api-server|open-webui)/.*",  # what a service writes while it runs
    r"/var/cache/(api-server|open-webui)/.*",
    r"/var/backups/.*",
    r".*\.pyc",
    # What conda was unpacking into its cache when the power was cut: its own half packages, which it never reads and
    # `conda clean` removes. Known names would tie the role to the inside of conda, so it leaves them there.
    r"/opt/miniconda3/pkgs/\.[^/]+(/.*)?",
)
# Units that come and go by themselves.
OWN_UNITS = r"(systemd-|apt-daily|dpkg-db-backup|e2scrub|fstrim|user@|user-runtime-dir@|session-|run-|serial-getty).*"


def matches(patterns: tuple[str, ...], path: str) -> bool:
    """Tell whether a path is one of those."""
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def differences(wanted: State, found: State) -> list[str]:
    """Say where a host is not as the undisturbed one; nothing when it is."""
    told = []
    for path in sorted({*wanted["files"], *found["files"]}):
        if matches(OWN_PATHS, path):
            continue
        before, after = wanted["files"].get(path), found["files"].get(path)
        if before is None or after is None:
            told.append(f"{path} is {'missing' if after is None else 'there, and should not be'}")
            continue
        for word, first, second in zip(("mode", "owner", "group", "content"), before, after, strict=True):
            if first != second and not (word == "content" and matches(OWN_CONTENT, path)):
                told.append(f"{path}: {word} {second}, wanted {first}")
    for unit in sorted({*wanted["units"], *found["units"]}):
        first, second = wanted["units"].get(unit, "not there"), found["units"].get(unit, "not there")
        if first != second and not re.fullmatch(OWN_UNITS, unit):
            told.append(f"unit {unit}: {second}, wanted {first}")
    for word in ("packages", "accounts"):
        told += [f"{word.removesuffix('s')} {line} is missing" for line in wanted[word] if line not in found[word]]
        told += [f"{word.removesuffix('s')} {line} is too much" for line in found[word] if line not in wanted[word]]
    told += [
        f"server {name} of the gateway: {found['servers'].get(name, 'not there')}, wanted {word}"
        for name, word in wanted["servers"].items()
        if found["servers"].get(name) != word
    ]
    if found["answer"] != wanted["answer"]:
        told.append(f"the model's answer: {found['answer']!r}, wanted {wanted['answer']!r}")
    return told


@dataclass(frozen=True)
class Moment:
    """A moment of a run: so many seconds after its nth task began, or after the run did where that is 0.

    Seconds of the run alone would miss its last tasks where the machine is busier than it was in the undisturbed run.
    """

    task: int
    seconds: float


def moments(count: int, seconds: float, starts: list[float], seed: int) -> list[Moment]:
    """Return random moments of a run, one in each of equal parts of it, so that the whole run is covered."""
    chance = random.Random(seed)  # noqa: S311  # repeatable on purpose
    found = []
    for part in range(count):
        at = seconds * (part + chance.random()) / count
        task = bisect_right(starts, at)
        found.append(Moment(task, round(at - (starts[task - 1] if task else 0.0), 2)))
    return found
