"""The launcher against an engine that loads long, hangs, dies or is slow, and against a stand-in for LMDeploy."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine, wait_until

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "roles/api_server/files/launcher/api_server_launcher.py"
STANDINS = ROOT / "tests/standins/engines"
KEY = "k" * 32

spec = importlib.util.spec_from_file_location("api_server_launcher", LAUNCHER)
assert spec is not None
assert spec.loader is not None
launcher: Any = importlib.util.module_from_spec(spec)
sys.modules["api_server_launcher"] = launcher
spec.loader.exec_module(launcher)


class Manager:
    """systemd's end of the notification socket."""

    def __init__(self, folder: Path) -> None:
        """Listen."""
        self.path = folder / "notify"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.path))
        self.told: list[tuple[float, str]] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        # The test's end closes the socket under this thread.
        with contextlib.suppress(OSError):
            while data := self.socket.recv(65536):
                self.told.append((time.monotonic(), data.decode()))

    def count(self, word: str) -> int:
        """Return how many messages held a word."""
        return sum(word in text for _, text in self.told)

    def last_status(self) -> str:
        """Return what `systemctl status` would show."""
        lines = [line for _, text in self.told for line in text.splitlines() if line.startswith("STATUS=")]
        return lines[-1] if lines else ""


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """systemd, with a watchdog of 0.8 s."""
    listening = Manager(tmp_path)
    monkeypatch.setenv("NOTIFY_SOCKET", str(listening.path))
    monkeypatch.setenv("WATCHDOG_USEC", "800000")
    yield listening
    listening.socket.shutdown(socket.SHUT_RDWR)
    listening.socket.close()


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    """An engine whose port is not open yet."""
    made = FakeEngine()
    yield made
    made.released.set()
    made.server.server_close()


@pytest.fixture
def monitor(engine: FakeEngine, manager: Manager) -> Iterator[Any]:
    """The launcher's watching thread, not started."""
    watching = launcher.Monitor(
        launcher.Client("127.0.0.1", engine.port, "smol", KEY), launcher.Systemd(), look_seconds=0.05
    )
    yield watching
    watching.stopping.set()
    if watching.ident:
        watching.join(5)


def fed(manager: Manager, seconds: float = 1.0) -> int:
    """Return how often the watchdog is fed within some time."""
    before = manager.count("WATCHDOG=1")
    time.sleep(seconds)
    return manager.count("WATCHDOG=1") - before


# -- until ready ------------------------------------------------------------------------------------------------------


def test_ready_is_said_after_health_name_and_token_only(engine: FakeEngine, manager: Manager, monitor: Any) -> None:
    engine.token_seconds = None
    monitor.start()
    wait_until(lambda: "not open yet" in manager.last_status())
    engine.health_status = 503
    engine.start()
    wait_until(lambda: "HTTP 503" in manager.last_status())
    engine.health_status = 200
    time.sleep(0.3)
    assert manager.count("READY=1") == 0, "health and name are good, but there was no token"
    engine.released.set()
    wait_until(lambda: manager.count("READY=1"))
    assert engine.tokens >= 1
    engine.stop()


def test_a_further_host_is_ready_without_a_token(engine: FakeEngine, manager: Manager) -> None:
    """It only computes for the first host, so nobody asks it a question; a bad health still counts."""
    client = launcher.Client("127.0.0.1", engine.port, "smol", KEY, leads=False)
    watching = launcher.Monitor(client, launcher.Systemd(), look_seconds=0.05)
    engine.health_status = 503
    engine.start()
    watching.start()
    wait_until(lambda: "HTTP 503" in manager.last_status())
    engine.health_status = 200
    wait_until(lambda: manager.count("READY=1"))
    assert fed(manager) > 0
    assert engine.tokens == 0
    watching.stopping.set()
    watching.join(5)
    engine.stop()


