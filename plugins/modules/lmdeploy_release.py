#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Prove a release of LMDeploy before anything points to it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: lmdeploy_release
short_description: Prove a release of LMDeploy before anything points to it
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Checks once that LMDeploy has the wanted version, that its command line answers, that every CUDA library is in the
    release once and from one release of CUDA, and that TurboMind finds them there. Where the host has NVIDIA's driver,
    TurboMind is loaded as well.
  - Keeps what it found in C(PREFIX/lmdeploy.json), with all options, chat templates and parsers of this version. A
    release that has this file is recognised by one look at it.
options:
  prefix:
    description: Folder of the release.
    type: path
    required: true
  link:
    description: Link that people activate; the result tells whether it points to O(prefix).
    type: path
    required: true
  version:
    description: Version that LMDeploy must have.
    type: str
    required: true
  facts_program:
    description: Text of the Python program that prints what LMDeploy's command line understands, as JSON.
    type: str
    required: true
attributes:
  check_mode:
    description: Recognises a proven release, and runs nothing in one that is not.
    support: full
  diff_mode:
    description: Nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Prove the release
  selfhost.lmdeploy.lmdeploy_release:
    prefix: "{{ conda_env_release_prefix }}"
    link: /opt/miniconda3/envs/lmdeploy
    version: 0.18.0
    facts_program: "{{ lookup('ansible.builtin.file', 'cli_facts.py') }}"
"""

RETURN = r"""
current:
  description: Whether O(link) points to O(prefix).
  type: bool
  returned: success
built:
  description: Whether the release is there; check mode may look at one that is still to be built.
  type: bool
  returned: success
libraries:
  description: Path of each CUDA library that TurboMind loads; empty where check mode looked at a release to be built.
  type: dict
  returned: success
  sample: {libnccl.so.2: /opt/miniconda3/releases/lmdeploy/0f3c5a7e9b1d/.../nccl/lib/libnccl.so.2}
driver:
  description: Whether NVIDIA's driver was there, so that TurboMind was loaded and not only looked at.
  type: bool
  returned: success
"""

import json
import os
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.lmdeploy_proof import (
    DRIVER_LIBRARY,
    cuda_libraries,
    library_faults,
    loaded,
    providers,
)

PROOF = "lmdeploy.json"
LOAD = "import lmdeploy.turbomind as engine\nif not engine.is_available(): raise engine._import_error"
SHOWN_LINES = 12


class Unproven(Exception):
    """A release that must not be used, with the reason and the way out."""


def tail(text: str) -> str:
    """Return the last lines of what a program said."""
    return "\n".join([line for line in text.splitlines() if line.strip()][-SHOWN_LINES:])


def prove(module: AnsibleModule, prefix: Path) -> dict[str, Any]:
    """Check a release and return what is kept of it."""
    python, command = prefix / "bin" / "python", prefix / "bin" / "lmdeploy"
    site_packages = next(prefix.glob("lib/python3*/site-packages"), None)
    library = next(site_packages.glob("lmdeploy/turbomind/_turbomind*.so"), None) if site_packages else None
    if site_packages is None or library is None or not os.access(command, os.X_OK):
        raise Unproven(f"{prefix} has no LMDeploy with TurboMind: remove the folder and run again.")
    _code, ldd, err = module.run_command(["ldd", str(library)])
    faults = library_faults(prefix, site_packages, ldd)
    if faults:
        raise Unproven(
            f"The release {prefix} was built but is not used, because "
            + "; ".join(faults)
            + ". The lock decides which "
            f"packages come together: name a lock with one CUDA release in lmdeploy_lock. {tail(err)}"
        )
    # Its own folder only: a user's packages must not make it look whole.
    code, out, err = module.run_command([str(python), "-I", "-"], data=module.params["facts_program"])
    if code != 0:
        raise Unproven(f"The release {prefix} was built but is not used, because LMDeploy does not start:\n{tail(err)}")
    facts: dict[str, Any] = json.loads(out[out.index("{") :])
    if facts["version"] != module.params["version"]:
        raise Unproven(
            f"The release {prefix} was built but is not used, because it has LMDeploy {facts['version']} where "
            f"lmdeploy_version is {module.params['version']}: correct lmdeploy_version or lmdeploy_lock."
        )
    paths, missing = loaded(ldd)
    driver = DRIVER_LIBRARY not in missing
    if driver:
        code, _out, err = module.run_command([str(python), "-I", "-c", LOAD])
        if code != 0:
            raise Unproven(
                f"The release {prefix} was built but is not used, because TurboMind does not load, and LMDeploy would "
                f"silently serve with its PyTorch backend:\n{tail(err)}"
            )
    return {
        "cli": facts,
        "libraries": cuda_libraries(paths),
        "providers": providers(site_packages, ldd),
        "driver": driver,
    }


def run(module: AnsibleModule) -> dict[str, Any]:
    """Recognise a proven release, or prove it."""
    prefix, link = Path(module.params["prefix"]), Path(module.params["link"])
    file = prefix / PROOF
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        proven = kept["cli"]["version"] == module.params["version"]
    except (OSError, ValueError, KeyError, TypeError):
        kept, proven = {}, False
    if not proven and not module.check_mode:
        kept = prove(module, prefix)
        temporary = file.with_suffix(".new")
        temporary.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        temporary.chmod(0o644)
        temporary.replace(file)
    return {
        "changed": not proven,
        "current": link.exists() and link.resolve() == prefix.resolve(),
        "built": prefix.is_dir(),
        "libraries": kept.get("libraries", {}),
        "driver": kept.get("driver", False),
    }


def main() -> None:
    """Run as a module."""
    module = AnsibleModule(
        argument_spec={
            "prefix": {"type": "path", "required": True},
            "link": {"type": "path", "required": True},
            "version": {"type": "str", "required": True},
            "facts_program": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    try:
        result = run(module)
    except (Unproven, OSError, ValueError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
