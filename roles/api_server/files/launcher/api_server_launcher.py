# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Run a model engine in this process, with its key out of sight, and tell systemd the truth about it.

The unit of an instance starts this file with the Python of the engine's environment. systemd hands over two
credentials: ``instance.json`` (what to run, written by the role api_server, no secret in it) and ``api-key``: the key
in its first line, and in further lines keys that are valid beside it while it changes. Keys go to the engine inside
this process, so neither ``ps`` nor the unit shows them.

A thread watches the engine from outside, over HTTP, as a client would:

* while the model loads it tells ``systemctl status`` how far that is, and asks for more time as long as it advances;
* READY=1 is said when /health is good, /v1/models lists the model's name, and one token came back;
* from then on WATCHDOG=1 is said only when tokens were counted since the last look, or a one-token request was
  answered. An engine that is up but makes no tokens is therefore restarted by systemd.

``--reload FILE`` is what ``systemctl reload`` runs, as root: it hands the keys of the file to the running process,
which takes them in place of its own. LMDeploy only; llama.cpp reads its keys once.

``--check FILE`` judges an instance file with the installed engine's own parser, needs no GPU, and prints
``{"errors": [{"variable", "value", "message", "known"}]}``.

Exit codes: 78 for what a restart can't mend (the unit lists it in RestartPreventExitStatus), otherwise the engine's.
Needs nothing but Python 3.10 or later and the engine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import faulthandler
import functools
import http.client
import importlib
import json
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXIT_CONFIG = 78
# Loading counts as advancing when this much was read or taken into memory since the last look; below it is noise.
ADVANCE_BYTES = 4 << 20
# How much longer systemd waits after each sign of advance, once TimeoutStartSec is over.
EXTENSION_SECONDS = 60
LOOK_SECONDS = 1.0
# A first token may have to wait for kernels that are compiled on the spot.
FIRST_TOKEN_SECONDS = 300.0
# Fields of an instance file that earlier releases have not.
LATER = ("rank", "head")
# A host whose first host is gone tries so often, a second apart, before it begins anew.
HEAD_TRIES = 3
# Counters that grow only when an engine computes. LMDeploy's come without /metrics when --disable-metrics is given.
PROGRESS_COUNTERS = ("lmdeploy:generation_tokens_total", "lmdeploy:prompt_tokens_total", "llamacpp:n_decode_total")


class Refused(Exception):
    """What a restart can't mend: said in one message, with the way out."""


class Fault(Exception):
    """What may pass by itself, or with a restart: an engine that does not answer, a port that is still taken."""


@dataclasses.dataclass(frozen=True)
class Instance:
    """What the role api_server wrote for one engine."""

    name: str
    engine: str
    backend: str
    model_path: str
    model_name: str
    # Where a client on this host reaches the engine.
    host: str
    port: int
    # Arguments behind `lmdeploy serve api_server`, or `attribute=value` items for llama.cpp.
    arguments: list[str]
    # Which variable of the inventory each argument comes from, for messages.
    variables: dict[str, str]
    environment: dict[str, str]
    drain_seconds: int
    # Of a model over several hosts: which host this is, and where the first one waits for the others.
    rank: int = 0
    head: str = ""

    @classmethod
    def read(cls, path: Path) -> Instance:
        """Return the instance of a file, or refuse a file that is none."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            known = [
                field.name for field in dataclasses.fields(cls) if field.name in content or field.name not in LATER
            ]
            return cls(**{name: content[name] for name in known})
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"{path} is no instance file of the role api_server ({error!r}): run the playbook again."
            raise Refused(message) from error

    def variable(self, argument: str) -> str:
        """Return the name of the variable that an argument comes from; "" is the model."""
        return self.variables.get(argument, self.variables.get("*", "api_server_extra_args"))


# -- systemd ----------------------------------------------------------------------------------------------------------


class Systemd:
    """The service manager's side of the conversation: sd_notify(3) in a few lines, silent outside a unit."""

    def __init__(self) -> None:
        """Take what systemd handed over out of the environment, so that the engine's children don't inherit it."""
        address = os.environ.pop("NOTIFY_SOCKET", "")
        self.address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_seconds = int(os.environ.pop("WATCHDOG_USEC", "0")) / 1e6
        os.environ.pop("WATCHDOG_PID", None)

    def tell(self, *lines: str) -> None:
        """Send state lines such as READY=1; a manager that is gone is no reason to stop serving."""
        if not self.address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.sendto("\n".join(lines).encode(), self.address)


