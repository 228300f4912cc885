#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Have conda from one pinned installer, whole or not at all."""

from __future__ import annotations

DOCUMENTATION = r"""
module: conda_installation
short_description: Have conda from a pinned installer
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Fetches a Miniconda installer, checks its SHA-256 and runs it in batch mode, which accepts the licence of the
    installer itself. The terms of a channel are never accepted here.
  - What is on the disk decides. A marker, written last, names the installer; conda, its Python and its history must be
    there. An interrupted installation is repaired, one made by hand that works is left as it is.
  - A failed first installation is removed. A folder that holds other things than conda is never touched.
options:
  prefix:
    description: Folder of the installation.
    type: path
    default: /opt/miniconda3
  state:
    description: V(absent) removes the installation, unless there are environments in it.
    type: str
    choices: [present, absent]
    default: present
  url:
    description: Address of the installer, http, https or file. Needed for O(state=present).
    type: str
  sha256:
    description: SHA-256 of the installer, 64 hexadecimal digits. Needed for O(state=present).
    type: str
  profile:
    description: File that login shells read, such as C(/etc/profile.d/conda.sh), made to bring C(conda) to everyone.
      None by default. A link of that name is replaced, not followed. V(absent) removes it when it is about this
      installation.
    type: path
  timeout_seconds:
    description: Seconds that the installer may run, and that the network may stay silent.
    type: int
    default: 1800
attributes:
  check_mode:
    description: Says whether it would install or remove, and changes nothing.
    support: full
  diff_mode:
    description: Names the installer before and after.
    support: full
"""

EXAMPLES = r"""
- name: Have conda
  selfhost.lmdeploy.conda_installation:
    url: https://mirror.example.org/Miniconda3-py311_26.7.1-1-Linux-x86_64.sh
    sha256: a6f98e6e19d5b7897ae887cd6af931eb863459f86ffd1a09cc370124cab0993e
"""

