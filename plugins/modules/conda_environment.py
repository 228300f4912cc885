#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Have a conda environment that is exactly its lock, as a release that is built aside and switched by one link."""

from __future__ import annotations

DOCUMENTATION = r"""
module: conda_environment
short_description: Have a conda environment that is exactly its lock
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - An environment is a series of releases. Each is built once from a lock at C(PREFIX/releases/NAME/ID) and never
    changed; C(PREFIX/envs/NAME), what people activate, is a link to the current one.
  - conda gives the release its Python; uv (or pip) installs the lock, every file checked against its hash. The versions
    installed are compared with the lock before the release counts as complete.
  - A host that has the release is recognised by its marker and by the names in its folders, in one call. An interrupted
    build is made again; a release that lost packages is replaced by a new one beside it, since it may be running.
  - A build that fails leaves nothing behind, and the current release as it was.
  - Two runs at once on one host take turns.
options:
  name:
    description: Name of the environment.
    type: str
    required: true
  state:
    description: V(present) builds the release if need be, and switches to it when O(switched) is true. V(switched)
      switches to a release that must be there. V(absent) removes the environment with all its releases.
    type: str
    choices: [present, switched, absent]
    default: present
  conda_prefix:
    description: Folder of the conda installation.
    type: path
    default: /opt/miniconda3
  python_version:
    description: Python of the environment.
    type: str
    default: '3.11'
  lock:
    description: Hashed requirements file on the controller, as C(uv pip compile --generate-hashes) writes it. Empty
      means Python and pip alone. It travels to the host only for a build.
    type: path
  installer:
    description: Program that installs the lock.
    type: str
    choices: [uv, pip]
    default: uv
  uv_lock:
    description: Hashed requirements file on the controller that pins uv itself; conda's own pip installs it into
      C(PREFIX/opt/uv-VERSION). Needed for O(installer=uv).
    type: path
  cache_dir:
    description: Cache of downloaded packages. On the file system of O(conda_prefix) uv links files from it instead of
      copying them. By default C(PREFIX/pkgs/uv).
    type: path
  channels:
    description: Channels that Python comes from, names or URLs; no other channel is asked.
    type: list
    elements: str
    default: [conda-forge]
  compiled:
    description: Whether modules are compiled to bytecode while building. Services can't do it later, since they may not
      write into the environment, and would compile in memory at each start.
    type: bool
    default: true
  switched:
    description: Whether O(state=present) also makes the release the current one.
    type: bool
    default: true
  release:
    description: Id of the release to switch to with O(state=switched), 12 hexadecimal digits. By default the release
      of O(lock).
    type: str
  keep_releases:
    description: Number of releases that stay after a switch, the current one included. One that a process runs from
      stays in any case.
    type: int
    default: 3
  kept_by:
    description: Glob patterns of links; what they lead to stays, whatever their number. By default the links that
      releases of engines hold.
    type: list
    elements: str
    default: [/etc/api-server/releases/*/*/environment]
  timeout_seconds:
    description: Seconds that each program, and the wait for another run on this host, may take.
    type: int
    default: 3600
attributes:
  check_mode:
    description: Says what it would build, switch and remove, and changes nothing.
    support: full
  diff_mode:
    description: Shows the packages of the current and of the new release.
    support: full
"""

EXAMPLES = r"""
- name: Have the environment of an application
  selfhost.lmdeploy.conda_environment:
    name: app
    lock: "{{ role_path }}/files/locks/app.txt"
    uv_lock: "{{ role_path }}/files/locks/uv.txt"

- name: Go back to an earlier release
  selfhost.lmdeploy.conda_environment:
    name: app
    state: switched
    release: 0f3c5a7e9b1d
"""

RETURN = r"""
release:
  description: Id of the release.
  type: str
  returned: unless O(state=absent)
prefix:
  description: Folder of the release, links resolved. In check mode the folder that a build would make.
  type: str
  returned: unless O(state=absent)
link:
  description: The link that people activate.
  type: str
  returned: always
current_prefix:
  description: Folder of the release that the link led to before this call, empty without one.
  type: str
  returned: unless O(state=absent)
built:
  description: Whether this call built the release, or would have in check mode.
  type: bool
  returned: unless O(state=absent)
packages:
  description: Version of each installed Python package by name. Empty in check mode for a release not yet built.
  type: dict
  returned: unless O(state=absent)
removed:
  description: Folders of releases that were removed.
  type: list
  elements: str
  returned: always
seconds:
  description: Seconds that the build took, 0 without one.
  type: float
  returned: unless O(state=absent)
"""

