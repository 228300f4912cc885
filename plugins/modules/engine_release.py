#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Build releases of a host's model engines, switch to them through a gate, and go back."""

from __future__ import annotations

DOCUMENTATION = r"""
module: engine_release
short_description: Build releases of model engines, switch to them through a gate, and go back
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - A release is all that decides what an engine runs; environment, model, instance file, launcher and unit. Its id is
    derived from its content. It is built and judged beside the one that runs, and never changed afterwards.
  - A switch replaces the unit in one step and then asks the engine a question. When it does not serve, the release
    before returns by itself, is proven to serve, and the task fails with the reason.
  - The host does that by its own program C(/usr/local/lib/api-server/engine_releases.py), which this module installs,
    so it ends well when the controller is lost. A timer and a unit at boot finish what was cut.
options:
  state:
    description:
      - V(prepared) builds a release of O(instance); it removes nothing and starts nothing.
      - V(switched) switches O(instance) to O(release).
      - V(confirmed) confirms a switch that was made with O(confirmed=false).
      - V(rolled_back) switches to O(release), by default to the one before.
      - V(absent) removes the engine O(instance); without one, all engines and the program.
    type: str
    choices: [prepared, switched, confirmed, rolled_back, absent]
    required: true
  unit:
    description: Text of the unit, with V(@RELEASE@) where the id of the release belongs, for O(state=prepared).
    type: str
  settings:
    description: What the launcher reads, as JSON text, for O(state=prepared). It may hold secrets.
    type: str
  environment_link:
    description: Link that people activate, which follows the release.
    type: path
    default: ""
  launcher:
    description: Text of the launcher, for O(state=prepared).
    type: str
  judged:
    description: Whether systemd and the engine's own parser judge a release before it counts as built. They can't in
      check mode on a host where the environment is not there yet.
    type: bool
    default: true
  gate:
    description: What the gate asks; C(question), C(expected) (a regular expression), C(image) (a data URL),
      C(image_expected), C(timeout_seconds) and C(max_tokens).
    type: dict
    default: {}
  instance:
    description: One engine, by the name of its unit without suffix; empty means all of the host where that makes sense.
    type: str
    default: ""
  release:
    description: Id of a release.
    type: str
    default: ""
  api_key:
    description: Key of the engines; when empty, the one that is there stays, or one is generated.
    type: str
    default: ""
  service_state:
    description: Whether the engine runs.
    type: str
    choices: [started, stopped]
    default: started
  confirmed:
    description: Whether a passed gate confirms the switch. Otherwise the host goes back unless O(state=confirmed) comes
      within O(confirm_seconds).
    type: bool
    default: true
  confirm_seconds:
    description: Seconds after which the host looks after an unfinished switch by itself.
    type: float
    default: 300
  keep_releases:
    description: Releases that stay, the present one included.
    type: int
    default: 3
attributes:
  check_mode:
    description: Says what would be done, and judges what can be judged.
    support: full
  diff_mode:
    description: Shows the change of the unit.
    support: full
"""

EXAMPLES = r"""
- name: Switch an engine to a release that was built
  selfhost.lmdeploy.engine_release:
    state: switched
    instance: api-server
    release: 3f1c5a7be210

- name: Go back to the release before
  selfhost.lmdeploy.engine_release:
    state: rolled_back
"""

RETURN = r"""
release:
  description: Id of the release.
  returned: O(state=prepared) and O(state=switched)
  type: str
  sample: 3f1c5a7be210
needed:
  description: Why a switch is needed; nothing when the engine runs as wanted.
  returned: O(state=prepared)
  type: list
  elements: str
  sample: [release 0f3c5a7e9b1d is in use]
built:
  description: Whether the release was built, or would be in check mode.
  returned: O(state=prepared)
  type: bool
refused:
  description: What was refused, with the output of the program that did.
  returned: when a release was refused
  type: list
  elements: dict
gate:
  description: What the gate saw; whether it C(passed), C(ready_seconds), C(seconds) of the answer and
    C(tokens_per_second).
  returned: O(state=switched)
  type: dict
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import engine_releases, openai_api
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.engine_releases import (
    BOOT_UNIT,
    BOOT_UNIT_TEXT,
    PROGRAM,
    TOKEN,
    UNITS,
    Manager,
    ReleaseFault,
    Releases,
    identity,
    locked,
    read,
    revision_of,
    versions_of,
    write,
)
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.progress import load_text, told, weights_of

CHECK_SECONDS = 300


class Refused(Exception):
    """The engine's parser or systemd do not take a release."""

    def __init__(self, findings: list[dict[str, str]]) -> None:
        """Keep who refused what."""
        super().__init__("; ".join(f"{finding['path']}: {finding['output']}" for finding in findings))
        self.findings = findings


