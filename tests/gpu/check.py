#!/usr/bin/env python3
"""Prove on a GPU host that LMDeploy serves as our roles set it up, and write what was seen as JSON.

Everything is brought up by site.yml itself, from a generated inventory of this one host: environment from the lock,
unit, launcher, key. Each step then looks at the running engine as a client, as root, or from inside the unit, and
writes its findings into the report at once, so that a broken run still tells what came before. Steps need what
``provision`` and ``models`` left, and nothing of each other. Started by script/gpu-check, as root, on the GPU host.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime as dt
import json
import os
import platform
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from load import AskError, Engine, load

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
WORK = Path("/var/lib/gpu-check")
MODELS = WORK / "models"
UNIT = "api-server.service"
PORT = 23390
KEY_FILE = Path("/etc/api-server/api-key")
FRANCE = "What is the capital of France? Answer in one sentence."
# Outside of loopback, and nobody's: documentation addresses.
OUTSIDE = "198.51.100.7"
# What every case starts from: a small share of the cards, since the models are small.
PLAIN = {
    "api_server_engine": "lmdeploy",
    "api_server_port": PORT,
    "api_server_cache_max_entry_count": 0.2,
    "api_server_start_timeout_seconds": 150,
}
# Two candidates nearer than this are a toss-up: bf16 has steps of 0.125 where logits are between 16 and 32.
TOSS_UP = 0.25
# A cut that goes wrong shows in the first tokens. So many equal ones before the partings leave no chance.
ENOUGH_TOKENS = 48
# What ``parity`` can take back from the unit, to see what costs how much.
SECCOMP = (
    "SystemCallFilter=",
    "SystemCallArchitectures=",
    "RestrictAddressFamilies=",
    "RestrictNamespaces=no",
    "RestrictRealtime=no",
    "RestrictSUIDSGID=no",
    "LockPersonality=no",
    "ProtectHostname=no",
    "ProtectClock=no",
    "ProtectKernelModules=no",
    "ProtectKernelLogs=no",
    "ProtectKernelTunables=no",
)
NETWORK = ("IPAddressDeny=", "IPAddressAllow=")
DEVICES = ("DevicePolicy=auto", "DeviceAllow=")
RELAXED = {
    "no_seccomp": SECCOMP,
    "no_network_filter": NETWORK,
    "no_device_filter": DEVICES,
    "unconfined": (
        *SECCOMP,
        *NETWORK,
        *DEVICES,
        "PrivateUsers=no",
        "PrivateTmp=no",
        "PrivateMounts=no",
        "ProtectSystem=no",
        "ProtectHome=no",
        "ProtectControlGroups=no",
        "ProtectProc=default",
    ),
}


def spent(process: int) -> dict[str, float]:
    """Return the seconds of processor time that a process and its threads took, and how often they were switched."""
    ticks = os.sysconf("SC_CLK_TCK")
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    switches = 0
    for status in Path(f"/proc/{process}/task").glob("*/status"):
        with contextlib.suppress(OSError):
            switches += sum(int(n) for n in re.findall(r"ctxt_switches:\s+(\d+)", status.read_text(encoding="ascii")))
    return {
        "user_seconds": int(fields[11]) / ticks,
        "system_seconds": int(fields[12]) / ticks,
        "context_switches": float(switches),
    }


class CheckError(Exception):
    """A finding that is not as it must be."""


def say(text: str) -> None:
    """Print a line of progress."""
    sys.stderr.write(f"gpu-check: {text}\n")
    sys.stderr.flush()


def expect(truth: object, text: str) -> None:
    """Raise CheckError unless something holds."""
    if not truth:
        raise CheckError(text)


def run(*command: str, seconds: float = 120.0, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run a command with its output captured."""
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, timeout=seconds, **settings
    )


def output(*command: str) -> str:
    """Return what a command printed, '' where it failed."""
    try:
        done = run(*command)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def png(width: int, height: int) -> str:
    """Return a picture of coloured stripes as a data URL."""
    rows = b"".join(
        b"\0" + bytes(value for x in range(width) for value in (x % 256, y % 256, (x ^ y) % 256)) for y in range(height)
    )

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(whole).decode()


def picture(url: str, text: str = "What is this?") -> list[dict[str, Any]]:
    """Return a message with one picture."""
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]


def index_of(wheels: Path, index: Path) -> str:
    """Write a package index (PEP 503) over a folder of wheels; return its URL, as mirrors_pip_index_url takes it."""
    pages: dict[str, list[str]] = {}
    for wheel in sorted(wheels.glob("*.whl")):
        name = re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()
        pages.setdefault(name, []).append(f'<a href="{wheel.as_uri()}">{wheel.name}</a>')
    for name, links in pages.items():
        (index / name).mkdir(parents=True, exist_ok=True)
        (index / name / "index.html").write_text("\n".join(links) + "\n", encoding="utf-8")
    return index.as_uri()


def foreign_engines(instances: Path = Path("/etc/api-server")) -> list[str]:
    """Return the engines of this host that serve something else than the models made here."""
    files = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in instances.glob("*.json")}
    return sorted(name for name, engine in files.items() if not engine["model_path"].startswith(f"{MODELS}/"))