import contextlib
import ctypes
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.conda_releases import (
    FORMAT,
    MARKER,
    Requirement,
    complete_release,
    deviations,
    folder_for,
    folders_in_use,
    installed_versions,
    package_lines,
    parse_lock,
    read_marker,
    releases,
    surplus,
)
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.kept_links import kept
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.progress import told

SHOWN_LINES = 15
# Settings of the tools that would change what is built or wait for somebody to answer.
TOOL_ENVIRONMENT = {
    "LC_ALL": "C.UTF-8",
    "NO_COLOR": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_INPUT": "1",
    "PIP_ROOT_USER_ACTION": "ignore",
    "PYTHONNOUSERSITE": "1",
    "UV_NO_PROGRESS": "1",
    "UV_PYTHON_DOWNLOADS": "never",
}


class BuildError(Exception):
    """A failure with its cause and its way out in one message."""


class Environment:
    """One named environment on this host."""

    def __init__(self, module: AnsibleModule) -> None:
        """Take the task's parameters."""
        self.module = module
        parameters: dict[str, Any] = module.params
        self.name: str = parameters["name"]
        self.base = Path(parameters["conda_prefix"])
        self.home = self.base / "releases" / self.name
        self.link = self.base / "envs" / self.name
        self.cache = Path(parameters["cache_dir"] or self.base / "pkgs" / "uv")
        self.deadline_seconds: int = parameters["timeout_seconds"]
        # For the tools: /tmp may be small, or closed to programs, and uv leaves files in it.
        self.scratch = self.base / "releases" / ".tmp"
        self.lock_descriptor: int | None = None

    # -- what is there ------------------------------------------------------------------

    def current(self) -> Path | None:
        """Return the release that the link points to."""
        if not self.link.is_symlink():
            return None
        target = Path(os.path.normpath(self.link.parent / self.link.readlink()))
        return target if target.parent == self.home else None

    def refuse_foreign(self) -> None:
        """Stop when the link's place holds something that this module did not make."""
        if os.path.lexists(self.link) and self.current() is None:
            kind = "a link to another place" if self.link.is_symlink() else "a folder that was made by hand"
            raise BuildError(
                f"{self.link} is {kind}: move it away (or remove it with `conda env remove -p {self.link}`), "
                f"or choose another name than {self.name!r} for the environment."
            )

    # -- verbs --------------------------------------------------------------------------

    def present(self) -> dict[str, Any]:
        """Have the release, and make it the current one if asked."""
        parameters = self.module.params
        identity: str = parameters["release"]
        self.refuse_foreign()
        found = complete_release(self.home, identity)
        if found is None and parameters["lock"] is None:
            # The controller holds the lock, and sends it now.
            return {"changed": False, "lock_needed": True}
        if found is not None and self.is_settled(found[0]):
            return self.answer(identity, *found)
        if self.module.check_mode:
            return self.foretell(identity, found)
        with self.locked():
            # Another run may have built it while this one waited.
            found = complete_release(self.home, identity)
            if found is not None and self.is_settled(found[0]):
                return self.answer(identity, *found)
            before, started = self.shown(self.current()), time.monotonic()
            folder, marker = found or self.build(identity)
            seconds = 0.0 if found else round(time.monotonic() - started, 1)
            removed = self.switch(folder) if parameters["switched"] else []
        result = self.answer(identity, folder, marker)
        result.update(built=found is None, removed=removed, seconds=seconds)
        return self.changed(result, before, self.shown(folder))

    def is_settled(self, folder: Path) -> bool:
        """Tell whether nothing is left to do with a whole release."""
        return not self.module.params["switched"] or self.current() == folder

    def switched(self) -> dict[str, Any]:
        """Make a release that is there the current one."""
        identity: str = self.module.params["release"]
        self.refuse_foreign()
        found = complete_release(self.home, identity)
        if found is None:
            markers = [marker for folder in releases(self.home) if (marker := read_marker(folder))]
            names = ", ".join(sorted({marker["id"] for marker in markers})) or "none"
            raise BuildError(f"{self.home} holds no whole release {identity}. Releases there: {names}.")
        if self.current() == found[0]:
            return self.answer(identity, *found)
        if self.module.check_mode:
            return self.foretell(identity, found)
        with self.locked():
            before = self.shown(self.current())
            removed = self.switch(found[0])
        return self.changed({**self.answer(identity, *found), "removed": removed}, before, self.shown(found[0]))

    def absent(self) -> dict[str, Any]:
        """Remove the environment and all its releases."""
        folders = releases(self.home)
        is_linked = self.current() is not None
        result = {
            "changed": bool(folders or is_linked or self.home.exists()),
            "link": str(self.link),
            "removed": [str(path) for path in folders],
        }
        used = folders_in_use(self.home)
        if used:
            pids = sorted({pid for pids in used.values() for pid in pids})
            raise BuildError(
                f"Environment {self.name!r} is in use by the processes {pids[:SHOWN_LINES]}: stop their services first."
            )
        if not self.module.check_mode and result["changed"]:
            # No lock: conda itself may be gone by now, and with it the releases' folder.
            if is_linked:
                self.link.unlink()
            shutil.rmtree(self.home)
        return result

    # -- answers ------------------------------------------------------------------------

    def answer(self, identity: str, folder: Path, marker: dict[str, Any]) -> dict[str, Any]:
        """Describe a release that is there."""
        return {
            "built": False,
            "changed": False,
            "link": str(self.link),
            "packages": marker["packages"],
            "prefix": str(folder),
            "release": identity,
            "removed": [],
            "seconds": 0.0,
        }

    def foretell(self, identity: str, found: tuple[Path, dict[str, Any]] | None) -> dict[str, Any]:
        """Say in check mode what would happen."""
        before = self.shown(self.current())
        if found is not None:
            return self.changed(self.answer(identity, *found), before, self.shown(found[0]))
        lock = parse_lock(Path(self.module.params["lock"]).read_text(encoding="utf-8"))
        packages = {item.name: item.version or "" for item in lock if not item.conditional}
        folder = folder_for(self.home, identity, folders_in_use(self.home))
        result = {**self.answer(identity, folder, {"packages": packages}), "built": True}
        return self.changed(result, before, (f"release {folder.name}", package_lines(packages)))

    def shown(self, folder: Path | None) -> tuple[str, str]:
        """Return what a diff says of a release: its title, and the packages of its lock."""
        marker = read_marker(folder) if folder is not None else None
        if folder is None or marker is None:
            return "no release", ""
        return f"release {folder.name}", package_lines({name: marker["packages"][name] for name in marker["locked"]})

    def changed(self, result: dict[str, Any], before: tuple[str, str], after: tuple[str, str]) -> dict[str, Any]:
        """Mark an answer as a change and show its difference."""
        difference = {"after_header": f"{self.name}, {after[0]}", "after": after[1]}
        difference.update(before_header=f"{self.name}, {before[0]}", before=before[1])
        return {**result, "changed": True, "diff": difference}

    # -- changes ------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold this conda installation's lock. Programs started under it hold it too, should this process be killed."""
        conda, folder = self.base / "bin" / "conda", self.base / "releases"
        if not os.access(conda, os.X_OK):
            raise BuildError(f"{conda} is missing: install Miniconda first (role selfhost.lmdeploy.miniconda).")
        folder.mkdir(mode=0o755, exist_ok=True)
        deadline = time.monotonic() + self.deadline_seconds
        with (folder / ".lock").open("a") as handle:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise BuildError(
                            f"Another run has been changing environments below {self.base} for "
                            f"{self.deadline_seconds} s: wait for it, or find it with `fuser {handle.name}`."
                        ) from None
                    time.sleep(0.5)
            self.lock_descriptor = handle.fileno()
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir(mode=0o700)
            try:
                yield
            finally:
                shutil.rmtree(self.scratch, ignore_errors=True)
                self.lock_descriptor = None

    def switch(self, folder: Path) -> list[str]:
        """Point the link to a release in one rename; remove releases beyond those to keep, and return them."""
        if self.current() != folder:
            self.link.parent.mkdir(mode=0o755, exist_ok=True)
            new = self.link.with_name(f".{self.link.name}.new")
            new.unlink(missing_ok=True)
            new.symlink_to(os.path.relpath(folder, self.link.parent))
            new.replace(self.link)
        used = {*folders_in_use(self.home), *kept(releases(self.home), self.module.params["kept_by"])}
        removed = surplus(self.home, folder, used, self.module.params["keep_releases"])
        for old in removed:
            remove_release(old)
        return [str(path) for path in removed]

    def build(self, identity: str) -> tuple[Path, dict[str, Any]]:
        """Build a release in place; nothing of it stays when that fails."""
        self.home.mkdir(mode=0o755, exist_ok=True)
        folder = folder_for(self.home, identity, folders_in_use(self.home))
        if folder.exists():
            shutil.rmtree(folder)
        lock = Path(self.module.params["lock"])
        wanted = parse_lock(lock.read_text(encoding="utf-8"))
        try:
            with told("conda_environment", lambda: f"{self.name}: {built(folder, self.cache, wanted)}"):
                self.call(self.create_command(folder), "the channels (mirrors_conda_channels)")
                if wanted:
                    self.call(self.install_command(folder, lock), "the package index (mirrors_pip_index_url)")
            marker = self.marker_for(identity, folder, wanted)
            write_marker(folder, marker)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder, marker

    def create_command(self, folder: Path) -> list[Any]:
        """Return the command that makes an environment with Python and pip."""
        channels = [word for channel in self.module.params["channels"] for word in ("--channel", channel)]
        return [
            self.base / "bin" / "conda", "create", "--prefix", folder, "--override-channels", *channels,
            "--yes", "--quiet", f"python={self.module.params['python_version']}", "pip",
        ]  # fmt: skip

    def install_command(self, folder: Path, lock: Path) -> list[Any]:
        """Return the command that installs the lock."""
        python = folder / "bin" / "python"
        exactly = ["--no-deps", "--require-hashes", "--requirement", lock]
        if self.module.params["installer"] == "pip":
            compiled = "--compile" if self.module.params["compiled"] else "--no-compile"
            return [python, "-m", "pip", "install", "--quiet", compiled, "--cache-dir", self.cache / "pip", *exactly]
        compiled = "--compile-bytecode" if self.module.params["compiled"] else "--no-compile-bytecode"
        uv = self.ensure_uv()
        return [
            uv, "pip", "install", "--quiet", "--python", python, "--break-system-packages", compiled,
            "--cache-dir", self.cache, *exactly,
        ]  # fmt: skip

    def ensure_uv(self) -> Path:
        """Have the pinned uv beside conda; return its path."""
        path = self.module.params["uv_lock"]
        pins = parse_lock(Path(path).read_text(encoding="utf-8")) if path else []
        version = next((pin.version for pin in pins if pin.name == "uv"), None)
        if version is None:
            raise BuildError(
                "uv_lock names no version of uv: give a hashed requirements file, or choose installer pip."
            )
        folder = self.base / "opt" / f"uv-{version}"
        if not (folder / "bin" / "uv").exists():
            new = folder.with_name(f".{folder.name}.new")
            shutil.rmtree(new, ignore_errors=True)
            new.parent.mkdir(mode=0o755, exist_ok=True)
            self.call(
                [self.base / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes",
                 "--only-binary", ":all:", "--cache-dir", self.cache / "pip", "--target", new, "--requirement", path],
                "the package index (mirrors_pip_index_url)",
            )  # fmt: skip
            shutil.rmtree(folder, ignore_errors=True)
            new.rename(folder)
        return folder / "bin" / "uv"

    def marker_for(self, identity: str, folder: Path, wanted: list[Requirement]) -> dict[str, Any]:
        """Describe a release that was just built; it must be what its lock says."""
        site_packages = next(folder.glob("lib/python3.*/site-packages"), None)
        if site_packages is None:
            raise BuildError(f"{folder} has no site-packages folder: is that channel's python a CPython?")
        entries = names_in(site_packages)
        versions = installed_versions(entries)
        faults = deviations(wanted, versions)
        if faults:
            raise BuildError(f"The environment built is not its lock: {'; '.join(faults[:SHOWN_LINES])}.")
        return {
            "created": datetime.now(timezone.utc).isoformat(),
            "entries": entries,
            "format": FORMAT,
            "id": identity,
            "locked": sorted({item.name for item in wanted} & versions.keys()),
            "packages": {name: found[0] for name, found in versions.items()},
            "programs": names_in(folder / "bin"),
            "python_version": self.module.params["python_version"],
            "site_packages": str(site_packages.relative_to(folder)),
        }

    def call(self, command: list[Any], source: str) -> None:
        """Run a program to its end; its last lines, and where it fetches from, go into the failure."""
        words = [str(word) for word in command]
        with subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **TOOL_ENVIRONMENT, "TMPDIR": str(self.scratch)},
            cwd="/",
            start_new_session=True,
            pass_fds=[self.lock_descriptor] if self.lock_descriptor is not None else [],
        ) as process:
            try:
                output, _errors = process.communicate(timeout=self.deadline_seconds)
            except BaseException as error:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    message = f"`{' '.join(words)}` did not end within {self.deadline_seconds} s."
                    raise BuildError(without_credentials(message)) from error
                raise
        if process.returncode != 0:
            lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
            way_out = f"Nothing of the build is left. See that this host reaches {source} and has room, then run again."
            heading = f"`{' '.join(words)}` failed ({process.returncode}):"
            message = "\n".join([heading, *lines[-SHOWN_LINES:], way_out])
            raise BuildError(without_credentials(message))