def output_of(command: list[str]) -> tuple[int, str, str]:
    """Return exit code, output and errors of a program that judges."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, f"{command[0]} did not judge it: {error}", ""
    return done.returncode, done.stdout, done.stderr


def judge(params: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, str]]:
    """Have a release judged by systemd and by the installed engine; return what they refuse."""
    found = []
    with tempfile.TemporaryDirectory(prefix="engine_release.") as top:
        file, program, unit = (
            Path(top, name) for name in ("instance.json", "launcher.py", f"{params['instance']}.service")
        )
        write(file, json.dumps(settings), 0o600)
        write(program, params["launcher"])
        write(unit, params["unit"].replace(TOKEN, "0" * 12))
        code, out, errors = output_of([f"{settings['release']}/bin/python", str(program), "--check", str(file)])
        if code:
            found.append({"path": f"{params['instance']}.json", "output": (out or errors).strip()})
        code, out, errors = output_of(["systemd-analyze", "verify", "--man=no", str(unit)])
        # systemd-analyze only warns of settings that it does not know.
        lines = [line for line in (out + errors).splitlines() if unit.name in line]
        if code or lines:
            found.append({"path": unit.name, "output": "\n".join(lines) or (out + errors).strip()})
    return found


def source_of(module: Any) -> str:
    """Return the text of a Python module, also from inside the archive that Ansible sends."""
    return str(module.__loader__.get_source(module.__name__))


def install_program(*, dry: bool) -> list[str]:
    """Have the host's own program, and the unit that runs it at boot; return what was written."""
    wanted = {
        PROGRAM: source_of(engine_releases),
        PROGRAM.with_name("openai_api.py"): source_of(openai_api),
        UNITS / BOOT_UNIT: BOOT_UNIT_TEXT,
    }
    changed = [path for path, content in wanted.items() if read(path) != content]
    if changed and not dry:
        PROGRAM.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        for path in changed:
            write(path, wanted[path])
        if UNITS / BOOT_UNIT in changed:
            Manager().reload()
            Manager().enable(BOOT_UNIT, enabled=True)
    return [str(path) for path in changed]


def prepare(params: dict[str, Any], *, dry: bool) -> dict[str, Any]:
    """Build a release unless it is there; return its id and why a switch is needed."""
    engine, settings = Releases(params["instance"]), json.loads(params["settings"])
    release = identity(params["unit"], settings, params["launcher"])
    built = not engine.is_whole(release)
    refused = judge(params, settings) if built and params["judged"] else []
    if refused:
        raise Refused(refused)
    written = install_program(dry=dry)
    if not dry:
        engine.build(params["unit"], settings, params["launcher"], about(params, settings))
    needed = engine.needs(release, started=params["service_state"] == "started", key=params["api_key"])
    header = f"{engine.unit_file}, release {{}}"
    difference = {
        "before_header": header.format(engine.running() or "none"),
        "after_header": header.format(release),
        "before": read(engine.unit_file),
        "after": params["unit"].replace(TOKEN, release),
    }
    result = {"release": release, "needed": needed, "built": built, "changed": built or bool(written)}
    return {**result, **({"diff": difference} if built else {})}