class Check:
    """One run: its host, its options and its report."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Begin a report, or go on with the one that is there."""
        self.options = options
        self.path: Path = options.report
        self.report: dict[str, Any] = {}
        if self.path.exists() and options.resume:
            self.report = json.loads(self.path.read_text(encoding="utf-8"))
        self.report.setdefault("steps", {})
        self.gpus = len(output("nvidia-smi", "-L").splitlines())

    # -- the report -------------------------------------------------------------------------

    def write(self) -> None:
        """Write the report in one step."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(self.path)

    def step(self, name: str, action: Callable[[dict[str, Any]], None]) -> None:
        """Run one step; what it found stays, whether it ends well or not."""
        found: dict[str, Any] = {}
        self.report["steps"][name] = found
        say(f"{name} ...")
        began = time.monotonic()
        try:
            action(found)
            found["result"] = found.get("result", "passed")
        except CheckError as fault:
            found["result"] = f"failed: {fault}"
        except Exception as fault:  # noqa: BLE001  # whatever went wrong is a finding, and the next step goes on
            found["result"] = f"failed: {type(fault).__name__}: {fault}"
            found["where"] = traceback.format_exc().splitlines()[-6:]
        if str(found["result"]).startswith("failed"):
            found["journal"] = self.journal()[-25:]
        found["step_seconds"] = round(time.monotonic() - began, 1)
        self.write()
        say(f"{name}: {found['result']} ({found['step_seconds']} s)")

    # -- the host ---------------------------------------------------------------------------

    def play(self, variables: dict[str, Any], *arguments: str) -> tuple[int, str, float]:
        """Run site.yml on this host; return exit code, output and seconds."""
        WORK.mkdir(parents=True, exist_ok=True)
        # Ansible's YAML inventory plugin reads JSON too, by this ending.
        inventory, extra = WORK / "hosts.json", WORK / "case.json"
        host = {"ansible_connection": "local", "ansible_python_interpreter": "/usr/bin/python3"}
        inventory.write_text(
            json.dumps({"all": {"hosts": {"gpu-host": host}}, "model_servers": {"hosts": {"gpu-host": None}}}),
            encoding="utf-8",
        )
        extra.write_text(json.dumps({**self.options.variables, **PLAIN, **variables}), encoding="utf-8")
        began = time.monotonic()
        done = run(
            str(Path(sys.executable).with_name("ansible-playbook")),
            "site.yml",
            "-i",
            str(inventory),
            "-e",
            f"@{extra}",
            *arguments,
            seconds=1500,
            cwd=CHECKOUT,
            env={**os.environ, "ANSIBLE_CONFIG": str(CHECKOUT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"},
        )
        return done.returncode, done.stdout + done.stderr, round(time.monotonic() - began, 1)

    def bring_up(self, found: dict[str, Any], model: str, **variables: Any) -> Engine:
        """Have an engine by site.yml; note how that went, and return the way to it."""
        code, text, seconds = self.play({"api_server_model": str(MODELS / model), **variables})
        recap = re.findall(r"ok=\d+ +changed=\d+ .*", text)
        found["site"] = {"seconds": seconds, "rc": code, "recap": recap[-1].split() if recap else []}
        if code:
            found["site"]["message"] = self.message(text)
            raise CheckError("site.yml did not end well")
        name = variables.get("api_server_model_name") or model
        engine = Engine(PORT, name, KEY_FILE.read_text(encoding="ascii").split()[0])
        ready = [line for line in self.journal() if "answers after" in line]
        found["launcher"] = ready[-1] if ready else "no word"
        return engine

    @staticmethod
    def message(text: str) -> list[str]:
        """Return the lines of a play's failure."""
        lines = text.splitlines()
        start = next((n for n, line in enumerate(lines) if re.match(r"fatal|.*(FAILED|ERROR)", line)), 0)
        return [line.rstrip() for line in lines[start : start + 40]]

    @staticmethod
    def journal(lines: int = 200) -> list[str]:
        """Return the end of the unit's journal."""
        return output("journalctl", "-u", UNIT, "-n", str(lines), "--no-pager", "-o", "cat").splitlines()

    @staticmethod
    def shown(*names: str) -> dict[str, str]:
        """Return properties of the unit."""
        text = output("systemctl", "show", UNIT, f"--property={','.join(names)}")
        return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)

    def release(self) -> Path:
        """Return the folder of LMDeploy's environment."""
        return Path("/opt/miniconda3/envs/lmdeploy").resolve()

    # -- steps ------------------------------------------------------------------------------

    def host(self, found: dict[str, Any]) -> None:
        """Say what this machine is."""
        query = "index,name,driver_version,memory.total,compute_cap,mig.mode.current"
        found["gpus"] = output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").splitlines()
        found["topology"] = output("nvidia-smi", "topo", "-m").splitlines()
        found["system"] = platform.freedesktop_os_release().get("PRETTY_NAME", "")
        found["kernel"] = platform.release()
        found["systemd"] = output("systemctl", "--version").splitlines()[:1]
        found["cpus"] = os.cpu_count()
        found["ansible"] = output(str(Path(sys.executable).with_name("ansible-playbook")), "--version").splitlines()[:1]
        expect(self.gpus, "nvidia-smi lists no GPU")
        expect(output("systemctl", "is-system-running") in ("running", "degraded"), "systemd does not run here")

    def provision(self, found: dict[str, Any]) -> None:
        """Have conda and the locked environment by the roles, and look at what the lock gave."""
        tags = ("--tags", "mirrors,miniconda,lmdeploy", "--skip-tags", "preflight")
        code, text, found["seconds"] = self.play({}, *tags)
        found["recap"] = re.findall(r"ok=\d+ +changed=\d+ .*", text)
        found["slowest"] = [line for line in text.splitlines() if "tasks ran" in line]
        if code:
            found["message"] = self.message(text)
            raise CheckError("the environment was not built")
        kept = json.loads((self.release() / "lmdeploy.json").read_text(encoding="utf-8"))
        found["turbomind_loaded_with_driver"], found["libraries"] = kept["driver"], kept["libraries"]
        program = (
            "import importlib.metadata as m, json; names=sorted(d.metadata['Name'] for d in m.distributions());"
            "wanted=('nvidia','torch','lmdeploy','transformers','triton','timm','partial','ray');"
            "print(json.dumps({n: m.version(n) for n in names if n.startswith(wanted)}))"
        )
        found["versions"] = json.loads(output(str(self.release() / "bin/python"), "-I", "-c", program))
        _, text, found["second_run_seconds"] = self.play({}, *tags)
        found["second_run"] = re.findall(r"changed=\d+", text)
        expect(found["second_run"] == ["changed=0"], "a second run changed something")

    def models(self, found: dict[str, Any]) -> None:
        """Make the models, unless they are given."""
        MODELS.mkdir(parents=True, exist_ok=True)
        for kind, source in (
            ("text", self.options.gguf),
            ("heads", MODELS / "text"),
            ("large", MODELS / "text"),
            ("vision", None),
        ):
            if kind == "text" and self.options.text_model:
                link = MODELS / "text"
                if not link.exists():
                    link.symlink_to(self.options.text_model)
                continue
            if kind == "text" and source is None:
                raise CheckError("name a text model with --text-model DIR, or --gguf FILE --gguf-package DIR")
            paths = [str(source)] * bool(source) + [str(MODELS / kind)]
            environment = {**os.environ, "PYTHONPATH": str(self.options.gguf_package or ""), "HOME": str(WORK)}
            done = run(
                str(self.release() / "bin/python"), str(HERE / "models.py"), kind, *paths, seconds=600, env=environment
            )
            expect(done.returncode == 0, f"the {kind} model was not made: {done.stderr[-600:]}")
            found[kind] = sorted(f"{path.name} {path.stat().st_size}" for path in (MODELS / kind).iterdir())

    def text(self, found: dict[str, Any]) -> None:
        """TurboMind on one GPU: right answer, key enforced and out of sight, what is loaded, what it costs."""
        engine = self.bring_up(found, "text", api_server_tp=1)
        _, text, _ = self.play({"api_server_model": str(MODELS / "text"), "api_server_tp": 1})
        found["second_run"] = re.findall(r"changed=\d+", text)
        answer = engine.chat(FRANCE, max_tokens=32)
        found["question"], found["answer"] = FRANCE, answer["choices"][0]["message"]["content"]
        found["usage"] = answer["usage"]
        found["without_key"] = self.refusal(Engine(PORT, engine.model, ""))
        found["with_a_wrong_key"] = self.refusal(Engine(PORT, engine.model, "x" * 48))
        names = ("Type", "ActiveState", "StatusText", "MainPID", "WatchdogUSec", "NRestarts", "MemoryCurrent")
        found["unit"] = self.shown(*names)
        pid = found["unit"]["MainPID"]
        found["key_in_process_list"] = engine.key in output("ps", "-eo", "args", "--no-headers", "-ww")
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        found["key_in_environment"] = engine.key in environment
        found["key_in_journal"] = engine.key in "\n".join(self.journal(2000))
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
        wanted = r"\S*/lib(?:nccl|cublas|cublasLt|cudart|cudnn|cuda)\.so\S*"
        found["libraries_loaded"] = sorted(set(re.findall(wanted, maps)))
        found["backend_loaded"] = "turbomind" if "_turbomind" in maps else "pytorch"
        used = "--query-compute-apps=pid,used_memory"
        found["gpu_memory"] = output("nvidia-smi", used, "--format=csv,noheader").splitlines()
        found["listens_on"] = [
            line.split()[3] for line in output("ss", "-Hltn").splitlines() if line.split()[3].endswith(f":{PORT}")
        ]
        found["security"] = output("systemd-analyze", "security", "--no-pager", UNIT).splitlines()[-1:]
        found["unit_file"] = output("systemctl", "cat", UNIT).splitlines()
        found["management"] = {path: self.status(engine, path) for path in ("/terminate", "/is_sleeping", "/metrics")}
        expect("Paris" in found["answer"], "the answer is wrong")
        expect(found["without_key"] == 401 and found["with_a_wrong_key"] == 401, "the key is not enforced")
        hidden = ("key_in_process_list", "key_in_environment", "key_in_journal")
        expect(not any(found[name] for name in hidden), "the key can be seen")
        expect(found["second_run"] == ["changed=0"], "a second run changed something")
        expect(found["backend_loaded"] == "turbomind", "TurboMind is not what serves")

    @staticmethod
    def refusal(engine: Engine) -> int:
        """Return the HTTP status of a chat; 200 means that it was let in."""
        try:
            engine.chat("Hello", max_tokens=1)
        except AskError as fault:
            return int(fault.status)
        return 200

    @staticmethod
    def status(engine: Engine, path: str) -> int:
        """Return the HTTP status that a path answers without a key."""
        try:
            Engine(engine.port, engine.model, "").call(path)
        except AskError as fault:
            return int(fault.status)
        return 200

    def directives(self, found: dict[str, Any]) -> None:
        """Put a probe in the engine's place: what the unit forbids must be stopped, what it grants must work."""
        self.bring_up(found, "text", api_server_tp=1)
        unit = Path(f"/etc/systemd/system/{UNIT}").read_text(encoding="utf-8")
        device, probe = Path("/dev/gpu-check"), Path("/run/systemd/system/api-server-probe.service")
        program = Path("/usr/local/lib/api-server/gpu_check_probe.py")
        run("systemctl", "stop", UNIT)
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(self.outside())
            if not device.exists():
                # A loop device stands for any device that is no GPU's; no directive but the device filter stops it.
                os.mknod(device, 0o666 | 0o060000, os.makedev(7, 0))
                device.chmod(0o666)
            stack.callback(device.unlink, missing_ok=True)
            Path("/home/probe").mkdir(exist_ok=True)
            stack.callback(shutil.rmtree, "/home/probe", ignore_errors=True)
            shutil.copy(HERE / "probe.py", program)
            stack.callback(program.unlink, missing_ok=True)
            command = f"{self.release()}/bin/python {program} {OUTSIDE} {server} {device}"
            text = re.sub(r"(?m)^ExecStart=.*$", f"ExecStart={command}", unit)
            text = re.sub(r"(?m)^Type=.*$", "Type=oneshot", text)
            text = re.sub(r"(?m)^(WatchdogSec|Restart\w*|ExecReload)=.*\n", "", text)
            probe.write_text(text, encoding="utf-8")
            stack.callback(run, "systemctl", "daemon-reload")
            stack.callback(probe.unlink, missing_ok=True)
            run("systemctl", "daemon-reload")
            # Without the unit everything is allowed, or the probe would prove nothing.
            bare = run(str(self.release() / "bin/python"), str(program), OUTSIDE, str(server), str(device))
            run("systemctl", "start", probe.name)
            said = output("journalctl", "-u", probe.name, "-n", "20", "--no-pager", "-o", "cat")
        lines = [line for line in said.splitlines() if line.startswith('{"stopped"')]
        expect(lines, f"the probe said nothing: {said[-800:]}")
        found["inside"] = json.loads(lines[-1])
        found["as_root_outside"] = json.loads(bare.stdout)["stopped"] if bare.returncode == 0 else bare.stderr[-300:]
        allowed = [name for name, word in found["inside"]["stopped"].items() if word == "allowed"]
        denied = [name for name, word in found["inside"]["granted"].items() if word != "allowed"]
        expect(not allowed, f"not stopped: {', '.join(allowed)}")
        expect(not denied, f"not granted: {', '.join(denied)}")

    @contextlib.contextmanager
    def outside(self) -> Iterator[int]:
        """Have an address outside of loopback on which something listens; yield the port."""
        run("ip", "link", "add", "gpucheck", "type", "dummy")
        run("ip", "address", "add", f"{OUTSIDE}/32", "dev", "gpucheck")
        device = "gpucheck"
        if OUTSIDE not in output("ip", "address", "show"):
            device = "lo"
            run("ip", "address", "add", f"{OUTSIDE}/32", "dev", device)
        try:
            with socket.create_server((OUTSIDE, 0)) as server:
                yield int(server.getsockname()[1])
        finally:
            run("ip", "link", "delete", "gpucheck")
            run("ip", "address", "delete", f"{OUTSIDE}/32", "dev", device)

    def vision(self, found: dict[str, Any]) -> None:
        """Pictures: one tile and seven tiles cost the tokens that InternVL3's geometry says; no way to other places."""
        engine = self.bring_up(found, "vision", api_server_tp=1)
        self.pictures(found, engine)
        found["places"] = {}
        for url in ("file:///etc/passwd", f"http://127.0.0.1:{PORT}/health", f"http://{OUTSIDE}/a.png"):
            try:
                answer = engine.chat(picture(url), max_tokens=1, timeout=30)
                found["places"][url] = f"answered, {answer['usage']['prompt_tokens']} prompt tokens"
            except AskError as fault:
                found["places"][url] = str(fault)[:300]
        expect(not any(word.startswith("answered") for word in found["places"].values()), "a place was read")

    def pictures(self, found: dict[str, Any], engine: Engine) -> None:
        """Ask about pictures of known geometry."""
        used = {}
        for name, url in (("448x448", png(448, 448)), ("1344x896", png(1344, 896))):
            answer = engine.chat(picture(url), max_tokens=8, ignore_eos=True)
            used[name] = answer["usage"]["prompt_tokens"]
            expect(answer["usage"]["completion_tokens"] == 8, f"{name} got no answer")
        used["no picture"] = engine.chat([{"type": "text", "text": "What is this?"}], max_tokens=1)["usage"][
            "prompt_tokens"
        ]
        found["prompt_tokens"] = used
        # 1344 x 896 is cut into 3 x 2 tiles, and a thumbnail is added: 7 tiles of 256 tokens against 1.
        found["six_more_tiles"] = used["1344x896"] - used["448x448"]
        found["one_tile_and_its_marks"] = used["448x448"] - used["no picture"]
        expect(found["six_more_tiles"] == 6 * 256, "six more tiles are not 1536 tokens")
        expect(256 <= found["one_tile_and_its_marks"] <= 264, "one tile is not 256 tokens and a few marks")

    # Triton compiles kernels at the first start.
    PYTORCH: ClassVar = {"api_server_backend": "pytorch", "api_server_start_timeout_seconds": 300}

    def pytorch(self, found: dict[str, Any]) -> None:
        """The same with LMDeploy's PyTorch backend on one GPU."""
        engine = self.bring_up(found, "text", api_server_tp=1, **self.PYTORCH)
        found["answer"] = engine.chat(FRANCE, max_tokens=32)["choices"][0]["message"]["content"]
        found["without_key"] = self.refusal(Engine(PORT, engine.model, ""))
        expect("Paris" in found["answer"], "the answer is wrong")
        expect(found["without_key"] == 401, "the key is not enforced")
        found["vision"] = {}
        engine = self.bring_up(found["vision"], "vision", api_server_tp=1, **self.PYTORCH)
        self.pictures(found["vision"], engine)

    QUESTIONS = (
        FRANCE,
        "Name three colours.",
        "What do bees make?",
        "How many days has a week?",
        "What is the opposite of hot?",
        "Write one sentence about the sea.",
    )

    def continuations(self, engine: Engine) -> list[str]:
        """Return what a model says to a few prompts at temperature 0."""
        return [engine.chat(question, max_tokens=48)["choices"][0]["message"]["content"] for question in self.QUESTIONS]

    def partings(self, model: str, answers: list[tuple[str, str]]) -> list[dict[str, Any]]:
        """Return where answers that should be equal part, and how near their next tokens are to a reference."""
        parted = [[q, *pair] for q, pair in zip(self.QUESTIONS, answers, strict=True) if pair[0] != pair[1]]
        if not parted:
            return []
        command = (str(self.release() / "bin/python"), str(HERE / "models.py"), "odds", str(MODELS / model))
        done = run(*command, json.dumps(parted), seconds=300, env={**os.environ, "HOME": str(WORK)})
        expect(done.returncode == 0, f"the reference was not asked: {done.stderr[-600:]}")
        return [dict(parting) for parting in json.loads(done.stdout.splitlines()[-1])]

    def tensor_parallel(self, found: dict[str, Any]) -> None:
        """A model cut over the GPUs says what it says on one, wherever that is no toss-up between two tokens."""
        expect(self.gpus > 1, "there is one GPU")
        alone = self.continuations(self.bring_up(found.setdefault("tp1", {}), "heads", api_server_tp=1))
        tp = 2
        while tp <= min(self.gpus, 8):
            part = found.setdefault(f"tp{tp}", {})
            cut = self.continuations(self.bring_up(part, "heads", api_server_tp=tp))
            part["first_answer"], part["of"] = cut[0], len(alone)
            part["partings"] = self.partings("heads", list(zip(alone, cut, strict=True)))
            part["equal_answers"] = len(alone) - len(part["partings"])
            part["listens_on"] = sorted({line.split()[3] for line in output("ss", "-Hltn").splitlines()})
            memory = "--query-gpu=index,memory.used"
            part["gpu_memory"] = output("nvidia-smi", memory, "--format=csv,noheader").splitlines()
            wrong = [parting for parting in part["partings"] if parting["lead"] > TOSS_UP]
            expect(not wrong, f"tp {tp} says something else than tp 1")
            part["equal_tokens"] = sum(parting["at_token"] for parting in part["partings"])
            told = part["equal_answers"] or part["equal_tokens"] >= ENOUGH_TOKENS
            expect(told, f"tp {tp} says the same as tp 1 too rarely to prove it")
            tp *= 2
        found["vision"] = {}
        self.pictures(found["vision"], self.bring_up(found["vision"], "vision", api_server_tp=2))

    def tensor_parallel_pytorch(self, found: dict[str, Any]) -> None:
        """The PyTorch backend over two GPUs: Ray must stay on loopback, and a stopped worker is noticed."""
        expect(self.gpus > 1, "there is one GPU")
        chosen = {"api_server_extra_args": ["--distributed-executor-backend", self.options.executor]}
        engine = self.bring_up(
            found, "heads", api_server_tp=2, **self.PYTORCH, **(chosen if self.options.executor else {})
        )
        found["continuations"] = self.continuations(engine)
        found["listens_on"] = sorted({line.split()[3] for line in output("ss", "-Hltn").splitlines()})
        workers = [line.split(None, 1) for line in output("ps", "-eo", "pid,args", "--no-headers", "-ww").splitlines()]
        found["processes"] = [args[:100] for _, args in workers if re.search(r"ray|multiprocessing|launcher", args)]
        parts = [int(pid) for pid, args in workers if re.search(r"ray::\w*[Ww]orker|multiprocessing.spawn", args)]
        expect(parts, "no worker process was found")
        self.stop_and_wait(found, engine, parts[:1])

    def too_many(self, found: dict[str, Any]) -> None:
        """More GPUs than there are: refused by preflight, and by the launcher where preflight was left out."""
        tp = 1 << self.gpus.bit_length()
        wish = {"api_server_model": str(MODELS / "heads"), "api_server_tp": tp}
        self.bring_up(found, "heads", api_server_tp=1)
        code, text, _ = self.play(wish)
        found["preflight"] = {"rc": code, "message": self.message(text)}
        found["engine_after_preflight"] = self.shown("ActiveState")["ActiveState"]
        code, text, found["seconds_without_preflight"] = self.play(wish, "--skip-tags", "preflight")
        found["launcher"] = {"rc": code, "message": self.message(text)}
        found["launcher_said"] = [line for line in self.journal(60) if line.startswith("launcher:")][-3:]
        found["engine_after_launcher"] = self.shown("ActiveState")["ActiveState"]
        expect(found["preflight"]["rc"] != 0 and found["launcher"]["rc"] != 0, "it was let through")
        expect(found["engine_after_preflight"] == "active", "preflight disturbed the engine")

    def seed(self, found: dict[str, Any]) -> None:
        """The recipe's command line as people type it, and then as our unit runs it."""
        run("systemctl", "stop", UNIT)
        model, tp = str(MODELS / "heads"), min(2, self.gpus)
        arguments = ["serve", "api_server", model, "--backend", "turbomind", "--server-port", str(PORT)]
        arguments += ["--tp", str(tp), "--chat-template", "internvl2_5"]
        found["by_hand"] = {"command": " ".join(["lmdeploy", *arguments])}
        done = run(str(self.release() / "bin/lmdeploy"), *arguments, seconds=180, env={**os.environ, "HOME": str(WORK)})
        found["by_hand"].update(rc=done.returncode, last_lines=(done.stdout + done.stderr).splitlines()[-3:])
        wish = {"api_server_model": model, "api_server_tp": tp, "api_server_chat_template": "internvl2_5"}
        code, text, _ = self.play(wish)
        found["by_preflight"] = {"rc": code, "message": self.message(text)}
        engine = self.bring_up(found.setdefault("by_our_unit", {}), "heads", api_server_tp=tp)
        found["by_our_unit"]["answers"] = bool(self.continuations(engine)[0])
        expect(found["by_hand"]["rc"] != 0 and code != 0, "the removed template was let through")

    def hang(self, found: dict[str, Any]) -> None:
        """Stop the engine's process under load: how long until systemd notices, and until the next good answer."""
        engine = self.bring_up(found, "text", api_server_tp=1)
        asking = threading.Thread(target=load, args=(engine, 8, 20.0), daemon=True)
        asking.start()
        time.sleep(5)
        self.stop_and_wait(found, engine, [int(self.shown("MainPID")["MainPID"])])

    def stop_and_wait(self, found: dict[str, Any], engine: Engine, processes: list[int]) -> None:
        """Send SIGSTOP, then wait for systemd's word and for the next good answer."""
        restarts = int(self.shown("NRestarts")["NRestarts"])
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        began = time.monotonic()
        found["stopped"] = len(processes)
        while time.monotonic() - began < 240:
            time.sleep(0.5)
            seconds = round(time.monotonic() - began, 1)
            if "noticed_after_seconds" not in found and self.shown("ActiveState")["ActiveState"] != "active":
                found["noticed_after_seconds"] = seconds
            if "noticed_after_seconds" in found:
                with contextlib.suppress(AskError):
                    engine.chat(FRANCE, max_tokens=4, timeout=5)
                    found["good_answer_after_seconds"] = round(time.monotonic() - began, 1)
                    break
        found["restarts"] = int(self.shown("NRestarts")["NRestarts"]) - restarts
        found["journal"] = [line for line in self.journal(400) if re.search("launcher:|atchdog|ignal", line)][-12:]
        expect(found.get("noticed_after_seconds", 999) <= 60, "systemd did not notice within 60 s")
        expect("good_answer_after_seconds" in found, "the engine did not come back")

    def parity(self, found: dict[str, Any]) -> None:
        """Tokens a second through our unit against the bare server, taking turns; other sides show what costs what."""
        unit = self.bring_up(found, "large", api_server_tp=1)
        instance = json.loads(self.instance_file().read_text(encoding="utf-8"))
        # The bare server has the same settings, and no name and no key.
        arguments = [*instance["arguments"]]
        if "--model-name" in arguments:
            del arguments[arguments.index("--model-name") : arguments.index("--model-name") + 2]
        command = [str(self.release() / "bin/lmdeploy"), "serve", "api_server", *arguments]
        found["bare_command"] = " ".join(["lmdeploy", *command[1:]])
        found["runs"] = []
        sides = self.options.sides.split(",")
        for _ in range(self.options.pairs):
            for side in sides:
                run("systemctl", "stop", UNIT)
                model = str(MODELS / "large")
                if side == "bare":
                    self.measure_process(found, side, command, Engine(PORT, model, ""))
                elif side == "key":
                    self.measure_process(found, side, [*command, "--api-keys", unit.key], Engine(PORT, model, unit.key))
                elif side in ("launcher", "service"):
                    launcher = self.instance_file().with_name("launcher.py")
                    started = [str(self.release() / "bin/python"), str(launcher)]
                    self.measure_process(found, side, started, unit, service=side == "service")
                else:
                    self.measure_unit(found, side, unit)
        found["ratio"] = {side: self.ratios(found["runs"], side) for side in sides if side != "bare"}
        failures = sum(r["failures"] for r in found["runs"])
        expect(not failures, f"{failures} requests failed")
        ours = found["ratio"].get("unit", {"": 1.0})
        expect(min(ours.values()) >= 0.98, f"the unit is slower: {ours}")

    @staticmethod
    def ratios(runs: list[dict[str, Any]], side: str) -> dict[str, float]:
        """Return a side's tokens a second as a part of the bare server's, by number of clients."""

        def rate(who: str, clients: int) -> float:
            return float(sum(r["tokens_per_second"] for r in runs if r["side"] == who and r["clients"] == clients))

        return {str(clients): round(rate(side, clients) / rate("bare", clients), 3) for clients in (1, 16, 64)}

    def measure_process(
        self, found: dict[str, Any], side: str, command: list[str], engine: Engine, *, service: bool = False
    ) -> None:
        """Measure an engine that is started here as root: as a child, or as a service without any restriction."""
        with tempfile.TemporaryDirectory() as credentials:
            shutil.copy(KEY_FILE, Path(credentials, "api-key"))
            shutil.copy(self.instance_file(), Path(credentials, "instance.json"))
            environment = {
                **os.environ,
                "HOME": str(WORK),
                "HF_HUB_OFFLINE": "1",
                "UVICORN_LOG_LEVEL": "warning",
                "CREDENTIALS_DIRECTORY": credentials,
            }
            if service:
                # --wait keeps systemd-run here as long as the service lives.
                handed = [f"--setenv={name}" for name in environment]
                command = ["systemd-run", "--quiet", "--wait", "--collect", "--unit=gpu-check", *handed, *command]
            with subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
            ) as process:
                try:
                    self.wait_for(engine)
                    pid = process.pid
                    if service:
                        pid = int(output("systemctl", "show", "gpu-check", "--property=MainPID", "--value"))
                    self.measure(found, side, engine, pid)
                finally:
                    if service:
                        run("systemctl", "stop", "gpu-check")
                    process.terminate()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(20)
                    process.kill()

    def measure_unit(self, found: dict[str, Any], side: str, engine: Engine) -> None:
        """Measure the unit, with the directives that its side names: by a name in RELAXED, or as unit[LINE LINE]."""
        folder = Path(f"/run/systemd/system/{UNIT}.d")
        lines = RELAXED.get(side, tuple(side.removeprefix("unit").strip("[]").split()))
        if lines:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "parity.conf").write_text("[Service]\n" + "".join(f"{line}\n" for line in lines))
        try:
            run("systemctl", "daemon-reload")
            run("systemctl", "start", UNIT, seconds=300)
            self.wait_for(engine)
            self.measure(found, side, engine, int(self.shown("MainPID")["MainPID"]))
        finally:
            (folder / "parity.conf").unlink(missing_ok=True)
            run("systemctl", "daemon-reload")

    @staticmethod
    def instance_file() -> Path:
        """Return the file of the running instance; its launcher lies beside it."""
        return Path("/etc/api-server/releases/api-server/current/instance.json").resolve()

    @staticmethod
    def wait_for(engine: Engine) -> None:
        """Wait until an engine answers."""
        for _ in range(240):
            with contextlib.suppress(AskError):
                engine.chat("Hello", max_tokens=1, timeout=10)
                return
            time.sleep(0.5)
        raise CheckError("no answer after two minutes")

    def measure(self, found: dict[str, Any], side: str, engine: Engine, process: int) -> None:
        """Load an engine with 1, 16 and 64 clients; note what it cost its process."""
        for clients in (1, 16, 64):
            load(engine, clients, 2.0)
            before = spent(process)
            figures = load(engine, clients, self.options.load_seconds).figures()
            after = spent(process)
            cost = {name: round(after[name] - before[name], 2) for name in after}
            found["runs"].append({"side": side, **figures, **cost})
            self.write()

    def flags(self, found: dict[str, Any]) -> None:
        """Settings reach the engine: its own words, and what they change."""
        settings = {
            "api_server_session_len": 2048,
            "api_server_max_batch_size": 16,
            "api_server_cache_max_entry_count": 0.05,
            "api_server_extra_args": ["--enable-prefix-caching", "--quant-policy", "8", "--log-level", "INFO"],
        }
        engine = self.bring_up(found, "text", api_server_tp=1, **settings)
        journal = "\n".join(self.journal(4000))
        said = re.findall(
            r"(session_len|max_batch_size|cache_max_entry_count|enable_prefix_caching|quant_policy)\W{1,4}([\w.]+)",
            journal,
        )
        # Python prints the policy by the name of its number.
        words = {"QuantPolicy.INT8": "8"}
        found["engine_says"] = sorted({f"{name}={words.get(value, value)}" for name, value in said})
        used = "--query-compute-apps=used_memory"
        found["gpu_memory_with_0.05"] = output("nvidia-smi", used, "--format=csv,noheader").splitlines()
        try:
            engine.chat("word " * 4000, max_tokens=8)
            found["longer_than_session"] = "answered"
        except AskError as fault:
            found["longer_than_session"] = str(fault)[:300]
        long = "The same long beginning. " * 60
        for name in ("first", "again"):
            began = time.monotonic()
            engine.chat(long + name, max_tokens=1)
            found[f"seconds_{name}"] = round(time.monotonic() - began, 4)
        found["answer"] = engine.chat(FRANCE, max_tokens=32)["choices"][0]["message"]["content"]
        expect("Paris" in found["answer"], "the answer is wrong with these settings")
        wanted = {"session_len=2048", "max_batch_size=16", "cache_max_entry_count=0.05"}
        wanted |= {"enable_prefix_caching=True", "quant_policy=8"}
        lost = sorted(wanted - set(found["engine_says"]))
        expect(not lost, f"the engine does not say {', '.join(lost)}")

    def rollback(self, found: dict[str, Any]) -> None:
        """A release that answers wrong gives way to the one before, by itself."""
        self.bring_up(found, "text", api_server_tp=1)
        before = self.current()
        wish = {"api_server_model": str(MODELS / "text"), "api_server_tp": 1, "api_server_session_len": 4096}
        gate = {"api_server_gate_question": FRANCE, "api_server_gate_expected": "London"}
        code, text, found["seconds"] = self.play({**wish, **gate})
        found["wrong_answer"] = {"rc": code, "message": self.message(text)}
        found["same_release_serves"] = self.current() == before
        engine = Engine(PORT, "text", KEY_FILE.read_text(encoding="ascii").split()[0])
        found["answer"] = engine.chat(FRANCE, max_tokens=32)["choices"][0]["message"]["content"]
        expect(code != 0 and found["same_release_serves"], "the wrong answer was let through")
        expect("Paris" in found["answer"], "the old release does not answer")
        code, text, found["seconds_of_a_good_switch"] = self.play({**wish, "api_server_gate_question": FRANCE})
        found["good_switch"] = {"rc": code, "other_release": self.current() != before}
        expect(code == 0 and found["good_switch"]["other_release"], "the good release was not taken")

    @staticmethod
    def current() -> str:
        """Return the id of the release that the engine's link names."""
        return Path("/etc/api-server/releases/api-server/current").resolve().name

    def cleanup(self, found: dict[str, Any]) -> None:
        """Remove the engine that was made for the check; environment and models stay for the next time."""
        found["stopped"] = run("systemctl", "disable", "--now", UNIT).returncode == 0


