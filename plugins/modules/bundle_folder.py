#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Collect in one folder what a host installs from without a network."""

from __future__ import annotations

DOCUMENTATION = r"""
module: bundle_folder
short_description: Make a bundle, from which hosts install without a network
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Downloads the packages of hashed locks and makes a package index of them; the conda packages of environments and a
    channel of them; conda's installer; packages of the distribution with all that they depend on, and a source of them.
  - Writes the manifest last, with each file's size and SHA-256. What lies in the folder beside that, such as models, is
    in the manifest too.
  - Files that are there and right are kept, so an interrupted run goes on. Packages that nothing wants any more go.
options:
  path:
    description: Folder of the bundle.
    type: path
    required: true
  python:
    description: Python with pip, of the version that the locks are for.
    type: path
    required: true
  locks:
    description: Paths of hashed requirements files.
    type: list
    elements: path
    default: []
  pins:
    description: Packages to have beside the locks.
    type: list
    elements: dict
    default: []
    suboptions:
      package:
        description: Name of the package.
        type: str
        required: true
      version:
        description: Version of the package.
        type: str
        required: true
      sha256:
        description: SHA-256 of the wheel.
        type: str
        required: true
  environments:
    description: Folders of conda environments whose packages are taken.
    type: list
    elements: path
    default: []
  installer_url:
    description: Address of conda's installer.
    type: str
    required: true
  installer_sha256:
    description: SHA-256 of conda's installer.
    type: str
    required: true
  system_packages:
    description: Packages of the distribution, of the release and architecture of this machine.
    type: list
    elements: str
    default: []
attributes:
  check_mode:
    description: Changes nothing, and says that it would where there is no whole bundle.
    support: partial
    details: What the index would give today is not asked for.
  diff_mode:
    description: Shows no difference.
    support: none
"""

EXAMPLES = r"""
- name: Make a bundle
  selfhost.lmdeploy.bundle_folder:
    path: /media/usb/bundle
    python: /opt/miniconda3/envs/app/bin/python
    locks: [app.txt]
    environments: [/opt/miniconda3/envs/app]
    installer_url: https://mirror.example.org/Miniconda3-py311_26.7.1-1-Linux-x86_64.sh
    installer_sha256: a6f98e6e19d5b7897ae887cd6af931eb863459f86ffd1a09cc370124cab0993e
    system_packages: [libgomp1]
"""

