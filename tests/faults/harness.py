"""One host that is brought up, disturbed and looked at: what the checks of the scenario faults work with."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparison import Moment, State
from leash import KILLED

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent
URL, KEY_FILE, MODEL = "http://127.0.0.1:8444", "/etc/gateway/private/api-key", "SmolLM2-135M-Instruct"
BOOT_SECONDS = 60
TASK = "TASK ["
# HAProxy asks engines every 2 s, and takes one back after its first good answer.
BACK_SECONDS = 10


@dataclass
class Run:
    """A run of a playbook: how it ended, what it printed, how long it took."""

    code: int
    output: str
    seconds: float
    # When each task began, in seconds of the run.
    starts: list[float] = field(default_factory=list)

    def was_cut(self) -> bool:
        """Tell whether the run was killed, rather than that it ended by itself."""
        return self.code == KILLED

    def task(self) -> str:
        """Return the task that ran last."""
        found = re.findall(r"^TASK \[(.*)\]", self.output, re.MULTILINE)
        return str(found[-1]) if found else "before the first task"

    def longest(self, count: int = 8) -> str:
        """Return the tasks that took longest, with their seconds."""
        names = re.findall(r"^TASK \[(.*)\]", self.output, re.MULTILINE)
        ends = [*self.starts[1:], self.seconds]
        taken = [(end - start, name) for start, end, name in zip(self.starts, ends, names, strict=False)]
        return ", ".join(f"{name} {seconds:.1f} s" for seconds, name in sorted(taken, reverse=True)[:count])

    def failure(self) -> str:
        """Return what went wrong, on one line."""
        found = re.findall(r"^fatal: .*?(?=^\S*(?:TASK|PLAY|NO MORE)\b)", self.output, re.MULTILINE | re.DOTALL)
        return " ".join((found[-1] if found else self.output[-2000:]).split())

    def changed(self) -> int:
        """Return how many tasks changed something, over all hosts."""
        return sum(map(int, re.findall(r"\bchanged=(\d+)", self.output)))


@dataclass
class Host:
    """A test host and the inventories that say what it is to be."""

    name: str
    inventories: list[str]
    image: str = ""
    variables: dict[str, Any] = field(default_factory=dict)

    def hosts(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run script/hosts."""
        command = [str(ROOT / "script/hosts"), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{shlex.join(command)}: {done.stdout}{done.stderr}")
        return done

    def reset(self) -> None:
        """Have the host as it was before anything ran on it."""
        self.hosts("down", self.name)
        self.hosts("up", self.name, *(["--image", self.image] if self.image else []))

    def cut_power(self) -> None:
        """Stop everything on the host in one moment."""
        self.hosts("podman", "kill", "--signal=KILL", f"selfhost-{self.name}")

    def boot(self) -> None:
        """Boot the host. Services that still settle are no fault of the boot, so only SSH is waited for."""
        self.hosts("up", self.name, check=False)
        deadline = time.monotonic() + BOOT_SECONDS
        while self.ssh("true", check=False).returncode:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} does not answer {BOOT_SECONDS} s after its boot")
            time.sleep(0.2)

    def ssh(self, command: str, text: str = "", *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a shell command on the host."""
        words = ["ssh", "-F", str(ROOT / ".lab/ssh/config"), "-o", "ConnectTimeout=5", self.name, command]
        return subprocess.run(words, input=text, capture_output=True, text=True, check=check)

    def told(self, *arguments: str) -> State:
        """Run state.py on the host and return what it prints."""
        program = (FOLDER / "state.py").read_text(encoding="utf-8")
        words = " ".join(map(shlex.quote, (URL, KEY_FILE, MODEL, *arguments)))
        found: State = json.loads(self.ssh(f"python3 - {words}", program).stdout)
        return found

    def state(self) -> State:
        """Return what state.py tells, once the gateway has had its time to find the engines up."""
        deadline = time.monotonic() + BACK_SECONDS
        while (servers := self.told("servers")["servers"]) and set(servers.values()) != {"up"}:
            if time.monotonic() > deadline:
                break
            time.sleep(0.5)
        return self.told()

    def answer(self) -> str:
        """Return how the model answers a client of the gateway, or why it does not."""
        return str(self.told("answer")["answer"])

    def play(
        self, playbook: str = "site.yml", *, cut: Moment | None = None, power: Host | None = None, **variables: Any
    ) -> Run:
        """Run a playbook to its end, or kill its controller at a moment; the power of a host is cut with it.

        Each run has connections of its own, as each run of another controller has.
        """
        with tempfile.TemporaryDirectory(prefix="f.") as folder:
            environment = {
                **os.environ,
                "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
                "ANSIBLE_FORCE_COLOR": "0",
                # Else a task is told of when it has ended, and not when it began.
                "ANSIBLE_DISPLAY_SKIPPED_HOSTS": "1",
                "ANSIBLE_SSH_CONTROL_PATH_DIR": f"{folder}/cp",
                "PYTHONUNBUFFERED": "1",
            }
            extra, log = Path(folder, "extra.json"), Path(folder, "log")
            extra.write_text(json.dumps({**self.variables, **variables}), encoding="utf-8")
            command = [
                sys.executable,
                str(FOLDER / "leash.py"),
                str(Path(sys.executable).with_name("ansible-playbook")),
            ]
            command += [playbook, *(word for path in self.inventories for word in ("-i", path)), "-e", f"@{extra}"]
            began = time.monotonic()
            with (
                log.open("w") as stream,
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
                ) as process,
            ):
                try:
                    starts = watch(process, log, cut, began)
                    if power and process.poll() is None:
                        power.cut_power()
                finally:
                    process.terminate()
                code = process.wait()
            return Run(code, log.read_text(encoding="utf-8", errors="replace"), time.monotonic() - began, starts)


def watch(process: subprocess.Popen[bytes], log: Path, cut: Moment | None, began: float) -> list[float]:
    """Wait for the end of a run, or for the moment to cut it; return when each task began."""
    starts: list[float] = []
    text = ""
    with log.open(encoding="utf-8", errors="replace") as stream:
        while process.poll() is None:
            text += stream.read()
            starts += [time.monotonic() - began] * (text.count(TASK) - len(starts))
            reached = not cut or not cut.task or len(starts) >= cut.task
            since = (starts[cut.task - 1] if cut.task else 0.0) if cut and reached else 0.0
            if cut and reached and time.monotonic() - began - since >= cut.seconds:
                break
            time.sleep(0.02)
    return starts