def built(folder: Path, cache: Path, wanted: list[Requirement]) -> str:
    """Return how far the build of a release is: packages that its installer has fetched or put in place, of all."""
    site_packages = next(folder.glob("lib/python3.*/site-packages"), None)
    if site_packages is None or not wanted:
        return "Python is put in place"
    there = installed_versions(path.name for path in site_packages.iterdir())
    placed = sum(item.name in there for item in wanted)
    if placed == len(wanted):
        return f"{placed} of {placed} packages in place, being compiled"
    # uv unpacks each wheel into its cache first; a link with the version's name tells that it is whole.
    shops = [shop for kind in ("pypi", "index/*") for shop in cache.glob(f"wheels-v*/{kind}")]
    links = ([*shop.glob(f"{item.name}/{item.version}-*")] for item in wanted for shop in shops)
    fetched = sum(any(path.is_dir() for path in found) for found in links)
    return f"{max(fetched, placed)} of {len(wanted)} packages fetched, {placed} in place"


def names_in(folder: Path) -> list[str]:
    """List what a folder holds, without bytecode: anybody may remove that."""
    return sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")


def without_credentials(text: str) -> str:
    """Hide what authenticates in addresses: user and password, and conda's token."""
    text = re.sub(r"(?<=://)[^/@\s]+@", "***@", text)
    return re.sub(r"(?<=/t/)[^/\s]+(?=/)", "***", text)