def about(params: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return what the manifest of a release says beside its id."""
    return {
        "engine": settings["engine"],
        "environment": settings["release"],
        "environment_link": params["environment_link"],
        "versions": versions_of(settings["release"]),
        "model": settings["model_name"],
        "model_path": settings["model_path"],
        "model_revision": revision_of(settings["model_path"]),
        "gate": params["gate"],
    }


def program(*words: str, aside: str = "") -> dict[str, Any]:
    """Let the host's program work, and return its answer.

    ``aside`` names a unit of its own, so that the work goes on when the session that asked for it is cut.
    """
    command = ["/usr/bin/python3", str(PROGRAM), *words, "--json"]
    if aside:
        command = ["systemd-run", "--quiet", "--collect", "--wait", "--pipe", f"--unit={aside}", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise ReleaseFault(
            f"{' '.join(command)} ended with {done.returncode}: {(done.stderr or done.stdout).strip()}"
        ) from None
    if answer.get("failed"):
        raise ReleaseFault(str(answer["msg"]))
    return dict(answer)


def switch(params: dict[str, Any], *, dry: bool) -> dict[str, Any]:
    """Switch one engine, unless it runs as wanted."""
    engine, release = Releases(params["instance"]), params["release"]
    before = engine.running()
    started = params["service_state"] == "started"
    reasons = engine.needs(release, started=started, key=params["api_key"])
    difference = {
        "before": f"{engine.instance}: release {before or 'none'}\n",
        "after": f"{engine.instance}: release {release}\n",
    }
    if not reasons or dry:
        return {"changed": bool(reasons), "reasons": reasons, "diff": difference}
    engine.have_key(params["api_key"])
    words = [
        "switch",
        engine.instance,
        release,
        f"--confirm-seconds={params['confirm_seconds']}",
        f"--keep={params['keep_releases']}",
    ]
    words += [] if started else ["--stopped"]
    words += [] if params["confirmed"] else ["--awaits=caller"]
    with told("engine_release", loading(engine, release)):
        done = program(*words, aside=f"release-switch-{engine.instance}-{os.getpid()}")
    return {**done, "reasons": reasons, "diff": difference}


def loading(engine: Releases, release: str) -> Callable[[], str]:
    """Return what tells how far an engine's load is: of its weights' bytes, and of the seconds of its last load."""
    manifest, others = engine.manifest(release), [engine.manifest(other) for other in engine.all()]
    # With another model than this one the engine took another time.
    results = [other.get("result") or {} for other in others if other["model"] == manifest.get("model")]
    last = max((result for result in results if result.get("passed")), key=lambda result: result["at"], default={})
    weights = weights_of(Path(manifest["model_path"])) if manifest.get("model_path") else 0

    def say() -> str:
        status = Manager().show(engine.unit).get("StatusText", "")
        return f"{engine.instance}: {load_text(status, weights, last.get('ready_seconds', 0)) or 'begun'}"

    return say


def confirm(params: dict[str, Any], *, dry: bool) -> dict[str, Any]:
    """Confirm what waits for it."""
    if dry:
        names = [params["instance"]] if params["instance"] else engine_releases.instances()
        return {"changed": any(Releases(name).pending() for name in names)}
    return program("confirm", params["instance"], params["release"], f"--keep={params['keep_releases']}")


def roll_back(params: dict[str, Any], *, dry: bool) -> dict[str, Any]:
    """Go back to a release that was there before."""
    if dry:
        return {"changed": True}
    words = ["rollback", params["instance"], params["release"], f"--confirm-seconds={params['confirm_seconds']}"]
    engine = Releases(params["instance"] or (engine_releases.instances() or [""])[0])
    with told("engine_release", loading(engine, params["release"] or engine.running())):
        return program(*words, aside=f"release-rollback-{os.getpid()}")


def remove(params: dict[str, Any], *, dry: bool) -> dict[str, Any]:
    """Remove one engine, or all of them with the program."""
    name = params["instance"]
    found = [name] if name else sorted({*engine_releases.instances(), *old_engines()})
    boot = UNITS / BOOT_UNIT
    there = [engine for engine in map(Releases, found) if engine.unit_file.exists() or engine.home.exists()]
    changed = bool(there) or (not name and boot.exists())
    if not dry and changed:
        with locked():
            for engine in there:
                engine.remove()
            if not name and boot.exists():
                Manager().enable(BOOT_UNIT, enabled=False)
                boot.unlink()
                Manager().reload()
    return {"changed": changed}


def old_engines() -> list[str]:
    """Return engines of the role that have no releases yet."""
    return [
        path.stem for path in UNITS.glob("api-server*.service") if engine_releases.MARK in read(path).partition("\n")[0]
    ]


VERBS = {"prepared": prepare, "switched": switch, "confirmed": confirm, "rolled_back": roll_back, "absent": remove}


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": [*VERBS], "required": True},
            "unit": {"type": "str"},
            "settings": {"type": "str", "no_log": True},
            "environment_link": {"type": "path", "default": ""},
            "launcher": {"type": "str"},
            "judged": {"type": "bool", "default": True},
            "gate": {"type": "dict", "default": {}},
            "instance": {"type": "str", "default": ""},
            "release": {"type": "str", "default": ""},
            "api_key": {"type": "str", "default": "", "no_log": True},
            "service_state": {"type": "str", "choices": ["started", "stopped"], "default": "started"},
            "confirmed": {"type": "bool", "default": True},
            "confirm_seconds": {"type": "float", "default": 300.0},
            "keep_releases": {"type": "int", "default": 3},
        },
        required_if=[
            ("state", "prepared", ("instance", "unit", "settings", "launcher")),
            ("state", "switched", ("instance", "release")),
        ],
        supports_check_mode=True,
    )
    # A hardened root's umask would hide the launcher from the user that runs it.
    os.umask(0o022)
    try:
        result = VERBS[module.params["state"]](module.params, dry=module.check_mode)
    except Refused as refusal:
        module.fail_json(msg=f"Nothing was changed, since this was refused: {refusal}", refused=refusal.findings)
    except (ReleaseFault, OSError) as fault:
        module.fail_json(msg=str(fault))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
