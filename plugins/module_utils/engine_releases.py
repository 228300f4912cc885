# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Releases of a host's model engines: build beside, switch in one rename, prove, go back.

    /etc/api-server/releases/INSTANCE/ID/      unit, instance.json, launcher.py, and links to environment and model
    /etc/api-server/releases/INSTANCE/ID/release.json      the manifest, written last
    /etc/api-server/releases/INSTANCE/state.json           which releases were confirmed, the newest first
    /etc/api-server/releases/INSTANCE/pending.json         a switch that is under way
    /etc/systemd/system/INSTANCE.service                   what runs: the unit of one release, word for word

A unit names the files of its own release and nothing else, so replacing this one file is the whole switch. It is no
link to the release: `systemctl disable` would remove such a link. `current` and INSTANCE.json follow it, for readers.

The module engine_release uses this file; it also installs it, with openai_api.py beside it, as the program that the
host runs without a controller: from a timer, at boot, or by hand. Needs nothing but Python 3.10 or later.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import string
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

try:
    from ansible_collections.selfhost.lmdeploy.plugins.module_utils.openai_api import ApiFault, OpenAI, probe
except ImportError:
    # The program on a host: the file lies beside this one, where no tool that checks types looks.
    from openai_api import ApiFault, OpenAI, probe  # type: ignore[import-not-found, no-redef]

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFIG = Path("/etc/api-server")
UNITS = Path("/etc/systemd/system")
PROGRAM = Path("/usr/local/lib/api-server/engine_releases.py")
LOCK = Path("/run/api-server-releases.lock")
# Where the launcher lay before there were releases.
OLD_LAUNCHER = Path("/usr/local/lib/api-server/api_server_launcher.py")
BOOT_UNIT = "engine-releases.service"
BOOT_UNIT_TEXT = f"""\
# Made by selfhost.lmdeploy.api_server: change the variables of the role, not this file.
[Unit]
Description=Finish a switch of an engine's release that was cut by a power failure
ConditionPathExistsGlob={CONFIG}/releases/*/pending.json

[Service]
Type=exec
ExecStart=/usr/bin/python3 {PROGRAM} resume

[Install]
WantedBy=multi-user.target
"""
MARK = "selfhost.lmdeploy.api_server"
# Stands for the id in what the id is derived from.
TOKEN = "@RELEASE@"  # noqa: S105  # no secret
FORMAT = 1
MANIFEST, PENDING, STATE = "release.json", "pending.json", "state.json"
KEY_LETTERS = 48
JOURNAL_LINES = 20
UNTRIED_SECONDS = 24 * 3600
QUESTION = "What is the capital of France? Answer in one sentence."
IMAGE_QUESTION = "What text is in this image? Answer with the text alone."
# Times and messages in one form whatever the host's language and zone are.
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "TZ": "UTC", "SYSTEMD_COLORS": "0"}


class ReleaseFault(Exception):
    """A failure with its cause and its way out in one message."""


class GateFault(Exception):
    """Why a release does not serve."""


# -- files ------------------------------------------------------------------------------------------------------------


def flush(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, content: str, mode: int = 0o644) -> None:
    """Replace a file in one step, on the disk before this returns. The lock is held, so what lies there is of a cut."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.chmod(mode)
        new.replace(path)
    except BaseException as fault:
        new.unlink(missing_ok=True)
        # A full disk is told without the file's name, and people must know which disk.
        if isinstance(fault, OSError) and fault.errno and fault.filename is None:
            fault.filename = str(path)
        raise
    flush(path.parent)


def write_json(path: Path, content: dict[str, Any], mode: int = 0o600) -> None:
    """Write JSON for people and programs."""
    write(path, json.dumps(content, indent=1, sort_keys=True) + "\n", mode)


def read(path: Path) -> str:
    """Return a file's text, or nothing where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""


def read_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds, or nothing where there is none or half of one."""
    try:
        found = json.loads(read(path))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def link(path: Path, target: str) -> None:
    """Let a link lead to a target, in one rename."""
    if path.is_symlink() and str(path.readlink()) == target:
        return
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(path)


@contextlib.contextmanager
def locked(path: Path = LOCK, wait_seconds: float = 7200) -> Iterator[None]:
    """Hold the host's lock on releases: two runs take turns."""
    until = time.monotonic() + wait_seconds
    with path.open("a", encoding="utf-8") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    message = (
                        f"Another run has been switching releases for {wait_seconds:.0f} s: wait for it, or find it "
                        f"with `fuser {path}`."
                    )
                    raise ReleaseFault(message) from None
                time.sleep(0.2)
        yield