def say(text: str) -> None:
    """Write one line to the journal."""
    sys.stderr.write(f"launcher: {text}\n")
    sys.stderr.flush()


# -- the engine, seen by a client -------------------------------------------------------------------------------------


class Client:
    """Asks the engine over HTTP. Every fault is a Fault with a short text."""

    def __init__(self, host: str, port: int, model: str, key: str, *, leads: bool = True) -> None:
        """Keep where the engine listens, the model's name, the key, and whether it answers questions at all."""
        self.host, self.port, self.model, self.key, self.leads = host, port, model, key, leads
        self._asked = 0

    def request(self, path: str, body: dict[str, Any] | None = None, timeout: float = 10.0) -> bytes:
        """Return the body of a 200 answer."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body))
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        try:
            connection.request(method, path, data, headers)
            answer = connection.getresponse()
            content = answer.read()
        except ConnectionRefusedError:
            message = "the port is not open yet"
            raise Fault(message) from None
        except (OSError, http.client.HTTPException) as error:
            message = f"{path}: {error or type(error).__name__}"
            raise Fault(message) from None
        finally:
            connection.close()
        if answer.status != http.HTTPStatus.OK:
            message = f"{path}: HTTP {answer.status} {content[:200].decode(errors='replace')}"
            raise Fault(message)
        return content

    def health(self) -> str:
        """Return the status word of /health."""
        try:
            return str(json.loads(self.request("/health")).get("status", "ok"))
        except (ValueError, AttributeError):
            return "ok"

    def served(self) -> list[str]:
        """Return the names in /v1/models."""
        try:
            return [str(model["id"]) for model in json.loads(self.request("/v1/models"))["data"]]
        except (ValueError, KeyError, TypeError):
            message = "/v1/models: not the answer of an OpenAI-compatible server"
            raise Fault(message) from None

    def token(self, timeout: float) -> None:
        """Have one token made. The question changes each time, so that no cache can answer for a dead engine."""
        self._asked += 1
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": f"{self._asked}"}],
            "max_tokens": 1,
            "temperature": 0,
            "ignore_eos": True,
        }
        try:
            answer = json.loads(self.request("/v1/chat/completions", body, timeout))
            made = int(answer["usage"]["completion_tokens"])
        except (ValueError, KeyError, TypeError):
            made = 0
        if made < 1:
            message = "/v1/chat/completions: an answer without a token"
            raise Fault(message)

    def ready(self) -> str:
        """Return what proved that the engine serves: health, name and a token."""
        self.health()
        served = self.served()
        if self.model not in served:
            message = f"/v1/models lists {', '.join(served) or 'nothing'} instead of {self.model}"
            raise Fault(message)
        return self.alive(FIRST_TOKEN_SECONDS)

    def alive(self, timeout: float) -> str:
        """Return a sign of life: a token, or an engine that was put to sleep on request."""
        if self.health() == "sleeping":
            return "asleep on request"
        if not self.leads:
            # Only the first host of a model over several makes answers; it asks for all.
            return "it computes for the first host"
        began = time.monotonic()
        self.token(timeout)
        return f"a token took {time.monotonic() - began:.2f} s"

    def counted(self) -> float | None:
        """Return the sum of the counters that grow with every piece of work, or None where there are none."""
        try:
            lines = self.request("/metrics", timeout=5.0).decode(errors="replace").splitlines()
        except Fault:
            return None
        values = [line.rsplit(" ", 1) for line in lines if re.split(r"[{ ]", line, maxsplit=1)[0] in PROGRESS_COUNTERS]
        with contextlib.suppress(ValueError):
            return sum(float(value) for _labels, value in values) if values else None
        return None


# -- keys -------------------------------------------------------------------------------------------------------------


class Keys:
    """The keys that clients may send: the current one first, then those that are still valid beside it."""

    def __init__(self, path: Path) -> None:
        """Read them."""
        # Told of every change. LMDeploy's doorman, and our own client, which uses the first.
        self.takers: list[Callable[[list[str]], None]] = []
        self.valid = self._read(path)

    @staticmethod
    def _read(path: Path) -> list[str]:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            keys = [line.strip() for line in lines if line.strip()]
        except (OSError, ValueError) as error:
            message = f"the key is not to be had: {error}"
            raise Refused(message) from error
        if not keys:
            message = f"{path} holds no key: run the playbook again."
            raise Refused(message)
        return keys

    def renew(self, path: Path) -> None:
        """Take the keys of a file that was put there for this, and remove it; a bad one changes nothing."""
        try:
            self.valid = self._read(path)
        except Refused as refusal:
            say(f"the keys stay as they are: {refusal}")
            return
        finally:
            path.unlink(missing_ok=True)
        for taker in self.takers:
            taker(self.valid)
        say(f"{len(self.valid)} key(s) are valid from now on")


def hand_over(path: Path) -> None:
    """Give the keys of a root-only file to the running process of this unit: ExecReload=, as root, no sandbox.

    The folder belongs to the engine's user. So the file is made anew, and never through a link of that user's.
    """
    folder, keys = Path(os.environ["RUNTIME_DIRECTORY"]), path.read_bytes()
    owner = folder.stat()
    (folder / ".api-key").unlink(missing_ok=True)
    handle = os.open(folder / ".api-key", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o400)
    with os.fdopen(handle, "wb") as file:
        os.fchown(handle, owner.st_uid, owner.st_gid)
        file.write(keys)
    (folder / ".api-key").replace(folder / "api-key")
    os.kill(int(os.environ["MAINPID"]), signal.SIGHUP)


class Tie(threading.Thread):
    """Ends this process when the first host of a model over several is gone: the others have to join it anew.

    Without this an engine would wait in a collective call for ever, healthy as far as it knows.
    """

    def __init__(self, head: str) -> None:
        """Watch ``HOST:PORT``, which is open as long as the first host's engine lives."""
        super().__init__(name="launcher-tie", daemon=True)
        host, port = head.rsplit(":", 1)
        self.address = (host, int(port))

    def run(self) -> None:
        """Hold a connection; when it ends and can't be had again, end the process."""
        failures = 0
        while failures < HEAD_TRIES:
            try:
                with socket.create_connection(self.address, timeout=2) as line:
                    failures = 0
                    line.settimeout(None)
                    line.recv(1)
            except OSError:
                failures += 1
            time.sleep(1)
        say(f"the first host's engine at {self.address[0]}:{self.address[1]} is gone: beginning anew")
        os._exit(1)