RETURN = r"""
prefix:
  description: Folder of the installation.
  type: str
  returned: always
kept:
  description: Environments that kept V(absent) from removing the installation.
  type: list
  elements: str
  returned: O(state=absent)
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import open_url
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.progress import Flow, told
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.settled import (
    MARKER,
    PROFILE,
    has_profile,
    is_whole,
    unfinished,
)

# Content of the file beside the prefix while a first installation runs.
FIRST = "first"
LOCK = Path("/run/lock/selfhost-conda-installation.lock")
SHOWN_LINES = 15
CHUNK_BYTES = 1 << 20
TRIES = 3


class InstallError(Exception):
    """A failure with its cause and its way out in one message."""


class Installation:
    """One conda installation on this host."""

    def __init__(self, module: AnsibleModule) -> None:
        """Take the task's parameters."""
        self.module = module
        self.prefix = Path(module.params["prefix"])
        self.begun = unfinished(self.prefix)
        self.profile = Path(module.params["profile"]) if module.params["profile"] else None
        self.timeout_seconds: int = module.params["timeout_seconds"]

    # -- what is there ------------------------------------------------------------------

    def installed(self) -> str | None:
        """Return the SHA-256 of the installer that a whole installation came from; '' when it is not known."""
        if not is_whole(self.prefix):
            return None
        try:
            return str(json.loads((self.prefix / MARKER).read_text(encoding="utf-8"))["sha256"])
        except (OSError, ValueError, KeyError):
            # The installer keeps its temporary files here until it is done.
            is_done = not (self.prefix / "install_tmp").exists()
            return "" if is_done and self.works() else None

    def works(self) -> bool:
        """Tell whether conda answers."""
        command = [str(self.prefix / "bin/conda"), "--version"]
        try:
            done = subprocess.run(command, capture_output=True, check=False, timeout=60, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0

    def environments(self) -> list[str]:
        """List what people or roles keep inside the installation."""
        folders = [self.prefix / "envs", *(self.prefix / "releases").glob("[!.]*")]
        return sorted(str(path) for folder in folders if folder.is_dir() for path in folder.glob("[!.]*"))

    # -- verbs --------------------------------------------------------------------------

    def present(self) -> dict[str, Any]:
        """Have conda from this installer."""
        sha256 = self.module.params["sha256"].lower()
        found = self.installed()
        # One that somebody made by hand works, so it stays.
        is_there = found in {sha256, ""}
        is_known = self.has_profile()
        if not is_there:
            self.refuse_foreign(found)
        if not is_there and not self.module.check_mode:
            with locked(self.timeout_seconds), self.fetched(sha256) as installer:
                # Another run may have installed it while this one waited.
                if self.installed() != sha256:
                    self.install(installer, sha256)
        if not is_known and not self.module.check_mode:
            self.write_profile()
        result: dict[str, Any] = {"changed": not is_there or not is_known, "prefix": str(self.prefix)}
        if result["changed"]:
            result["diff"] = {
                "after": self.described(found if is_there else sha256, is_known=True),
                "after_header": str(self.prefix),
                "before": self.described(found, is_known=is_known),
                "before_header": str(self.prefix),
            }
        return result

    def described(self, installer: str | None, *, is_known: bool) -> str:
        """Say in lines what is installed, for a diff."""
        lines = [] if installer is None else [f"installer {installer or 'unknown'}"]
        lines += [f"profile {self.profile}"] if is_known and self.profile else []
        return "".join(f"{line}\n" for line in lines)

    def has_profile(self) -> bool:
        """Tell whether login shells get conda from this installation, or nobody asked for that."""
        return self.profile is None or has_profile(self.profile, self.prefix)

    def write_profile(self) -> None:
        """Give conda to login shells."""
        if self.profile is None:
            return
        new = self.profile.with_name(f".{self.profile.name}.new")
        new.write_text(PROFILE.format(prefix=self.prefix), encoding="utf-8")
        new.chmod(0o644)
        new.replace(self.profile)

    def refuse_foreign(self, found: str | None) -> None:
        """Stop when the folder holds things that no installer of conda put there."""
        if found or self.begun.exists() or not os.path.lexists(self.prefix):
            return
        if not self.prefix.is_dir():
            raise InstallError(f"{self.prefix} is not a folder: choose another place for conda.")
        names = {path.name for path in self.prefix.iterdir()}
        if names and not names & {"conda-meta", "condabin", "_conda", "install_tmp", MARKER}:
            raise InstallError(
                f"{self.prefix} holds {', '.join(sorted(names)[:5])} and no conda: empty it, or choose another place."
            )

    def absent(self) -> dict[str, Any]:
        """Remove conda unless it holds environments."""
        kept = self.environments()
        if not kept and self.prefix.exists() and not (self.prefix / MARKER).exists():
            # Made by hand: whoever made it may remove it.
            kept = [str(self.prefix)]
        result = {"changed": False, "kept": kept, "prefix": str(self.prefix)}
        if kept:
            return result
        is_there = self.prefix.exists()
        profile = self.profile if self.profile is not None and self.has_profile() else None
        if not self.module.check_mode:
            if profile is not None:
                profile.unlink()
            if is_there:
                self.remove()
        return {**result, "changed": profile is not None or is_there}

    # -- changes ------------------------------------------------------------------------

    def remove(self) -> None:
        """Remove the installation; until all is gone the file beside it says that the rest is not whole."""
        self.begun.write_text(FIRST, encoding="ascii")
        if self.prefix.exists():
            shutil.rmtree(self.prefix)
        self.begun.unlink()

    @contextlib.contextmanager
    def fetched(self, sha256: str) -> Iterator[Path]:
        """Have the installer in a file, checked; it is gone afterwards."""
        with tempfile.TemporaryDirectory(dir=self.module.tmpdir) as folder:
            # The installer wants a name that ends with .sh.
            path = Path(folder) / "miniconda.sh"
            digest = self.fetch(path)
            if digest != sha256:
                raise InstallError(
                    f"The SHA-256 of {without_credentials(self.module.params['url'])} is {digest}, wanted is {sha256}. "
                    "The file was removed and nothing was installed. If you changed the installer, give its published "
                    "SHA-256 with it; if not, the place it came from serves another file."
                )
            yield path

    def fetch(self, path: Path) -> str:
        """Download the installer, three times at most; return its SHA-256."""
        url = self.module.params["url"]
        for attempt in range(1, TRIES + 1):
            digest = hashlib.sha256()
            try:
                with open_url(url, timeout=60, http_agent="selfhost.lmdeploy") as answer, path.open("wb") as stream:
                    say = partial(fetched, path, int(answer.headers.get("Content-Length") or 0), Flow())
                    with told("conda_installation", say):
                        while chunk := answer.read(CHUNK_BYTES):
                            digest.update(chunk)
                            stream.write(chunk)
                return digest.hexdigest()
            except (OSError, ValueError) as error:
                if attempt == TRIES:
                    raise InstallError(
                        f"{without_credentials(url)} can't be fetched ({error}): check the address, the proxy and the "
                        "certificates, or name a copy of the installer that this host reaches."
                    ) from error
                time.sleep(attempt)
        raise AssertionError

    def install(self, installer: Path, sha256: str) -> None:
        """Run the installer; what it leaves is whole, or is removed where nothing was before."""
        if self.prefix.exists() and self.begun.exists() and self.begun.read_text(encoding="ascii") == FIRST:
            # Left by a first run that was cut off, so nobody's work is in it.
            shutil.rmtree(self.prefix)
        is_first = not self.prefix.exists() or not any(self.prefix.iterdir())
        if is_first and self.prefix.exists():
            self.prefix.rmdir()
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self.begun.write_text(FIRST if is_first else "", encoding="ascii")
        (self.prefix / MARKER).unlink(missing_ok=True)
        try:
            self.run(installer, [] if is_first else ["-u"])
            self.finish(sha256)
        except BaseException:
            if is_first:
                self.remove()
            raise
        self.begun.unlink()

    def finish(self, sha256: str) -> None:
        """Prove that conda works, and write the marker."""
        if not self.works():
            raise InstallError(f"The installer ended well, but {self.prefix}/bin/conda does not work.")
        url = without_credentials(self.module.params["url"])
        write_marker(self.prefix / MARKER, {"sha256": sha256, "url": url})

    def run(self, installer: Path, options: list[str]) -> None:
        """Run the installer to its end; its last lines go into the failure."""
        command = ["bash", str(installer), "-b", *options, "-p", str(self.prefix)]
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            start_new_session=True,
        ) as process:
            try:
                output, _errors = process.communicate(timeout=self.timeout_seconds)
            except BaseException as error:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    raise InstallError(f"The installer did not end within {self.timeout_seconds} s.") from error
                raise
        if process.returncode != 0:
            lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
            raise InstallError("\n".join([f"The installer failed ({process.returncode}):", *lines[-SHOWN_LINES:]]))


