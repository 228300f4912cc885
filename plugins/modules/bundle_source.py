#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Take a bundle as the place that a host installs from."""

from __future__ import annotations

DOCUMENTATION = r"""
module: bundle_source
short_description: Verify a bundle, and let apt install from it
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Compares every file of a folder that C(playbooks/bundle.yml) made with its manifest. What is damaged or missing is
    named, and nothing is changed then. Files that were right once and weren't written to since are not read again until
    the next start of the host.
  - Adds the bundle's packages to apt's sources, and prefers them to those of sources that can't be reached.
options:
  path:
    description: Folder of the bundle on the host. Needed for O(state=present).
    type: path
  state:
    description: V(absent) takes the bundle out of apt's sources.
    type: str
    choices: [present, absent]
    default: present
attributes:
  check_mode:
    description: Verifies, and says whether apt's sources would change.
    support: full
  diff_mode:
    description: Shows apt's sources before and after.
    support: full
"""

EXAMPLES = r"""
- name: Install from a folder
  selfhost.lmdeploy.bundle_source:
    path: /srv/bundle
"""

RETURN = r"""
files:
  description: Number of files that are as the manifest says.
  type: int
  returned: O(state=present)
read:
  description: Number of files that had to be read for that.
  type: int
  returned: O(state=present)
"""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.bundle import (
    ORIGIN,
    BundleError,
    read_manifest,
    sha256_of,
    verify,
)

STAMPS = Path("/run/selfhost-bundle.json")
SOURCES = Path("/etc/apt/sources.list.d/selfhost-bundle.list")
PREFERENCES = Path("/etc/apt/preferences.d/selfhost-bundle")
# Above 990: also where apt still lists newer ones of a source that it can't reach. Below 1001: nothing is downgraded.
PREFERRED = f"# Made by selfhost.lmdeploy.mirrors.\nPackage: *\nPin: release o={ORIGIN}\nPin-Priority: 995\n"
SHOWN_FAULTS = 10


def read(path: Path) -> str:
    """Return a file's text, empty where there is none."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def write(path: Path, text: str, mode: int) -> None:
    """Replace a file in one step."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.chmod(mode)
    new.replace(path)


def this_system() -> dict[str, str]:
    """Return the system of this host in the manifest's words."""
    words = dict(line.split("=", 1) for line in read(Path("/etc/os-release")).splitlines() if "=" in line)
    return {
        "id": words.get("ID", "").strip('"'),
        "version": words.get("VERSION_ID", "").strip('"'),
        "architecture": os.uname().machine,
    }


def refuse_other_system(folder: Path, target: dict[str, str]) -> None:
    """Stop where the bundle was made for another system."""
    here = this_system()
    differing = [key for key in here if target.get(key) != here[key]]
    if differing:
        wanted = " ".join(target.get(key, "?") for key in here)
        raise BundleError(
            f"The bundle {folder} is for {wanted}, and this host is {' '.join(here.values())}: make one with "
            "playbooks/bundle.yml on a connected machine of the same system."
        )


def verified(folder: Path, *, dry: bool) -> tuple[int, int]:
    """Return the number of files, and of those that were read; raise BundleError that names what is wrong."""
    manifest = read_manifest(folder)
    refuse_other_system(folder, manifest["target"])
    try:
        known = json.loads(read(STAMPS) or "{}")
    except ValueError:
        known = {}
    faults, stamps = verify(folder, manifest, known)
    if faults:
        more = f" and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise BundleError(
            f"The bundle can't be used, and nothing was changed: {'; '.join(faults[:SHOWN_FAULTS])}{more}. Copy these "
            "files again from where the bundle was made."
        )
    fresh = sum(known.get(path) != stamp for path, stamp in stamps.items())
    if fresh and not dry:
        write(STAMPS, json.dumps(stamps), 0o600)
    return len(stamps), fresh


def wanted_files(folder: Path | None) -> dict[Path, str]:
    """Return apt's files; the list's digest stands in the source's file, so that another bundle is noticed."""
    packages = folder / "apt/Packages" if folder else None
    if packages is None or not packages.is_file():
        return {SOURCES: "", PREFERENCES: ""}
    # The manifest vouches for the packages, so no key has to.
    source = (
        f"# Made by selfhost.lmdeploy.mirrors. {sha256_of(packages)}\ndeb [trusted=yes] file:{packages.parent} ./\n"
    )
    return {SOURCES: source, PREFERENCES: PREFERRED}


def converge(module: AnsibleModule, folder: Path | None) -> dict[str, Any]:
    """Have apt's sources with or without the bundle; apt's lists follow."""
    wanted = wanted_files(folder)
    before = {path: read(path) for path in wanted}
    result: dict[str, Any] = {"changed": before != wanted}
    if result["changed"]:
        result["diff"] = [
            {"before_header": str(path), "after_header": str(path), "before": before[path], "after": wanted[path]}
            for path in wanted
        ]
    if result["changed"] and not module.check_mode:
        for path, text in wanted.items():
            if text:
                write(path, text, 0o644)
            else:
                path.unlink(missing_ok=True)
        if wanted[SOURCES]:
            try:
                update(module)
            except BaseException:
                # The next run shall do it again.
                SOURCES.unlink()
                raise
    return result


def update(module: AnsibleModule) -> None:
    """Read the bundle's list alone: asking the others would wait for a network that isn't there."""
    alone = ["-o", f"Dir::Etc::sourcelist={SOURCES}", "-o", "Dir::Etc::sourceparts=-", "-o", "APT::Get::List-Cleanup=0"]
    module.run_command(["apt-get", "-qq", *alone, "update"], check_rc=True)
    # Roles take a list that was just read as current, by these times.
    for place in ("/var/lib/apt/lists", "/var/lib/apt/periodic/update-success-stamp"):
        if Path(place).exists():
            os.utime(place)
    if importlib.util.find_spec("apt") is None:
        # Ansible's own apt needs it, and would ask all sources for it.
        install = ["apt-get", "-qq", "install", "--yes", "--no-install-recommends", "python3-apt"]
        module.run_command(install, check_rc=True, environ_update={"DEBIAN_FRONTEND": "noninteractive"})


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        required_if=[("state", "present", ("path",))],
        supports_check_mode=True,
    )
    try:
        if module.params["state"] == "absent":
            result = converge(module, None)
            if not module.check_mode:
                STAMPS.unlink(missing_ok=True)
        else:
            folder = Path(module.params["path"])
            files, fresh = verified(folder, dry=module.check_mode)
            result = {**converge(module, folder), "files": files, "read": fresh}
    except BundleError as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        module.fail_json(msg=f"The bundle {module.params['path']}: {error}")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