RETURN = r"""
files:
  description: Number of files in the bundle.
  type: int
  returned: unless in check mode
bytes:
  description: Size of all of them.
  type: int
  returned: unless in check mode
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import open_url
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.bundle import (
    CHUNK_BYTES,
    FORMAT,
    MANIFEST,
    WORK,
    BundleError,
    channel_indexes,
    files_of,
    index_pages,
    read_manifest,
    release_file,
    sha256_of,
)


class Bundle:
    """The folder while it is made."""

    def __init__(self, module: AnsibleModule) -> None:
        """Take the task's parameters."""
        self.module = module
        self.params: dict[str, Any] = module.params
        self.folder = Path(module.params["path"])

    def make(self) -> bool:
        """Make all of it; return whether the manifest is another one now."""
        try:
            before = read_manifest(self.folder)
        except BundleError:
            before = {}
        # A bundle that is being changed is none.
        (self.folder / MANIFEST).unlink(missing_ok=True)
        self.have_wheels()
        self.have_channel()
        self.have_installer()
        self.have_system_packages()
        manifest = self.manifest()
        self.write(MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        return manifest != before

    # -- parts --------------------------------------------------------------------------

    def have_wheels(self) -> None:
        """Have the locks' files and an index of them. pip checks each file against the lock's hashes."""
        new = self.work("wheels")
        old = self.folder / "wheels"
        pins = "".join(
            f"{pin['package']}=={pin['version']} --hash=sha256:{pin['sha256']}\n" for pin in self.params["pins"]
        )
        self.write(f"{WORK}/pins.txt", pins)
        lists = [*self.params["locks"], *([str(self.folder / WORK / "pins.txt")] if pins else [])]
        for requirements in lists:
            # One call a lock: two environments may have two versions of a package.
            self.run(
                [
                    *(self.params["python"], "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"),
                    *("--disable-pip-version-check", "--require-hashes", "--only-binary", ":all:"),
                    *(
                        "--cache-dir",
                        str(self.folder / WORK / "pip"),
                        "--dest",
                        str(new),
                        "--requirement",
                        requirements,
                    ),
                ],
                f"pip could not fetch what {requirements} names",
            )
        self.replace(new, old)
        hashes = {path.name: sha256_of(path) for path in old.iterdir()}
        self.write_all("simple", index_pages(hashes))

    def have_channel(self) -> None:
        """Have the conda packages of the environments, as their own records name them."""
        records = {}
        for environment in self.params["environments"]:
            for path in sorted(Path(environment, "conda-meta").glob("*.json")):
                record = json.loads(path.read_text(encoding="utf-8"))
                records[record["subdir"], record["fn"]] = record
        new = self.work("conda")
        for (subdir, name), record in records.items():
            self.fetch(record["url"], record["sha256"], new / subdir / name, self.folder / "conda" / subdir / name)
        self.replace(new, self.folder / "conda")
        for name, text in channel_indexes(records.values()).items():
            self.write(name, text)

    def have_installer(self) -> None:
        """Have conda's installer under its own name."""
        name = Path(urlsplit(self.params["installer_url"]).path).name
        new = self.work("installers")
        target = self.folder / "installers" / name
        self.fetch(self.params["installer_url"], self.params["installer_sha256"].lower(), new / name, target)
        self.replace(new, self.folder / "installers")

    def have_system_packages(self) -> None:
        """Have packages of the distribution with all that they depend on: the host may have none of it."""
        target = self.folder / "apt"
        if not self.params["system_packages"]:
            shutil.rmtree(target, ignore_errors=True)
            return
        new = self.work("apt")
        (new / "partial").mkdir()
        status = new / "status"
        status.write_text("", encoding="ascii")
        for path in target.glob("*.deb"):
            # apt keeps what is right and fetches what isn't.
            keep(path, new / path.name)
        # Lists of our own: the machine's may be old, and belong to root.
        lists = self.folder / WORK / "lists"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        options = [f"Dir::State::status={status}", f"Dir::State::lists={lists}", f"Dir::Cache::archives={new}"]
        options += ["Dir::Cache::pkgcache=", "Dir::Cache::srcpkgcache=", "APT::Sandbox::User=root"]
        words = [word for option in options for word in ("-o", option)]
        self.run(["apt-get", "-qq", *words, "update"], "apt could not read its sources")
        self.run(
            ["apt-get", "-qq", *words, "--yes", "--no-install-recommends", "--download-only", "install"]
            + self.params["system_packages"],
            "apt could not fetch the packages",
        )
        for rubbish in ("partial", "status", "lock"):
            path = new / rubbish
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        packages = "".join(self.described(path) for path in sorted(new.glob("*.deb")))
        (new / "Packages").write_text(packages, encoding="utf-8")
        (new / "Release").write_text(release_file(packages.encode()), encoding="utf-8")
        self.replace(new, target)

    def described(self, path: Path) -> str:
        """Return a package's paragraph in the source's list."""
        control = self.run(["dpkg-deb", "--field", str(path)], f"{path} is no package").strip()
        return f"{control}\nFilename: ./{path.name}\nSize: {path.stat().st_size}\nSHA256: {sha256_of(path)}\n\n"

    def manifest(self) -> dict[str, Any]:
        """Describe the bundle: for which system it is, what was asked for, and every file."""
        names = files_of(self.folder)
        release = Path("/etc/os-release").read_text(encoding="utf-8")
        words = dict(line.split("=", 1) for line in release.splitlines() if "=" in line)
        return {
            "format": FORMAT,
            "target": {
                "id": words.get("ID", "").strip('"'),
                "version": words.get("VERSION_ID", "").strip('"'),
                "architecture": os.uname().machine,
            },
            "locks": {Path(path).name: sha256_of(Path(path)) for path in self.params["locks"]},
            "pins": [f"{pin['package']}=={pin['version']}" for pin in self.params["pins"]],
            "system_packages": sorted(self.params["system_packages"]),
            "files": {
                name: {"sha256": sha256_of(self.folder / name), "size": (self.folder / name).stat().st_size}
                for name in names
            },
        }

    # -- tools --------------------------------------------------------------------------

    def work(self, name: str) -> Path:
        """Return an empty folder to collect a part in."""
        path = self.folder / WORK / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def replace(self, new: Path, old: Path) -> None:
        """Put a part in its place, whole."""
        shutil.rmtree(old, ignore_errors=True)
        new.replace(old)

    def write(self, name: str, text: str) -> None:
        """Write a file of the bundle."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def write_all(self, part: str, texts: dict[str, str]) -> None:
        """Write all files of a part anew."""
        shutil.rmtree(self.folder / part, ignore_errors=True)
        for name, text in texts.items():
            self.write(name, text)

    def fetch(self, url: str, sha256: str, target: Path, kept: Path) -> None:
        """Have a file with this SHA-256: the one that is kept when it is right, else a download."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if kept.is_file() and sha256_of(kept) == sha256:
            keep(kept, target)
            return
        try:
            with open_url(url, timeout=60, http_agent="selfhost.lmdeploy") as answer, target.open("wb") as stream:
                while chunk := answer.read(CHUNK_BYTES):
                    stream.write(chunk)
        except (OSError, ValueError) as error:
            raise BundleError(f"{url} can't be fetched: {error}") from error
        digest = sha256_of(target)
        if digest != sha256:
            raise BundleError(f"The SHA-256 of {url} is {digest}, wanted is {sha256}.")

    def run(self, command: list[str], fault: str) -> str:
        """Run a program; return what it printed."""
        code, out, err = self.module.run_command(command)
        if code != 0:
            last = " | ".join([line.strip() for line in (out + err).splitlines() if line.strip()][-6:])
            raise BundleError(f"{fault}: {last}")
        return str(out)


def keep(old: Path, new: Path) -> None:
    """Have a file in another place too; a USB disk may know no links."""
    try:
        os.link(old, new)
    except OSError:
        shutil.copy2(old, new)


def main() -> None:
    """Run as an Ansible module."""
    pin = {"package": {"type": "str", "required": True}, "version": {"type": "str", "required": True}}
    module = AnsibleModule(
        argument_spec={
            "environments": {"type": "list", "elements": "path", "default": []},
            "installer_sha256": {"type": "str", "required": True},
            "installer_url": {"type": "str", "required": True},
            "locks": {"type": "list", "elements": "path", "default": []},
            "path": {"type": "path", "required": True},
            "pins": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {**pin, "sha256": {"type": "str", "required": True}},
            },
            "python": {"type": "path", "required": True},
            "system_packages": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    folder = Path(module.params["path"])
    if module.check_mode:
        module.exit_json(changed=not (folder / MANIFEST).exists())
    os.umask(0o022)
    try:
        changed = Bundle(module).make()
        manifest = read_manifest(folder)
    except (BundleError, OSError) as error:
        module.fail_json(msg=str(error))
    sizes = [entry["size"] for entry in manifest["files"].values()]
    module.exit_json(changed=changed, files=len(sizes), bytes=sum(sizes))


if __name__ == "__main__":
    main()