def fetched(path: Path, total: int, flow: Flow) -> str:
    """Return how far the download is."""
    return f"installer: {flow.text(path.stat().st_size, total)}"


@contextlib.contextmanager
def locked(timeout_seconds: int) -> Iterator[None]:
    """Let one run at a time install on this host."""
    deadline = time.monotonic() + timeout_seconds
    with LOCK.open("a") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InstallError(f"Another run has been installing conda for {timeout_seconds} s.") from None
                time.sleep(0.5)
        yield


def without_credentials(text: str) -> str:
    """Hide user and password in an address."""
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", text)


def write_marker(path: Path, data: dict[str, str]) -> None:
    """Write the marker once everything before it is on the disk."""
    os.sync()
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8") as stream:
        json.dump(data, stream, indent=1, sort_keys=True)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(path)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "prefix": {"type": "path", "default": "/opt/miniconda3"},
            "profile": {"type": "path"},
            "sha256": {"type": "str"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "timeout_seconds": {"type": "int", "default": 1800},
            "url": {"type": "str"},
        },
        required_if=[("state", "present", ("url", "sha256"))],
        supports_check_mode=True,
    )
    # A hardened root's umask would hide conda from the people who use it.
    os.umask(0o022)

    def fail(message: str) -> NoReturn:
        module.fail_json(msg=message)
        raise AssertionError

    if module.params["state"] == "present" and not re.fullmatch(r"[0-9a-fA-F]{64}", module.params["sha256"]):
        fail(f"sha256 {module.params['sha256']!r} is not 64 hexadecimal digits.")
    try:
        installation = Installation(module)
        result = installation.present() if module.params["state"] == "present" else installation.absent()
    except InstallError as error:
        fail(str(error))
    except OSError as error:
        fail(f"Conda at {module.params['prefix']}: {error}")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