def remove_release(folder: Path) -> None:
    """Remove a release; the marker goes first, so that an interrupted removal leaves no release that looks whole."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder)


def write_marker(folder: Path, marker: dict[str, Any]) -> None:
    """Declare a release complete once everything it consists of is on the disk, not just in memory."""
    flush_file_system(folder)
    new = folder / f".{MARKER}.new"
    with new.open("w", encoding="utf-8") as stream:
        json.dump(marker, stream, indent=1, sort_keys=True)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(folder / MARKER)
    flush_file_system(folder)


def flush_file_system(folder: Path) -> None:
    """Write out the file system of a folder; Python has no call for that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), f"{folder} can't be written to the disk")
    finally:
        os.close(descriptor)


def check_parameters(parameters: dict[str, Any]) -> None:
    """Refuse what would leave the folders of this module."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", parameters["name"]) or parameters["name"] in {"base", "root"}:
        raise BuildError(f"name {parameters['name']!r} can't name an environment: use letters, digits, dots, dashes.")
    if not re.fullmatch(r"3\.[0-9]+(\.[0-9]+)?", parameters["python_version"]):
        raise BuildError(f"python_version {parameters['python_version']!r} is no version: use one like '3.11'.")
    if parameters["keep_releases"] < 1:
        raise BuildError(f"keep_releases is {parameters['keep_releases']}: at least 1, the current release, stays.")
    if parameters["state"] != "absent" and not re.fullmatch(r"[0-9a-f]{12}", parameters["release"] or ""):
        raise BuildError(f"release {parameters['release']!r} is no id: 12 hexadecimal digits.")


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "cache_dir": {"type": "path"},
            "channels": {"type": "list", "elements": "str", "default": ["conda-forge"]},
            "compiled": {"type": "bool", "default": True},
            "conda_prefix": {"type": "path", "default": "/opt/miniconda3"},
            "installer": {"type": "str", "choices": ["uv", "pip"], "default": "uv"},
            "keep_releases": {"type": "int", "default": 3},
            "kept_by": {"type": "list", "elements": "str", "default": ["/etc/api-server/releases/*/*/environment"]},
            "lock": {"type": "path"},
            "name": {"type": "str", "required": True},
            "python_version": {"type": "str", "default": "3.11"},
            "release": {"type": "str"},
            "state": {"type": "str", "choices": ["present", "switched", "absent"], "default": "present"},
            "switched": {"type": "bool", "default": True},
            "timeout_seconds": {"type": "int", "default": 3600},
            "uv_lock": {"type": "path"},
        },
        supports_check_mode=True,
    )
    # A hardened root's umask would hide the environment from the people and services that use it.
    os.umask(0o022)

    def fail(message: str) -> NoReturn:
        module.fail_json(msg=message)
        raise AssertionError

    try:
        check_parameters(module.params)
        environment = Environment(module)
        verbs: dict[str, Callable[[], dict[str, Any]]] = {
            "absent": environment.absent,
            "present": environment.present,
            "switched": environment.switched,
        }
        current = environment.current()
        result = verbs[module.params["state"]]()
        if module.params["state"] != "absent":
            result["current_prefix"] = str(current or "")
    except BuildError as error:
        fail(str(error))
    except OSError as error:
        fail(f"Environment {module.params['name']!r} below {module.params['conda_prefix']}: {error}")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