def test_a_further_host_begins_anew_when_the_first_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when a line breaks and can be had again."""
    ended: list[int] = []
    monkeypatch.setattr(launcher.os, "_exit", ended.append)
    monkeypatch.setattr(launcher.time, "sleep", lambda _seconds: None)
    door = socket.create_server(("127.0.0.1", 0))
    tie = launcher.Tie(f"127.0.0.1:{door.getsockname()[1]}")
    tie.start()
    door.accept()[0].close()
    line = door.accept()[0]
    assert not ended
    door.close()
    line.close()
    tie.join(5)
    assert ended == [1]


def test_a_wrong_name_is_never_ready_and_told(engine: FakeEngine, manager: Manager, monitor: Any) -> None:
    engine.model = "other"
    with engine:
        monitor.start()
        wait_until(lambda: "lists other instead of smol" in manager.last_status())
        assert manager.count("READY=1") == 0


def test_more_time_is_asked_for_only_while_loading_advances(
    manager: Manager, monitor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    advancing = True
    monkeypatch.setattr(launcher.LoadMeter, "advanced", lambda _: advancing)
    monitor.start()
    wait_until(lambda: manager.count(f"EXTEND_TIMEOUT_USEC={launcher.EXTENSION_SECONDS}000000") > 2)
    advancing = False
    time.sleep(0.2)
    before, statuses = manager.count("EXTEND"), manager.count("STATUS=Loading smol")
    time.sleep(0.3)
    assert manager.count("EXTEND") == before
    assert manager.count("STATUS=Loading smol") > statuses


def test_the_meter_sees_reading_and_memory(tmp_path: Path) -> None:
    meter = launcher.LoadMeter()
    assert meter.advanced()
    assert not meter.advanced()
    weights = tmp_path / "weights"
    weights.write_bytes(b"w" * (2 * launcher.ADVANCE_BYTES))
    content = weights.read_bytes()
    assert meter.advanced()
    assert len(content) == 2 * launcher.ADVANCE_BYTES
    assert "GB read" in str(meter)


# -- the watchdog -----------------------------------------------------------------------------------------------------


def serving(engine: FakeEngine, manager: Manager, monitor: Any) -> None:
    """Bring the engine to where it serves."""
    engine.start()
    monitor.start()
    wait_until(lambda: manager.count("READY=1"))


def test_an_idle_engine_that_answers_feeds_the_watchdog(engine: FakeEngine, manager: Manager, monitor: Any) -> None:
    serving(engine, manager, monitor)
    assert fed(manager) >= 3
    engine.stop()


def test_an_engine_that_hangs_with_good_health_does_not(engine: FakeEngine, manager: Manager, monitor: Any) -> None:
    serving(engine, manager, monitor)
    engine.token_seconds = None
    time.sleep(0.5)
    assert fed(manager, 1.2) == 0
    assert engine.health_status == 200
    assert "No sign of life from smol" in manager.last_status()
    engine.released.set()
    wait_until(lambda: manager.last_status().startswith("STATUS=Serving"))
    engine.stop()


def test_running_traffic_feeds_it_while_the_queue_is_full(engine: FakeEngine, manager: Manager, monitor: Any) -> None:
    engine.counter = time.monotonic
    serving(engine, manager, monitor)
    engine.token_seconds = None
    assert fed(manager) >= 3
    engine.counter = lambda: 7.0
    time.sleep(0.5)
    assert fed(manager) == 0
    engine.stop()


def test_a_slow_token_is_a_token(engine: FakeEngine, manager: Manager, monitor: Any) -> None:
    serving(engine, manager, monitor)
    engine.token_seconds = 0.35
    time.sleep(0.5)
    assert fed(manager, 2.0) >= 2
    engine.stop()


@pytest.mark.parametrize("fault", ["status", "gone"])
def test_an_engine_that_fails_or_dies_does_not_feed_it(
    engine: FakeEngine, manager: Manager, monitor: Any, fault: str
) -> None:
    serving(engine, manager, monitor)
    if fault == "status":
        engine.token_status = 500
    else:
        engine.stop()
    time.sleep(0.5)
    assert fed(manager) == 0
    assert ("HTTP 500" if fault == "status" else "not open") in manager.last_status()
    if fault == "status":
        engine.stop()


def test_an_engine_that_sleeps_on_request_is_left_alone(engine: FakeEngine, manager: Manager, monitor: Any) -> None:
    serving(engine, manager, monitor)
    engine.token_seconds, engine.health_word = None, "sleeping"
    assert fed(manager) >= 3
    engine.stop()


def test_stopping_is_told_and_ends_the_watching(engine: FakeEngine, manager: Manager, monitor: Any) -> None:
    serving(engine, manager, monitor)
    monitor.stop()
    wait_until(lambda: manager.count("STOPPING=1"))
    monitor.join(3)
    assert not monitor.is_alive()
    engine.stop()


# -- the whole program, with a stand-in for LMDeploy ------------------------------------------------------------------


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


class Unit:
    """The launcher as a unit starts it."""

    def __init__(self, folder: Path, manager: Manager | None = None) -> None:
        """Write the credentials."""
        self.folder, self.manager = folder, manager
        self.model = folder / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        (folder / "api-key").write_text(KEY + "\n")
        self.port = free_port()
        self.extra: list[str] = []
        self.content: dict[str, Any] = {
            "name": "api-server",
            "engine": "lmdeploy",
            "backend": "turbomind",
            "model_path": str(self.model),
            "model_name": "smol",
            "host": "127.0.0.1",
            "port": self.port,
            "variables": {
                "": "api_server_model",
                "*": "api_server_extra_args",
                "--chat-template": "api_server_chat_template",
                "--tool-call-parser": "api_server_tool_call_parser",
                "--backend": "api_server_backend",
                "--tp": "api_server_tp",
                "--server-port": "api_server_port",
            },
            "environment": {"FROM_INSTANCE": "yes"},
            "drain_seconds": 7,
        }

    def write(self) -> Path:
        """Write the instance file."""
        arguments = [str(self.model), "--model-name", "smol", "--backend", "turbomind", "--server-name", "127.0.0.1"]
        arguments += ["--server-port", str(self.port), *self.extra]
        path = self.folder / "instance.json"
        path.write_text(json.dumps({"arguments": arguments, **self.content}))
        return path

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start the launcher."""
        self.write()
        known = {"PATH": os.environ["PATH"], "PYTHONPATH": str(STANDINS), "PYTHONDONTWRITEBYTECODE": "1"}
        known["CREDENTIALS_DIRECTORY"] = str(self.folder)
        if self.manager:
            known["NOTIFY_SOCKET"] = str(self.manager.path)
        return subprocess.Popen(
            [sys.executable, str(LAUNCHER), *arguments],
            env=known | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ended(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        """Return exit code and both outputs of a launcher that ends by itself."""
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err


@pytest.fixture
def unit(tmp_path: Path, manager: Manager) -> Unit:
    """An instance of LMDeploy's stand-in."""
    return Unit(tmp_path, manager)


def test_it_serves_in_process_and_the_key_does_not_show(unit: Unit, manager: Manager) -> None:
    process = unit.start(FAKE_LOAD_SECONDS="0.3")
    wait_until(lambda: manager.count("READY=1"), 20)
    for name in ("cmdline", "environ"):
        assert KEY not in Path(f"/proc/{process.pid}/{name}").read_text()
    assert KEY not in str(manager.told)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "streams got 7 s to end" in out
    assert manager.count("STOPPING=1") == 1
    assert KEY not in err
    given = json.loads(out.splitlines()[0])
    assert given["argv"][-2:] == ["--api-keys", KEY]
    assert given["given"]["api_keys"] == [KEY]


def test_a_request_opens_no_file_of_the_host(unit: Unit, manager: Manager, tmp_path: Path) -> None:
    """Neither by a URL nor by a path, whether it exists or not; what comes with the request, and addresses, go on."""
    (tmp_path / "picture.png").write_text("of somebody else")
    refused = [f"file://{tmp_path}/picture.png", f"FILE://{tmp_path}/picture.png", f"{tmp_path}/picture.png", "/none"]
    urls = [*refused, "data:image/png;base64,AAAA", "https://example.org/a.png"]
    process = unit.start(FAKE_PICTURES=" ".join(urls))
    wait_until(lambda: manager.count("READY=1"), 20)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    told = [line.removeprefix("picture: ") for line in out.splitlines() if line.startswith("picture: ")]
    assert told[:4] == ["The engine opens no file of its host. Send the content itself, as a data: URL."] * 4
    assert told[4:] == ["'image/png;base64,AAAA'", "'fetched https://example.org/a.png'"]


def status(port: int, key: str) -> int:
    """Return how an engine answers a key."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.closing(connection):
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
        return connection.getresponse().status


def test_keys_change_while_it_serves(unit: Unit, manager: Manager) -> None:
    new = "n" * 32
    runtime = unit.folder / "runtime"
    runtime.mkdir()
    process = unit.start(RUNTIME_DIRECTORY=str(runtime))
    wait_until(lambda: manager.count("READY=1"), 20)
    assert [status(unit.port, key) for key in (KEY, new)] == [200, 401]

    def reload(content: str) -> None:
        (unit.folder / "api-key").write_text(content)
        command = [sys.executable, str(LAUNCHER), "--reload", str(unit.folder / "api-key")]
        told = {"PATH": os.environ["PATH"], "RUNTIME_DIRECTORY": str(runtime), "MAINPID": str(process.pid)}
        subprocess.run(command, env=told, check=True)

    reload(f"{new}\n{KEY}\n")
    wait_until(lambda: status(unit.port, new) == 200)
    assert status(unit.port, KEY) == 200, "both are valid while keys change"
    reload(f"{new}\n")
    wait_until(lambda: status(unit.port, KEY) == 401)
    assert status(unit.port, new) == 200
    wait_until(lambda: not (runtime / "api-key").exists())
    # A file without a key locks nobody out.
    reload("\n")
    wait_until(lambda: not (runtime / "api-key").exists())
    assert status(unit.port, new) == 200
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "2 key(s) are valid" in err
    assert "the keys stay as they are" in err
    assert new not in err


def test_keys_are_not_handed_over_through_a_link_of_the_engine(unit: Unit, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (unit.folder / ".api-key").symlink_to(victim)
    (unit.folder / "source").write_text(KEY)
    # Under nohup a child would ignore what a reload sends.
    waiting = subprocess.Popen(["env", "--default-signal=HUP", "sleep", "60"])
    command = [sys.executable, str(LAUNCHER), "--reload", str(unit.folder / "source")]
    told = {"PATH": os.environ["PATH"], "RUNTIME_DIRECTORY": str(unit.folder), "MAINPID": str(waiting.pid)}
    subprocess.run(command, env=told, check=True)
    assert waiting.wait(5) == -signal.SIGHUP
    assert victim.read_text() == "untouched"
    assert (unit.folder / "api-key").read_text() == KEY
    assert (unit.folder / "api-key").stat().st_mode & 0o777 == 0o400


def test_an_engine_that_dies_ends_the_unit_with_its_own_words(unit: Unit, manager: Manager) -> None:
    code, _, err = unit.ended(FAKE_DIES="1")
    assert code == 1
    assert "CUDA out of memory" in err
    wait_until(lambda: "CUDA out of memory" in manager.last_status())


def test_a_silent_fall_to_pytorch_is_refused(unit: Unit) -> None:
    code, _, err = unit.ended(FAKE_BACKEND="pytorch", FAKE_IMPORT_ERROR="libnccl.so.2: cannot open")
    assert code == launcher.EXIT_CONFIG
    assert "api_server_backend is turbomind, but LMDeploy would silently take pytorch (libnccl.so.2" in err


def test_more_gpus_than_there_are_is_refused_and_none_is_tried_again(unit: Unit) -> None:
    unit.extra = ["--tp", "4"]
    code, _, err = unit.ended(FAKE_GPUS="3")
    assert code == launcher.EXIT_CONFIG
    assert "api_server_tp is 4, but this unit sees 3 GPU(s): set it to 2" in err
    code, _, err = unit.ended(FAKE_GPUS="0")
    assert code == 1
    assert "sees no GPU" in err


def test_a_taken_port_is_told_before_loading(unit: Unit) -> None:
    with socket.create_server(("127.0.0.1", unit.port)):
        code, out, err = unit.ended(FAKE_LOAD_SECONDS="20")
    assert code == 1
    assert f"api_server_port is {unit.port}: Address already in use" in err
    assert out == ""


def test_a_missing_model_key_or_file_is_refused(unit: Unit) -> None:
    (unit.model / "config.json").unlink()
    unit.model.rmdir()
    code, _, err = unit.ended()
    assert (code, "run the role model_weights first" in err) == (launcher.EXIT_CONFIG, True)
    (unit.folder / "api-key").unlink()
    code, _, err = unit.ended()
    assert (code, "the key is not to be had" in err) == (launcher.EXIT_CONFIG, True)
    code, _, err = unit.ended(str(unit.folder / "nothing.json"))
    assert (code, "run the playbook again" in err) == (launcher.EXIT_CONFIG, True)


# -- --check ----------------------------------------------------------------------------------------------------------


def judged(unit: Unit) -> tuple[int, list[dict[str, Any]]]:
    """Return the exit code of --check and what it found."""
    code, out, err = unit.ended("--check", str(unit.write()), FAKE_GPUS="0")
    assert out, err
    return code, json.loads(out)["errors"]


def test_a_good_instance_passes_without_a_gpu(unit: Unit) -> None:
    unit.extra = ["--session-len", "2048", "--chat-template", "hf", "--reasoning-parser", "deepseek-r1"]
    assert judged(unit) == (0, [])


def test_all_that_the_installed_version_does_not_know_is_found_at_once(unit: Unit) -> None:
    unit.extra = ["--chat-template", "internvl2_5", "--tool-call-parser", "qwen9", "--sesion-len", "99"]
    unit.extra += ["--device", "tpu", "--qqqqqqqq=1"]
    code, errors = judged(unit)
    assert code == launcher.EXIT_CONFIG
    found = {error["variable"]: error for error in errors}
    assert found["api_server_chat_template"]["value"] == "internvl2_5"
    assert found["api_server_chat_template"]["known"] == ["base", "hf", "vicuna"]
    assert found["api_server_tool_call_parser"]["known"] == ["llama3", "qwen2d5"]
    extra = {error["value"]: error for error in errors if error["variable"] == "api_server_extra_args"}
    assert set(extra) == {"--sesion-len 99", "tpu", "--qqqqqqqq 1"}
    assert extra["--sesion-len 99"]["known"][0] == "--session-len"
    assert "--tp" in extra["--qqqqqqqq 1"]["known"], "nothing is like it, so all flags are named"
    assert extra["tpu"]["known"] == ["cuda", "ascend"]


def test_a_chat_template_may_be_a_file(unit: Unit) -> None:
    template = unit.folder / "template.json"
    template.write_text("{}")
    unit.extra = ["--chat-template", str(template)]
    assert judged(unit) == (0, [])


def test_a_model_that_turbomind_can_not_serve_is_found(unit: Unit) -> None:
    (unit.model / "config.json").write_text('{"architectures": ["Phi3VForCausalLM"]}')
    code, errors = judged(unit)
    assert code == launcher.EXIT_CONFIG
    assert [error["variable"] for error in errors] == ["api_server_backend"]


def test_an_environment_without_the_engine_is_told(unit: Unit) -> None:
    code, out, _ = unit.ended("--check", str(unit.write()), PYTHONPATH="")
    assert code == launcher.EXIT_CONFIG
    assert "no working engine" in json.loads(out)["errors"][0]["message"]


def test_parameters_of_llama_cpp_are_judged_too(unit: Unit) -> None:
    unit.content["engine"] = "llama_cpp"
    good = ["model.path=/m.gguf", "port=1", 'hostnames=["127.0.0.1"]']
    unit.content["arguments"] = good
    assert judged(unit) == (0, [])
    unit.content["arguments"] = [*good, "n_paralel=2", "n_ctx=many", "bogus.part=1"]
    code, errors = judged(unit)
    assert code == launcher.EXIT_CONFIG
    assert [error["value"] for error in errors] == ["n_paralel=2", "n_ctx=many", "bogus.part=1"]
    assert errors[0]["known"][0] == "n_parallel"


def test_a_llama_cpp_that_knows_one_address_gets_it(unit: Unit, tmp_path: Path) -> None:
    before = (STANDINS / "xllamacpp.py").read_text().replace('"hostnames"', '"hostname"')
    (tmp_path / "before").mkdir()
    (tmp_path / "before/xllamacpp.py").write_text(
        before.replace("self.hostnames = 1, 8080, [", "self.hostname = 1, 8080, *[")
    )
    unit.content["engine"] = "llama_cpp"
    unit.content["arguments"] = ["model.path=/m.gguf", "port=1", 'hostnames=["127.0.0.1"]']
    code, out, error = unit.ended("--check", str(unit.write()), PYTHONPATH=str(tmp_path / "before"))
    assert code == 0, out + error


# -- llama.cpp's door -------------------------------------------------------------------------------------------------


def test_a_closed_door_refuses_newcomers_and_keeps_open_streams() -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    accepted: list[socket.socket] = []

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted.append(listening.accept()[0])

    accepting = threading.Thread(target=accept)
    accepting.start()
    stream = socket.create_connection(("127.0.0.1", port))
    wait_until(lambda: accepted)
    launcher.close_door(port)
    wait_until(lambda: len(accepted) == 2)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=2)
    accepted[0].sendall(b"the end of the stream")
    assert stream.recv(100) == b"the end of the stream"
    listening.shutdown(socket.SHUT_RDWR)
    accepting.join(5)
    for open_socket in (listening, stream, *accepted):
        open_socket.close()