# -- what a release is ------------------------------------------------------------------------------------------------


def identity(unit: str, settings: dict[str, Any], launcher: str) -> str:
    """Return a release's id: 12 hexadecimal digits over all that decides what runs. The unit has TOKEN for the id."""
    content = json.dumps([FORMAT, unit, settings, launcher], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def revision_of(model_path: str) -> str:
    """Return the commit of a model, as the role model_weights noted it beside the model; empty where it did not."""
    for folder in (Path(model_path), Path(model_path).parent):
        source = read_json(folder / ".complete.json").get("source")
        if isinstance(source, dict):
            return str(source.get("commit") or source.get("version") or "")
    return ""


def versions_of(environment: str, packages: tuple[str, ...] = ("lmdeploy", "xllamacpp", "torch")) -> dict[str, str]:
    """Return the versions of what matters in an environment."""
    found = {}
    for package in packages:
        for path in Path(environment).glob(f"lib/python3*/site-packages/{package}-*.dist-info"):
            found[package] = path.name.removesuffix(".dist-info").removeprefix(f"{package}-")
    return found


def now() -> str:
    """Return the time as it is written into files."""
    return dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds")


def gate_text(result: dict[str, Any]) -> str:
    """Return the result of a gate for people."""
    if not result:
        return "never tried"
    if not result["passed"]:
        return f"failed {result['at']}: {result['fault'].splitlines()[0]}"
    speed = f", {result['tokens_per_second']:.0f} tokens/s" if result.get("tokens_per_second") else ""
    return (
        f"passed {result['at']}: ready in {result['ready_seconds']:.1f} s, answer in {result['seconds']:.1f} s{speed}"
    )


def compare(what: str, answer: str, gate: dict[str, Any], key: str) -> None:
    """Raise GateFault unless an answer matches what the gate expects."""
    expected = gate.get(key)
    if expected and not re.search(expected, answer, re.IGNORECASE):
        raise GateFault(f"{what} {answer!r}, which does not match api_server_gate_{key}, {expected!r}")


# -- systemd ----------------------------------------------------------------------------------------------------------


class Manager:
    """The service manager, as this program needs it."""

    def run(self, *command: str) -> str:
        """Run a command and return what it printed; a failure raises with what it said."""
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", check=False, env=ENVIRONMENT
            )
        except OSError as error:
            raise ReleaseFault(f"{command[0]}: {error}") from error
        if done.returncode != 0:
            raise ReleaseFault((done.stderr or done.stdout).strip())
        return done.stdout

    def show(self, unit: str) -> dict[str, str]:
        """Return what systemd knows about a unit."""
        wanted = "ActiveState,UnitFileState,NeedDaemonReload,StatusText,ExecMainStartTimestamp"
        lines = self.run("systemctl", "show", unit, f"--property={wanted}", "--timestamp=us+utc").splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def have(self, unit: str, action: str) -> None:
        """Start, restart or stop a unit and wait; what failed before may start again."""
        with contextlib.suppress(ReleaseFault):
            self.run("systemctl", "reset-failed", unit)
        self.run("systemctl", action, unit)

    def reload(self) -> None:
        """Let systemd read the units again."""
        self.run("systemctl", "daemon-reload")

    def enable(self, unit: str, *, enabled: bool) -> None:
        """Have a unit start at boot, or not."""
        self.run("systemctl", "enable" if enabled else "disable", "--quiet", unit)

    def journal(self, unit: str, since: float) -> str:
        """Return the end of a unit's journal since a moment, or why it can't be read."""
        try:
            return self.run(
                *("journalctl", "--unit", unit, "--since", f"@{since:.0f}", "--lines", str(JOURNAL_LINES)),
                *("--no-pager", "--output", "cat"),
            ).strip()
        except ReleaseFault as fault:
            return f"(the journal can't be read: {fault})"

    def arm(self, instance: str, seconds: float) -> None:
        """Have the host look after a pending switch by itself in a while, whatever becomes of this process.

        Timers from before stay until the switch is settled: without a gap, there is no moment that a kill could use.
        """
        self.run(
            *(
                "systemd-run",
                "--quiet",
                "--collect",
                f"--unit=release-return-{instance}.{time.time_ns()}",
                f"--on-active={seconds:.0f}s",
            ),
            *("--timer-property=AccuracySec=1s", "/usr/bin/python3", str(PROGRAM), "resume", instance),
        )

    def disarm(self, instance: str) -> None:
        """Take that back. The service that the timer started may be this very process, and stays."""
        with contextlib.suppress(ReleaseFault):
            self.run("systemctl", "stop", f"release-return-{instance}.*.timer")


