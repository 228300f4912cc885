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

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent
URL, KEY_FILE, MODEL = "http://127.0.0.1:8444", "/etc/gateway/private/api-key", "SmolLM2-135M-Instruct"
BOOT_SECONDS = 60
ANSWER_SECONDS = 60


@dataclass
class Run:
    """A run of a playbook: how it ended, what it printed, how long it took."""

    code: int
    output: str
    seconds: float

    def task(self) -> str:
        """Return the task that ran last."""
        found = re.findall(r"^TASK \[(.*)\]", self.output, re.MULTILINE)
        return str(found[-1]) if found else "before the first task"

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

    def told(self, *arguments: str) -> dict[str, Any]:
        """Run state.py on the host and return what it prints."""
        program = (FOLDER / "state.py").read_text(encoding="utf-8")
        words = " ".join(map(shlex.quote, (URL, KEY_FILE, MODEL, *arguments)))
        found: dict[str, Any] = json.loads(self.ssh(f"python3 - {words}", program).stdout)
        return found

    def state(self) -> dict[str, Any]:
        """Return files, units, packages and the answer of the model, which may take its time on a busy machine."""
        found = self.told()
        deadline = time.monotonic() + ANSWER_SECONDS
        while found["answer"].startswith("no answer") and time.monotonic() < deadline:
            time.sleep(1)
            found["answer"] = self.answer()
        return found

    def answer(self) -> str:
        """Return how the model answers a client of the gateway, or why it does not."""
        return str(self.told("answer")["answer"])

    def play(
        self, playbook: str = "site.yml", *, cut_after: float | None = None, power: bool = False, **variables: Any
    ) -> Run:
        """Run a playbook to its end, or kill its controller after some seconds; ``power`` cuts the host's before.

        Each run has connections of its own, as each run of another controller has.
        """
        with tempfile.TemporaryDirectory(prefix="f.") as folder:
            environment = {
                **os.environ,
                "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
                "ANSIBLE_FORCE_COLOR": "0",
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
                    process.wait(cut_after)
                except subprocess.TimeoutExpired:
                    if power:
                        self.cut_power()
                finally:
                    process.terminate()
                code = process.wait()
            return Run(code, log.read_text(encoding="utf-8", errors="replace"), time.monotonic() - began)