STEPS = [
    "host",
    "provision",
    "models",
    "text",
    "directives",
    "vision",
    "pytorch",
    "tensor_parallel",
    "tensor_parallel_pytorch",
    "too_many",
    "seed",
    "hang",
    "parity",
    "flags",
    "rollback",
    "cleanup",
]


def main() -> int:
    """Run the steps; the exit code tells whether all passed."""
    parser = argparse.ArgumentParser(prog="script/gpu-check", description="Prove LMDeploy on this GPU host.")
    parser.add_argument(
        "--report", type=Path, default=CHECKOUT / "artifacts/gpu-check.json", help="where the JSON goes"
    )
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run wrote into the report")
    parser.add_argument("--vars", type=Path, help="JSON file of inventory variables: mirrors, locks, a wheel folder")
    parser.add_argument("--wheels", type=Path, help="folder with the lock's wheels, for a host without an index")
    parser.add_argument("--text-model", type=Path, help="folder of a text model to serve in place of SmolLM2")
    parser.add_argument("--gguf", type=Path, help="GGUF file of SmolLM2-135M-Instruct, to make the text model of")
    parser.add_argument("--gguf-package", type=Path, help="folder with the Python package gguf")
    parser.add_argument("--steps", default=",".join(STEPS), help="which steps, separated by commas")
    parser.add_argument("--pairs", type=int, default=3, help="how often bare server and unit are measured")
    parser.add_argument(
        "--sides",
        default="bare,unit",
        help="what parity measures in turns: bare, key, launcher, service, unit, unit[DIRECTIVE=VALUE ...], "
        + ", ".join(RELAXED),
    )
    parser.add_argument(
        "--executor", default="", help="ray or mp for the PyTorch backend over GPUs; else its own choice"
    )
    parser.add_argument("--load-seconds", type=float, default=6.0, help="seconds for each measurement")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("run it as root: it installs services")
    options.variables = json.loads(options.vars.read_text(encoding="utf-8")) if options.vars else {}
    if options.wheels:
        options.variables["mirrors_pip_index_url"] = index_of(options.wheels.resolve(), WORK / "index")
    if foreign := foreign_engines():
        parser.error(f"{', '.join(foreign)} serves on this host, and its place would be taken: run it on another host")
    wanted = options.steps.split(",")
    unknown = [name for name in wanted if name not in STEPS]
    if unknown:
        parser.error(f"unknown step {', '.join(unknown)}; known are {', '.join(STEPS)}")
    check = Check(options)
    check.report.update(
        made=dt.datetime.now(tz=dt.timezone.utc).isoformat(timespec="seconds"),
        command=" ".join(["script/gpu-check", *sys.argv[1:]]),
        commit=output("git", "-C", str(CHECKOUT), "rev-parse", "HEAD") or options.variables.get("commit", ""),
    )
    for name in wanted:
        check.step(name, getattr(check, name))
    results = {name: str(found["result"]) for name, found in check.report["steps"].items()}
    failed = sorted(name for name, result in results.items() if result.startswith("failed"))
    say(f"{len(results) - len(failed)} passed, {len(failed)} failed{': ' + ', '.join(failed) if failed else ''}")
    say(f"the report is {check.path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