class Attempt(threading.Thread):
    """One question asked in a thread of its own, so that a hung engine hangs only that thread."""

    def __init__(self, question: Callable[[], str]) -> None:
        """Ask at once."""
        super().__init__(name="launcher-attempt", daemon=True)
        self._question = question
        self.sign = ""
        self.fault = ""
        self.start()

    def run(self) -> None:
        """Keep the sign of life or the fault."""
        try:
            self.sign = self._question()
        except Fault as error:
            self.fault = str(error)


class LoadMeter:
    """How much this process and its children have read and hold in memory, from /proc."""

    def __init__(self) -> None:
        """Start at nothing."""
        self.read_bytes = 0
        self.memory_bytes = 0
        self._noted = 0

    @staticmethod
    def _family() -> Iterator[Path]:
        waiting = [os.getpid()]
        while waiting:
            pid = waiting.pop()
            yield Path(f"/proc/{pid}")
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    waiting.extend(int(child) for child in children.read_text(encoding="ascii").split())

    def advanced(self) -> bool:
        """Look again, and tell whether loading went on since the last advance."""
        read = memory = 0
        for process in self._family():
            with contextlib.suppress(OSError, ValueError):
                counters = dict(line.split(": ") for line in (process / "io").read_text(encoding="ascii").splitlines())
                # rchar counts what came by read(), read_bytes what a memory-mapped file took from the disk.
                read += max(int(counters["rchar"]), int(counters["read_bytes"]))
                memory += int((process / "statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
        self.read_bytes, self.memory_bytes = read, memory
        if abs(read + memory - self._noted) < ADVANCE_BYTES:
            return False
        self._noted = read + memory
        return True

    def __str__(self) -> str:
        """Return both figures for people."""
        return f"{self.read_bytes / 1e9:.1f} GB read, {self.memory_bytes / 1e9:.1f} GB in memory"


class Monitor(threading.Thread):
    """Watches the engine and talks to systemd until the process ends."""

    def __init__(
        self, client: Client, systemd: Systemd, look_seconds: float = LOOK_SECONDS, tie: Tie | None = None
    ) -> None:
        """Keep both sides, and what ties this host to the first one; begin with start()."""
        super().__init__(name="launcher-monitor", daemon=True)
        self._client, self._systemd, self._look_seconds = client, systemd, look_seconds
        self.stopping = threading.Event()
        self._tie = tie

    def stop(self) -> None:
        """Say that the engine ends on request: from now on its silence is no fault."""
        self.stopping.set()
        self._systemd.tell("STOPPING=1", f"STATUS=Letting open streams of {self._client.model} end")

    def run(self) -> None:
        """Wait until the engine serves, then feed the watchdog while it does."""
        self.wait_until_ready()
        if self._tie is not None and not self.stopping.is_set():
            self._tie.start()
        if self._systemd.watchdog_seconds and not self.stopping.is_set():
            self.watch()

    def wait_until_ready(self) -> None:
        """Tell how loading goes until the first token, then READY=1."""
        began, meter, cause = time.monotonic(), LoadMeter(), "begun"
        attempt = Attempt(self._client.ready)
        while not attempt.sign:
            if self.stopping.wait(self._look_seconds):
                return
            if attempt.fault:
                cause, attempt = attempt.fault, Attempt(self._client.ready)
            lines = [f"EXTEND_TIMEOUT_USEC={EXTENSION_SECONDS * 1_000_000}"] if meter.advanced() else []
            spent = time.monotonic() - began
            self._systemd.tell(f"STATUS=Loading {self._client.model}: {spent:.0f} s, {meter}; {cause}", *lines)
        spent = time.monotonic() - began
        say(f"{self._client.model} answers after {spent:.1f} s ({attempt.sign})")
        self._systemd.tell("READY=1", "WATCHDOG=1", f"STATUS=Serving {self._client.model}: ready after {spent:.1f} s")

    def watch(self) -> None:
        """Feed the watchdog on signs of life only; without them say since when there are none."""
        beat = self._systemd.watchdog_seconds / 4
        counted, attempt, last, silent = self._client.counted(), None, time.monotonic(), False
        while not self.stopping.wait(beat):
            before, counted = counted, self._client.counted()
            if counted is not None and counted != before:
                sign, fault = "tokens are being made", ""
            else:
                # Nobody is being served: ask ourselves. A question that is still open is waited for, not repeated.
                attempt = attempt or Attempt(functools.partial(self._client.alive, self._systemd.watchdog_seconds))
                attempt.join(beat)
                sign, fault = attempt.sign, attempt.fault or "no answer to a one-token request"
                if not attempt.is_alive():
                    attempt = None
                counted = self._client.counted()
            if sign:
                last = time.monotonic()
                self._systemd.tell("WATCHDOG=1", f"STATUS=Serving {self._client.model}: {sign}")
            else:
                text = f"No sign of life from {self._client.model} for {time.monotonic() - last:.0f} s: {fault}"
                self._systemd.tell(f"STATUS={text}")
                say(text)
            if silent and sign:
                say(f"{self._client.model} makes tokens again")
            silent = not sign


# -- LMDeploy ---------------------------------------------------------------------------------------------------------


def error_entry(variable: str, value: str, message: str, known: list[str] | None = None) -> dict[str, Any]:
    """Return one finding of --check."""
    return {"variable": variable, "value": value, "message": message, "known": known or []}


def one_line(errors: list[dict[str, Any]]) -> str:
    """Return findings for the journal."""
    return "; ".join(f"{error['variable']} is '{error['value']}': {error['message']}" for error in errors)


class ParserRefusal(Exception):
    """LMDeploy's parser would have ended the process."""


def lmdeploy_parser() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Return LMDeploy's own parser and its part for `serve api_server`; both raise instead of exiting."""
    cli, serve = importlib.import_module("lmdeploy.cli.cli"), importlib.import_module("lmdeploy.cli.serve")
    serve.SubCliServe.add_parsers()
    # LMDeploy's run() adds them a second time, which Python refuses since 3.11.
    serve.SubCliServe.add_parsers = staticmethod(lambda: None)
    top, part = cli.CLI.parser, serve.SubCliServe.subparsers.choices["api_server"]

    def refuse(message: str) -> NoReturn:
        raise ParserRefusal(message)

    top.error = part.error = refuse
    return top, part


def flags_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return a parser's long options."""
    return {flag: action for action in parser._actions for flag in action.option_strings if flag.startswith("--")}


def without(arguments: list[str], flag: str) -> tuple[list[str], str]:
    """Return the arguments less a flag and its values, and these values."""
    kept: list[str] = []
    values: list[str] = []
    inside = False
    for argument in arguments:
        if argument.startswith("--"):
            inside = argument.split("=", 1)[0] == flag
            if inside:
                values.extend(argument.split("=", 1)[1:])
                continue
        if inside:
            values.append(argument)
        else:
            kept.append(argument)
    return kept, " ".join(values)


def parse_all(instance: Instance) -> tuple[argparse.Namespace | None, list[dict[str, Any]]]:
    """Parse with LMDeploy's parser; each refusal is noted and its flag left out, so that all are found at once."""
    top, part = lmdeploy_parser()
    flags = flags_of(part)
    errors: list[dict[str, Any]] = []
    arguments = list(instance.arguments)
    for _turn in range(len(arguments) + 1):
        try:
            return top.parse_args(["serve", "api_server", *arguments]), errors
        except ParserRefusal as refusal:
            message = str(refusal)
        unknown = re.match(r"unrecognized arguments: (.*)", message)
        wrong = re.search(r"argument (\S+?)(?:/\S+)?: |ambiguous option: (\S+)", message)
        if unknown:
            found = [word.split("=", 1)[0] for word in unknown[1].split() if word.startswith("--")] or [""]
            for flag in found:
                near = difflib.get_close_matches(flag, flags, n=3, cutoff=0.5)
                arguments, value = without(arguments, flag) if flag else ([], unknown[1])
                text = f"the installed LMDeploy does not know {flag or value}"
                errors.append(
                    error_entry(instance.variable(flag), f"{flag} {value}".strip(), text, near or sorted(flags))
                )
        elif wrong:
            flag = next(name for name in wrong.groups() if name)
            known = [str(choice) for choice in (flags[flag].choices or ())] if flag in flags else sorted(flags)
            arguments, value = without(arguments, flag)
            errors.append(error_entry(instance.variable(flag), value, message, known))
        else:
            return None, [*errors, error_entry(instance.variable(""), " ".join(arguments), message)]
    return None, errors


def check_lmdeploy(instance: Instance) -> tuple[argparse.Namespace | None, list[dict[str, Any]]]:
    """Judge an instance with what the installed LMDeploy knows; no GPU is needed."""
    options, errors = parse_all(instance)
    if options is None:
        return None, errors
    template = options.chat_template
    templates = sorted(importlib.import_module("lmdeploy.model").MODELS.module_dict)
    if template and template not in templates and not Path(template).is_file():
        text = "neither a chat template of the installed LMDeploy nor a file; leave it empty to use the model's own"
        errors.append(error_entry(instance.variable("--chat-template"), template, text, templates))
    for flag, module, manager, legacy in (
        ("--tool-call-parser", "tool_parser", "ToolParserManager", ""),
        ("--reasoning-parser", "reasoning_parser", "ReasoningParserManager", "LEGACY_REASONING_PARSER_NAMES"),
    ):
        value = getattr(options, flag.strip("-").replace("-", "_"))
        place = importlib.import_module(f"lmdeploy.serve.parsers.{module}")
        known = sorted({*getattr(place, manager).module_dict, *getattr(place, legacy, ())})
        if value and value not in known:
            text = f"the installed LMDeploy has no such {module.replace('_', ' ')}"
            errors.append(error_entry(instance.variable(flag), value, text, known))
    if options.backend == "turbomind" and (Path(options.model_path) / "config.json").is_file():
        supported = importlib.import_module("lmdeploy.turbomind.supported_models")
        if not supported.is_supported(options.model_path, trust_remote_code=options.trust_remote_code):
            text = (
                f"TurboMind does not support the model in {options.model_path}, and LMDeploy would silently fall back; "
                "set it to pytorch if that is meant"
            )
            errors.append(error_entry(instance.variable("--backend"), "turbomind", text, ["pytorch", "turbomind"]))
    return options, errors


def refuse_surprises(instance: Instance, options: argparse.Namespace) -> None:
    """Stop before LMDeploy asks for more GPUs than there are, or silently takes another backend than asked for."""
    if options.device != "cuda":
        return
    seen = int(importlib.import_module("torch").cuda.device_count())
    if seen == 0:
        message = "this unit sees no GPU: look at nvidia-smi, and at the journal of the driver"
        raise Fault(message)
    if options.nnodes == 1 and options.tp > seen:
        message = (
            f"{instance.variable('--tp')} is {options.tp}, but this unit sees {seen} GPU(s): "
            f"set it to {1 << (seen.bit_length() - 1)}, or to auto"
        )
        raise Refused(message)
    if options.backend == "turbomind":
        turbomind = importlib.import_module("lmdeploy.turbomind")
        backend = importlib.import_module("lmdeploy.archs").autoget_backend(
            options.model_path, trust_remote_code=options.trust_remote_code
        )
        if backend != "turbomind":
            cause = getattr(turbomind, "_import_error", None) or "TurboMind does not support this model"
            message = (
                f"{instance.variable('--backend')} is turbomind, but LMDeploy would silently take {backend} "
                f"({cause}): mend that, or set it to {backend}"
            )
            raise Refused(message)


def let_keys_change(keys: Keys) -> None:
    """Have LMDeploy's doorman take new keys while it serves: it looks into a list of hashes at each request."""
    try:
        doorman: Any = importlib.import_module("lmdeploy.serve.utils.server_utils").AuthenticationMiddleware
    except (ImportError, AttributeError) as error:
        say(f"this LMDeploy takes new keys at a restart only ({error})")
        return
    begin = doorman.__init__

    def begin_with_keys(middleware: Any, app: Any, tokens: list[str]) -> None:
        def take(valid: list[str]) -> None:
            begin(middleware, middleware.app, valid)

        keys.takers.append(take)
        # It is made at the first request, and the keys may be others by then.
        begin(middleware, app, keys.valid if tokens else tokens)

    doorman.__init__ = begin_with_keys


def refuse_files() -> None:
    """Have LMDeploy open no file of this host that a request names, nor tell which there are.

    It would open every path that its user can read, and read some that never end, such as /dev/zero, to the last byte.
    """
    try:
        connection: Any = importlib.import_module("lmdeploy.vl.media.connection")
        split = connection.urlparse
    except (ImportError, AttributeError) as error:
        say(f"this LMDeploy may open files of this host that a request names ({error})")
        return

    def split_address(url: str) -> Any:
        parts = split(url)
        if parts.scheme not in ("http", "https", "data"):
            message = "The engine opens no file of its host. Send the content itself, as a data: URL."
            raise ValueError(message)
        return parts

    connection.urlparse = split_address


def run_lmdeploy(instance: Instance, keys: Keys, stopping: Callable[[], None]) -> None:
    """Serve with LMDeploy's own command line, in this process."""
    options, errors = check_lmdeploy(instance)
    if errors or options is None:
        raise Refused(one_line(errors))
    refuse_surprises(instance, options)
    let_keys_change(keys)
    refuse_files()
    fresh = Path(os.environ.get("RUNTIME_DIRECTORY", "/nonexistent")) / "api-key"
    signal.signal(signal.SIGHUP, lambda *_: keys.renew(fresh))
    uvicorn: Any = importlib.import_module("uvicorn")
    end = uvicorn.Server.handle_exit

    def handle_exit(server: Any, *signal_and_frame: Any) -> None:
        stopping()
        end(server, *signal_and_frame)

    uvicorn.Server.handle_exit = handle_exit
    # uvicorn closes the door at SIGTERM and waits for open streams: without end, unless it is told how long.
    uvicorn.run = functools.partial(uvicorn.run, timeout_graceful_shutdown=instance.drain_seconds)
    sys.argv = ["lmdeploy", "serve", "api_server", *instance.arguments, "--api-keys", *keys.valid]
    importlib.import_module("lmdeploy.cli").run()


# -- llama.cpp --------------------------------------------------------------------------------------------------------


def llama_parameters(instance: Instance) -> tuple[Any, list[dict[str, Any]]]:
    """Return llama.cpp's parameters made of `attribute=value` items, and what is wrong with these items."""
    parameters = importlib.import_module("xllamacpp").CommonParams()
    errors: list[dict[str, Any]] = []
    for argument in instance.arguments:
        path, _equals, text = argument.partition("=")
        if path == "hostnames" and not hasattr(parameters, path):
            # Before October 2026 there was one.
            path, text = "hostname", json.dumps(json.loads(text)[0])
        *parents, last = path.split(".")
        holder = functools.reduce(lambda place, name: getattr(place, name, None), parents, parameters)
        if not hasattr(holder, last):
            known = [name for name in dir(parameters) if not name.startswith("_")]
            near = difflib.get_close_matches(path, known, n=3, cutoff=0.5)
            message = f"the installed llama.cpp has no parameter {path}"
            errors.append(error_entry(instance.variable(path), argument, message, near or known))
            continue
        value: Any = text
        with contextlib.suppress(ValueError):
            value = json.loads(text)
        try:
            setattr(holder, last, value)
        except (ValueError, TypeError, OverflowError) as error:
            message = f"llama.cpp refuses the value: {error}"
            errors.append(error_entry(instance.variable(path), argument, message))
    return parameters, errors


def check_llama_cpp(instance: Instance) -> list[dict[str, Any]]:
    """Judge an instance with the installed llama.cpp."""
    return llama_parameters(instance)[1]


def close_door(port: int) -> None:
    """Refuse new connections to a port that a library in this process listens on, and leave open ones alone.

    llama.cpp ends its streams when its listener ends. So its listening socket is replaced by one that nobody knows;
    one connection of our own wakes the accept() that still holds the old one.
    """
    tables = [Path(f"/proc/self/net/{name}").read_text(encoding="ascii") for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.splitlines()]
    listening = {f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")}
    with socket.create_server(("127.0.0.1", 0)) as decoy:
        for entry in list(Path("/proc/self/fd").iterdir()):
            with contextlib.suppress(OSError):
                if str(entry.readlink()) in listening:
                    with socket.socket(fileno=os.dup(int(entry.name))) as old:
                        address = old.getsockname()[:2]
                    os.dup2(decoy.fileno(), int(entry.name))
                    socket.create_connection(address, timeout=1).close()


def busy(server: Any) -> bool:
    """Tell whether llama.cpp still works on a request."""
    gauges = ("llamacpp:requests_processing ", "llamacpp:requests_deferred ")
    lines = [line for line in str(server.handle_metrics()).splitlines() if line.startswith(gauges)]
    return any(float(line.rsplit(" ", 1)[1]) > 0 for line in lines)


def run_llama_cpp(instance: Instance, keys: Keys, stopping: Callable[[], None]) -> None:
    """Serve with llama.cpp's own HTTP server, in this process."""
    parameters, errors = llama_parameters(instance)
    if errors:
        raise Refused(one_line(errors))
    parameters.api_keys = keys.valid
    parameters.model_alias = {instance.model_name}
    server = importlib.import_module("xllamacpp").Server(parameters)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    stopping()
    close_door(instance.port)
    limit = time.monotonic() + instance.drain_seconds
    while busy(server) and time.monotonic() < limit:
        time.sleep(0.1)
    # The last lines of a stream may still be on their way to the client.
    time.sleep(0.3)
    # llama.cpp's own end waits for streams, however long they take; their time is over.
    os._exit(0)


# -- the program ------------------------------------------------------------------------------------------------------

ENGINES = {"lmdeploy": run_lmdeploy, "llama_cpp": run_llama_cpp}


def check(path: Path) -> int:
    """Print what is wrong with an instance file as JSON; return the exit code."""
    # Engines and their libraries print to standard output; only the JSON belongs there.
    result = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as home:
        # Importing an engine writes caches: into a folder that goes away.
        os.environ |= {"HOME": home, "XDG_CACHE_HOME": home, "TRITON_CACHE_DIR": home, "CUDA_VISIBLE_DEVICES": ""}
        try:
            instance = Instance.read(path)
            errors = check_lmdeploy(instance)[1] if instance.engine == "lmdeploy" else check_llama_cpp(instance)
        except Refused as refusal:
            errors = [error_entry("", str(path), str(refusal))]
        except ImportError as error:
            errors = [error_entry("", sys.prefix, f"this environment has no working engine ({error}): build it again")]
    with result:
        json.dump({"errors": errors}, result)
        result.write("\n")
    return EXIT_CONFIG if errors else 0


def refuse_taken_port(instance: Instance) -> None:
    """Stop before a long load when somebody else listens; LMDeploy notices only after it."""
    family = socket.AF_INET6 if ":" in instance.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((instance.host, instance.port))
        except OSError as error:
            message = f"{instance.variable('--server-port')} is {instance.port}: {error.strerror} on {instance.host}"
            raise Fault(message) from None


def serve(path: Path, systemd: Systemd) -> None:
    """Run the engine of an instance until it ends."""
    instance = Instance.read(path)
    os.environ |= instance.environment
    credentials = Path(os.environ.pop("CREDENTIALS_DIRECTORY", str(path.parent)))
    keys = Keys(credentials / "api-key")
    if not Path(instance.model_path).exists():
        message = f"{instance.variable('')}: no model is at {instance.model_path}: run the role model_weights first"
        raise Refused(message)
    refuse_taken_port(instance)
    if (credentials / "ray-token").exists():
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(credentials / "ray-token")
    client = Client(instance.host, instance.port, instance.model_name, keys.valid[0], leads=instance.rank == 0)
    keys.takers.append(lambda valid: setattr(client, "key", valid[0]))
    monitor = Monitor(client, systemd, tie=Tie(instance.head) if instance.rank else None)
    monitor.start()
    ENGINES[instance.engine](instance, keys, monitor.stop)


def main(arguments: list[str]) -> int:
    """Serve, or check; return the exit code."""
    parser = argparse.ArgumentParser(prog="api_server_launcher", description="Run a model engine under systemd.")
    parser.add_argument("--check", action="store_true", help="judge the file with the engine's own parser, then stop")
    parser.add_argument("--reload", action="store_true", help="hand the file's keys to the running process of the unit")
    parser.add_argument("file", nargs="?", type=Path, help="instance file; default: systemd's credential instance.json")
    chosen = parser.parse_args(arguments)
    path = chosen.file or Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent")) / "instance.json"
    if chosen.check:
        return check(path)
    if chosen.reload:
        hand_over(path)
        return 0
    # The watchdog stops a hung engine with SIGABRT: the journal then shows where every thread was.
    faulthandler.enable()
    systemd = Systemd()
    try:
        serve(path, systemd)
    except (Refused, Fault) as refusal:
        say(str(refusal))
        systemd.tell(f"STATUS={refusal}")
        return EXIT_CONFIG if isinstance(refusal, Refused) else 1
    except Exception as error:  # noqa: BLE001  # whatever an engine dies of is told, and ends the process
        traceback.print_exc()
        systemd.tell(f"STATUS={type(error).__name__}: {error}")
        # Threads and children of a half-started engine must not keep the process alive.
        sys.stderr.flush()
        os._exit(1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