def started_at(shown: dict[str, str]) -> float | None:
    """Return when a unit's process started, in seconds since 1970, or None where there is no process."""
    try:
        text = shown.get("ExecMainStartTimestamp", "").replace("UTC", "+0000")
        return dt.datetime.strptime(text, "%a %Y-%m-%d %H:%M:%S.%f %z").timestamp()
    except ValueError:
        return None


# -- the releases of one engine ---------------------------------------------------------------------------------------


class Releases:
    """The releases of one instance on this host."""

    def __init__(
        self, instance: str, config: Path = CONFIG, units: Path = UNITS, manager: Manager | None = None
    ) -> None:
        """Look at nothing yet."""
        self.instance, self.config = instance, config
        self.home = config / "releases" / instance
        self.unit = f"{instance}.service"
        self.unit_file = units / self.unit
        self.key_file = config / "api-key"
        self.manager = manager or Manager()

    # -- what is there --------------------------------------------------------------------

    def folder(self, release: str) -> Path:
        """Return where a release lies."""
        return self.home / release

    def manifest(self, release: str) -> dict[str, Any]:
        """Return a release's manifest, or nothing for what is no whole release."""
        found = read_json(self.folder(release) / MANIFEST) if release else {}
        return found if found.get("format") == FORMAT and found.get("id") == release else {}

    def is_whole(self, release: str) -> bool:
        """Tell whether a release is there and its files are what its id says."""
        folder = self.folder(release)
        if not self.manifest(release):
            return False
        unit = read(folder / self.unit).replace(release, TOKEN)
        return identity(unit, read_json(folder / "instance.json"), read(folder / "launcher.py")) == release

    def all(self) -> list[str]:
        """Return the ids of all releases."""
        return sorted(path.parent.name for path in self.home.glob(f"*/{MANIFEST}") if self.manifest(path.parent.name))

    def history(self) -> list[str]:
        """Return the releases that were confirmed, the newest first."""
        return [str(release) for release in read_json(self.home / STATE).get("confirmed", [])]

    def confirmed(self) -> str:
        """Return the release that was confirmed last, or nothing."""
        return next(iter(self.history()), "")

    def pending(self) -> dict[str, Any]:
        """Return the switch that is under way, or nothing."""
        return read_json(self.home / PENDING)

    def running(self) -> str:
        """Return the release whose unit is in force, or nothing."""
        found = re.search(r"^# Release ([0-9a-f]{12})$", read(self.unit_file), re.MULTILINE)
        return found[1] if found else ""

    def current(self) -> str:
        """Return the release that `current` leads to, or nothing; what readers without the unit see."""
        place = self.home / "current"
        return place.readlink().name if place.is_symlink() else ""

    def previous(self) -> str:
        """Return the release before the confirmed one that is still there, or nothing."""
        return next((release for release in self.history()[1:] if self.is_whole(release)), "")

    def status(self) -> dict[str, Any]:
        """Return everything about the releases, for people and programs."""
        shown = ("created", "engine", "environment", "versions", "model", "model_path", "model_revision", "result")
        releases = [{"id": name, **{key: self.manifest(name).get(key) for key in shown}} for name in self.all()]
        return {
            "instance": self.instance,
            "running": self.running(),
            "confirmed": self.confirmed(),
            "previous": self.previous(),
            "pending": self.pending(),
            "releases": sorted(releases, key=lambda release: str(release["created"]), reverse=True),
        }

    def needs(self, release: str, *, started: bool = True, key: str = "") -> list[str]:
        """Return why the host must act so that a release runs as its files are; nothing when it does."""
        reasons = []
        if self.pending():
            reasons.append("a switch was not finished")
        if self.confirmed() != release:
            reasons.append(f"release {self.confirmed() or 'none'} is in use")
        elif read(self.unit_file) != read(self.folder(release) / self.unit):
            reasons.append(f"{self.unit_file} is not the unit of the release")
        if not read(self.key_file) or (key and read(self.key_file).strip() != key):
            reasons.append("the key is another")
        return reasons or self.unfit(started=started)

    def unfit(self, *, started: bool) -> list[str]:
        """Return how the unit differs from what it should be."""
        shown = self.manager.show(self.unit)
        reasons = []
        if (shown.get("UnitFileState") == "enabled") != started:
            reasons.append("it does not start at boot" if started else "it starts at boot")
        if (shown.get("ActiveState") in ("active", "reloading")) != started:
            reasons.append(f"the unit is {shown.get('ActiveState', 'unknown')}")
        elif started and self.is_stale(shown):
            reasons.append("the process is older than its files")
        return reasons

    def is_stale(self, shown: dict[str, str]) -> bool:
        """Tell whether unit or key changed after the unit's process started."""
        moment = started_at(shown)
        return moment is not None and any(path.stat().st_mtime > moment for path in self.read_at_start())

    def read_at_start(self) -> list[Path]:
        """Return what the unit's process was started from and is not part of a release."""
        return [path for path in (self.unit_file, self.key_file) if path.exists()]

    def bring_to_present(self) -> None:
        """Give files of the future the present time: after a clock that was ahead they'd be newer than each process."""
        for path in self.read_at_start():
            if path.stat().st_mtime > time.time():
                os.utime(path)

    # -- building -------------------------------------------------------------------------

    def build(self, unit: str, settings: dict[str, Any], launcher: str, about: dict[str, Any]) -> str:
        """Have a release; ``unit`` has TOKEN for its id. Return the id. What is there already is not touched."""
        release = identity(unit, settings, launcher)
        manifest = {"format": FORMAT, "id": release, "instance": self.instance, "created": now(), "result": {}, **about}
        if self.is_whole(release):
            for place in (self.folder(release), self.home):
                for left in place.glob(".*.new"):
                    left.unlink(missing_ok=True)
            known = self.manifest(release)
            if known.get("gate") != about.get("gate"):
                write_json(self.folder(release) / MANIFEST, {**known, "gate": about.get("gate")}, 0o644)
            return release
        folder = self.folder(release)
        # The api-server user may pass, since its Python reads the launcher; it may not look around.
        for place in (self.config, self.home.parent, self.home):
            place.mkdir(mode=0o711, exist_ok=True)
            place.chmod(0o711)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o711)
        folder.chmod(0o711)
        write(folder / self.unit, unit.replace(TOKEN, release))
        write_json(folder / "instance.json", settings)
        write(folder / "launcher.py", launcher)
        # What these lead to is not pruned.
        link(folder / "environment", str(about["environment"]))
        link(folder / "model", str(about["model_path"]))
        write_json(folder / MANIFEST, manifest, 0o644)
        return release

    def adopt(self) -> str:
        """Make a release of an engine that was installed before there were any, so that one can go back to it."""
        unit, file = read(self.unit_file), self.config / f"{self.instance}.json"
        if self.history() or self.running() or MARK not in unit or file.is_symlink() or not read_json(file):
            return ""
        settings, place = read_json(file), f"{self.home}/{TOKEN}"
        unit = unit.replace(f":{file}", f":{place}/instance.json").replace(str(OLD_LAUNCHER), f"{place}/launcher.py")
        head, _newline, rest = unit.partition("\n")
        about = {
            "engine": settings.get("engine", ""),
            "environment": settings.get("release", ""),
            "versions": versions_of(settings.get("release", "")),
            "model": settings.get("model_name", ""),
            "model_path": settings.get("model_path", ""),
            "model_revision": revision_of(settings.get("model_path", "")),
            "gate": {},
        }
        release = self.build(f"{head}\n# Release {TOKEN}\n{rest}", settings, read(OLD_LAUNCHER), about)
        self.remember(release)
        return release

    def have_key(self, key: str = "") -> None:
        """Have the key that was given, else one that is there, else a new one."""
        present = read(self.key_file)
        letters = string.ascii_letters + string.digits
        wanted = f"{key}\n" if key else present or "".join(secrets.choice(letters) for _at in range(KEY_LETTERS)) + "\n"
        if wanted != present:
            write(self.key_file, wanted, 0o600)

    # -- switching ------------------------------------------------------------------------

    def activate(self, release: str) -> None:
        """Let a release be what systemd runs; everything else that names the present release follows."""
        folder, manifest = self.folder(release), self.manifest(release)
        unit = read(folder / self.unit)
        if read(self.unit_file) != unit:
            write(self.unit_file, unit)
        link(self.home / "current", release)
        link(self.config / f"{self.instance}.json", f"releases/{self.instance}/current/instance.json")
        people = Path(str(manifest.get("environment_link") or "/nonexistent/none"))
        environment = Path(str(manifest.get("environment") or ""))
        # Only a link of the role conda_env is moved: PREFIX/envs/NAME to PREFIX/releases/NAME/ID.
        if people.is_symlink() and environment.is_dir() and environment.parent.name == people.name:
            link(people, os.path.relpath(environment, people.parent))
        self.manager.reload()

    def prove(self, release: str) -> dict[str, Any]:
        """Have the unit run with a release, ask it, and note the result; raise GateFault with what was wrong."""
        began, since = time.monotonic(), time.time()
        try:
            shown = self.manager.show(self.unit)
            action = "restart" if self.is_stale(shown) else "start"
            self.bring_to_present()
            try:
                self.manager.have(self.unit, action)
            except ReleaseFault as fault:
                raise GateFault(f"the unit did not become active: {fault}") from fault
            ready = time.monotonic() - began
            result = {"passed": True, "at": now(), "ready_seconds": round(ready, 1), **self.ask(release)}
        except GateFault as fault:
            self.note(release, {"passed": False, "at": now(), "fault": str(fault)})
            lines = self.manager.journal(self.unit, since)
            raise GateFault(f"{fault}\nThe end of its journal (journalctl -u {self.unit}):\n{lines}") from fault
        self.note(release, result)
        return result

    def ask(self, release: str, settings: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask the engine as a client would; raise GateFault unless the answer is as expected.

        ``settings`` say where it listens, unless it is where the release says.
        """
        settings = settings or read_json(self.folder(release) / "instance.json")
        gate = self.manifest(release).get("gate") or {}
        host = f"[{settings['host']}]" if ":" in settings["host"] else settings["host"]
        if settings.get("rank"):
            # The first host of a model over several answers for all; this one is active, so its engine has joined.
            return {"seconds": 0.0, "tokens_per_second": 0.0, "answer": ""}
        model, question = settings["model_name"], gate.get("question") or QUESTION
        server = OpenAI(
            f"http://{host}:{settings['port']}", read(self.key_file).strip(), gate.get("timeout_seconds", 120)
        )
        try:
            found = probe(server, model, question, gate.get("max_tokens", 64), guarded=True)
        except ApiFault as fault:
            raise GateFault(str(fault)) from fault
        compare(f"{model} answered {question!r} with", found.answer, gate, "expected")
        if gate.get("image"):
            self.show(server, model, gate)
        speed = found.tokens / found.seconds if found.seconds else 0
        return {"seconds": round(found.seconds, 2), "tokens_per_second": round(speed, 1), "answer": found.answer}

    def show(self, server: OpenAI, model: str, gate: dict[str, Any]) -> None:
        """Show a vision model an image; raise GateFault unless it reads what stands there."""
        try:
            seen = server.chat(model, IMAGE_QUESTION, gate.get("max_tokens", 64), gate["image"])[0]
        except ApiFault as fault:
            raise GateFault(f"api_server_gate_image: {fault}") from fault
        compare(f"{model} read api_server_gate_image as", seen, gate, "image_expected")

    def note(self, release: str, result: dict[str, Any]) -> None:
        """Write the result of a gate into the manifest."""
        write_json(self.folder(release) / MANIFEST, {**self.manifest(release), "result": result}, 0o644)

    def remember(self, release: str) -> None:
        """Write down that a release is confirmed."""
        history = [release, *(other for other in self.history() if other != release)]
        write_json(self.home / STATE, {"confirmed": history}, 0o644)
        # A boot that could not end a switch has been made good: its unit would stay in `systemctl --failed` for ever.
        with contextlib.suppress(ReleaseFault):
            self.manager.run("systemctl", "reset-failed", BOOT_UNIT)

    def settle(self) -> None:
        """End a pending switch, whatever its outcome was."""
        (self.home / PENDING).unlink(missing_ok=True)
        flush(self.home)
        self.manager.disarm(self.instance)

    def switch(
        self, release: str, *, confirm_seconds: float, awaits: str = "gate", started: bool = True
    ) -> dict[str, Any]:
        """Switch to a release and prove it; go back by itself when it does not serve, and raise with the reason.

        ``awaits``: V(gate) confirms when the gate passed, V(caller) waits ``confirm_seconds`` for `confirm`.
        """
        if not self.is_whole(release):
            known = ", ".join(self.all()) or "none"
            raise ReleaseFault(f"{self.home} holds no whole release {release}. Releases there: {known}.")
        adopted = self.adopt()
        pending = self.pending()
        if pending.get("awaits") == "caller" and pending["to"] != release and pending["until"] > time.time():
            raise ReleaseFault(
                f"{self.unit}: release {pending['to']} of another run waits for its confirmation for another "
                f"{pending['until'] - time.time():.0f} s: let that run end, or confirm or roll back on the host."
            )
        before = pending.get("from", "") if pending else self.confirmed()
        if not adopted and not self.needs(release, started=started):
            return {"changed": False, "release": release, "from": before, "gate": self.manifest(release)["result"]}
        self.have_key()
        if not started:
            return self.lay_down(release, before)
        pending = {"from": "" if before == release else before, "to": release, "awaits": awaits, "first": not before}
        pending.update(until=time.time() + confirm_seconds, confirm_seconds=confirm_seconds)
        # The timer first: a marker without one would wait for the next boot.
        self.manager.arm(self.instance, confirm_seconds)
        write_json(self.home / PENDING, pending)
        return {"changed": True, "from": before, "release": release, "gate": self.carry_out(pending)}

    def carry_out(self, pending: dict[str, Any]) -> dict[str, Any]:
        """Bring a pending switch to its end; return the result of the gate, or go back and raise."""
        release = pending["to"]
        try:
            self.activate(release)
            self.manager.enable(self.unit, enabled=True)
            result = self.prove(release)
        except (GateFault, ReleaseFault) as fault:
            self.go_back(pending, f"release {release} failed its gate: {fault}")
        if pending["awaits"] == "caller":
            pending = {**pending, "until": time.time() + pending["confirm_seconds"], "proven": True}
            self.manager.arm(self.instance, pending["confirm_seconds"] + 1)
            write_json(self.home / PENDING, pending)
        else:
            self.confirm(release)
        return result

    def go_back(self, pending: dict[str, Any], cause: str) -> NoReturn:
        """Return to the release before, prove it, and raise with the cause and with what serves now."""
        before, began = pending["from"], time.monotonic()
        write_json(self.home / PENDING, {**pending, "awaits": "return", "cause": cause})
        if not before:
            end = "It is the release that was in use, so there is none to go back to. Mend the cause and run again."
            if pending.get("first"):
                end = "There is no release to go back to: the unit is stopped. Mend the cause and run again."
                with contextlib.suppress(ReleaseFault):
                    self.manager.enable(self.unit, enabled=False)
                    self.manager.have(self.unit, "stop")
            self.settle()
            raise ReleaseFault(f"{self.unit}: {cause}\n{end}")
        with contextlib.suppress(ReleaseFault):
            self.manager.have(self.unit, "stop")
        try:
            self.activate(before)
            result = self.prove(before)
        except (GateFault, ReleaseFault) as fault:
            self.settle()
            raise ReleaseFault(
                f"{self.unit}: {cause}\nRelease {before} is back and does not serve either: {fault}"
            ) from fault
        self.settle()
        raise ReleaseFault(
            f"{self.unit}: {cause}\nRelease {before} serves again after {time.monotonic() - began:.1f} s; it answered "
            f"{result['answer']!r}."
        )

    def lay_down(self, release: str, before: str) -> dict[str, Any]:
        """Have a release in place with its unit stopped; nobody is asked."""
        self.activate(release)
        self.manager.enable(self.unit, enabled=False)
        self.manager.have(self.unit, "stop")
        self.remember(release)
        self.settle()
        return {"changed": True, "from": before, "release": release, "gate": {}}

    def confirm(self, release: str = "") -> bool:
        """Confirm the pending release and tell whether there was something to confirm."""
        pending = self.pending()
        if not pending or pending["awaits"] == "return" or (release and pending["to"] != release):
            if not release or self.confirmed() == release:
                return False
            tried = gate_text(self.manifest(release).get("result") or {})
            raise ReleaseFault(
                f"{self.unit}: release {release} does not wait for a confirmation (its gate: {tried}); release "
                f"{self.confirmed() or 'none'} is in use."
            )
        self.remember(pending["to"])
        self.settle()
        if not any(str(OLD_LAUNCHER) in read(path) for path in self.unit_file.parent.glob("api-server*.service")):
            OLD_LAUNCHER.unlink(missing_ok=True)
        return True

    def rollback(self, release: str, confirm_seconds: float) -> dict[str, Any]:
        """Switch to a release that was there before, through the same gate; by default the one before."""
        pending = self.pending()
        wanted = release or (pending.get("from") if pending else "") or self.previous()
        if not wanted:
            raise ReleaseFault(
                f"{self.unit}: there is no release before {self.confirmed() or 'the first'} on this host."
            )
        if pending.get("awaits") == "caller":
            # What waits is given up; so nobody's word is broken.
            write_json(self.home / PENDING, {**pending, "until": 0})
        return self.switch(wanted, confirm_seconds=confirm_seconds)

    def resume(self, *, booted: bool = True) -> str:
        """Finish what is pending, from a timer or at boot; return what was done."""
        pending = self.pending()
        if not pending:
            return ""
        left = pending["until"] - time.time()
        if pending["awaits"] == "return":
            self.go_back(pending, pending["cause"])
        if pending["awaits"] == "caller" and left <= 0:
            self.go_back(
                pending, f"release {pending['to']} was not confirmed within {pending['confirm_seconds']:.0f} s"
            )
        if pending.get("proven") and not booted:
            # The timer was set before the gate passed; another one is set for the end of the wait.
            return ""
        self.carry_out(pending)
        return f"{self.unit}: release {pending['to']} passed its gate"

    def prune(self, keep: int) -> list[str]:
        """Remove releases beyond those to keep, and those that failed; return their ids."""
        if self.pending():
            return []
        confirmed = [release for release in self.history() if self.manifest(release)]
        kept = {*confirmed[: max(keep, 1)], self.running()}
        removed = []
        for path in sorted(path for path in self.home.iterdir() if path.is_dir() and not path.is_symlink()):
            manifest = self.manifest(path.name)
            # Another run may have built this one and be about to switch to it.
            waits = path.name not in confirmed and not manifest.get("result")
            if path.name in kept or (waits and time.time() - path.stat().st_mtime < UNTRIED_SECONDS):
                continue
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path)
            removed.append(path.name)
        if removed:
            write_json(self.home / STATE, {"confirmed": [name for name in confirmed if name not in removed]}, 0o644)
        return removed

    def remove(self) -> bool:
        """Remove the engine with its releases; models and environments are no part of it."""
        file = self.config / f"{self.instance}.json"
        there = [path for path in (self.unit_file, file, self.home) if path.exists() or path.is_symlink()]
        if not there:
            return False
        if self.unit_file.exists():
            self.manager.have(self.unit, "stop")
            self.manager.enable(self.unit, enabled=False)
        self.manager.disarm(self.instance)
        self.unit_file.unlink(missing_ok=True)
        file.unlink(missing_ok=True)
        shutil.rmtree(self.home, ignore_errors=True)
        self.manager.reload()
        # A unit that had failed would stay in `systemctl --failed` without its file.
        with contextlib.suppress(ReleaseFault):
            self.manager.run("systemctl", "reset-failed", self.unit)
        return True


def instances(config: Path = CONFIG) -> list[str]:
    """Return the engines that have releases."""
    return sorted(path.name for path in (config / "releases").glob("*") if path.is_dir())


# -- the program ------------------------------------------------------------------------------------------------------


def table(found: list[dict[str, Any]]) -> str:
    """Return the releases of a host for people."""
    lines = []
    for engine in found:
        lines.append(f"{engine['instance']}: release {engine['running'] or 'none'}")
        if engine["pending"]:
            lines.append(f"  switch to {engine['pending']['to']} under way, waits for: {engine['pending']['awaits']}")
        for release in engine["releases"]:
            word = {engine["confirmed"]: "in use", engine["previous"]: "before"}.get(release["id"], "")
            versions = " ".join(f"{name} {version}" for name, version in (release["versions"] or {}).items())
            gate = gate_text(release["result"] or {})
            lines.append(
                f"  {release['id']}  {word:<7} {release['created']}  {release['model']}  {versions}  gate {gate}"
            )
    return "\n".join(lines) or "no releases on this host"


def act(chosen: argparse.Namespace) -> dict[str, Any]:
    """Carry out one verb; return what it did."""
    names = [chosen.instance] if chosen.instance else instances()
    engines = [Releases(name) for name in names]
    if chosen.verb == "status":
        return {"engines": [engine.status() for engine in engines]}
    with locked():
        if chosen.verb == "switch":
            done = engines[0].switch(
                chosen.release,
                confirm_seconds=chosen.confirm_seconds,
                awaits=chosen.awaits,
                started=not chosen.stopped,
            )
            if not engines[0].pending():
                done["pruned"] = engines[0].prune(chosen.keep)
            return done
        if chosen.verb == "rollback":
            wanted = [engine for engine in engines if not chosen.release or engine.manifest(chosen.release)]
            if not wanted:
                raise ReleaseFault(f"No engine of this host has a release {chosen.release}: see `status`.")
            results = [engine.rollback(chosen.release, chosen.confirm_seconds) for engine in wanted]
            return {"changed": any(result["changed"] for result in results), "engines": results}
        if chosen.verb == "confirm":
            changed = [engine.confirm(chosen.release) for engine in engines]
            pruned = [engine.prune(chosen.keep) for engine in engines]
            return {"changed": any(changed), "pruned": pruned}
        if chosen.verb == "prune":
            return {"pruned": [engine.prune(chosen.keep) for engine in engines]}
        if chosen.verb == "remove":
            removed = [engine.remove() for engine in engines]
            return {"changed": any(removed)}
        return resume_all(engines, booted=not chosen.instance)


def resume_all(engines: list[Releases], *, booted: bool) -> dict[str, Any]:
    """Finish what is pending; one engine that goes back does not stop the next."""
    done, faults = [], []
    for engine in engines:
        try:
            done.append(engine.resume(booted=booted))
        except ReleaseFault as fault:
            faults.append(str(fault))
    if faults:
        raise ReleaseFault("\n".join(faults))
    return {"changed": any(done), "done": [line for line in done if line]}


def main(arguments: list[str]) -> int:
    """Run as a program; return the exit code."""
    parser = argparse.ArgumentParser(prog="engine_releases", description="Releases of the model engines of this host.")
    parser.add_argument("verb", choices=["status", "switch", "confirm", "rollback", "resume", "prune", "remove"])
    parser.add_argument("instance", nargs="?", default="", help="name of the engine's unit; default: all of the host")
    parser.add_argument("release", nargs="?", default="", help="id of a release")
    parser.add_argument("--confirm-seconds", type=float, default=300)
    parser.add_argument("--awaits", choices=["gate", "caller"], default="gate", help="who confirms a switch")
    parser.add_argument("--stopped", action="store_true", help="leave the unit stopped")
    parser.add_argument("--keep", type=int, default=3, help="releases that stay")
    parser.add_argument("--json", action="store_true", help="answer for programs")
    chosen = parser.parse_args(arguments)
    if chosen.verb == "switch" and not (chosen.instance and chosen.release):
        parser.error("switch needs an instance and a release")
    try:
        answer = act(chosen)
    except (ReleaseFault, OSError) as fault:
        if chosen.json:
            sys.stdout.write(json.dumps({"failed": True, "msg": str(fault)}) + "\n")
        else:
            sys.stderr.write(f"{fault}\n")
        return 1
    if chosen.json:
        sys.stdout.write(json.dumps(answer) + "\n")
    else:
        sys.stdout.write((table(answer["engines"]) if chosen.verb == "status" else json.dumps(answer, indent=1)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
