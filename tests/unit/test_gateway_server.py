"""The module gateway_server: which engines a name stands for, and when a drain is over."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.haproxy import SocketFault
from ansible_collections.selfhost.lmdeploy.plugins.modules import gateway_server


class HAProxy:
    """A runtime socket: engines by backend and name, each with its flags and the requests it has at each look."""

    def __init__(self, *engines: tuple[str, str], requests: tuple[int, ...] = (0,)) -> None:
        """Have engines that are in use."""
        self.admin = dict.fromkeys(engines, 0)
        self.state = dict.fromkeys(engines, 2)
        self.requests = list(requests)
        self.said: list[str] = []

    def say(self, command: str) -> str:
        """Answer as HAProxy does."""
        if command == "show stat":
            now = self.requests[0] if len(self.requests) == 1 else self.requests.pop(0)
            rows = [f"{backend},{name},0,{now},2," for backend, name in self.admin]
            return "\n".join(["# pxname,svname,qcur,scur,type,", *rows])
        if command == "show servers state":
            head = "# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state"
            rows = [f"3 {key[0]} 1 {key[1]} - {self.state[key]} {flags}" for key, flags in self.admin.items()]
            return "\n".join(["1", head, *rows])
        self.said.append(command)
        backend, name = command.split()[2].split("/")
        if " state " in command:
            self.admin[backend, name] = 8 if command.endswith("drain") else 0
        return ""


class Loans:
    """systemd's timers: what each engine's says when its time comes."""

    def __init__(self) -> None:
        """Have none."""
        self.said: dict[str, tuple[float, float, float]] = {}

    def lent(self) -> set[str]:
        """Return the engines that have one."""
        return set(self.said)

    def lend(self, server: dict[str, Any], seconds: float, settled_seconds: float, drain_seconds: float) -> None:
        """Set one."""
        self.said[server["name"]] = (seconds, settled_seconds, drain_seconds)

    def end(self, name: str) -> None:
        """Stop one."""
        del self.said[name]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gateway_server, "POLL_SECONDS", 0)
    monkeypatch.setattr(gateway_server, "LOCK", tmp_path / "lock")


def converge(
    proxy: HAProxy, name: str, state: str, *, dry: bool = False, loans: Loans | None = None, **more: Any
) -> dict[str, Any]:
    """Run the module's work against a socket."""
    params = {
        "timeout_seconds": 5,
        "for_seconds": 0,
        "settled_seconds": 0,
        "only_lent": False,
        "served": False,
        "models": {},
        **more,
    }
    return gateway_server.converge({"name": name, "state": state, **params}, proxy.say, loans or Loans(), dry=dry)


def test_a_drain_waits_for_the_last_request_and_is_done_once() -> None:
    proxy = HAProxy(("model_m", "gpu-1-9"), ("model_m", "gpu-2-9"), requests=(3, 3, 1, 0))
    done = converge(proxy, "gpu-1", "drained")
    assert done["changed"]
    assert proxy.said == ["set server model_m/gpu-1-9 state drain"]
    assert [(server["name"], server["is_drained"], server["requests"]) for server in done["servers"]] == [
        ("gpu-1-9", True, 0)
    ]
    assert done["diff"] == {"before": "gpu-1-9: in use\n", "after": "gpu-1-9: drained\n"}
    assert not converge(proxy, "gpu-1", "drained")["changed"]


def test_a_host_stands_for_all_its_engines_and_for_no_other_host() -> None:
    proxy = HAProxy(("model_a", "gpu-1-9"), ("model_b", "gpu-1-8"), ("model_a", "gpu-10-9"), ("web_ui", "gpu-1"))
    converge(proxy, "gpu-1", "drained")
    assert [command.split()[2] for command in proxy.said] == ["model_a/gpu-1-9", "model_b/gpu-1-8"]


def test_a_return_waits_for_the_check() -> None:
    proxy = HAProxy(("model_m", "gpu-1-9"))
    converge(proxy, "gpu-1-9", "drained")
    proxy.state["model_m", "gpu-1-9"] = 0
    with pytest.raises(SocketFault, match="check bad"):
        converge(proxy, "gpu-1-9", "ready", timeout_seconds=0)
    proxy.state["model_m", "gpu-1-9"] = 2
    assert converge(proxy, "gpu-1-9", "ready")["servers"][0]["is_up"]


def test_a_drain_that_does_not_end_says_who_is_left() -> None:
    with pytest.raises(SocketFault, match=r"gpu-1-9 has 2 requests"):
        converge(HAProxy(("model_m", "gpu-1-9"), requests=(2,)), "gpu-1", "drained", timeout_seconds=0)


def test_check_mode_tells_and_touches_nothing() -> None:
    proxy = HAProxy(("model_m", "gpu-1-9"), requests=(5,))
    assert converge(proxy, "gpu-1", "drained", dry=True)["changed"]
    assert not converge(proxy, "gpu-1", "ready", dry=True)["changed"]
    assert proxy.said == []


def test_only_looking_changes_nothing() -> None:
    assert not converge(HAProxy(("model_m", "gpu-1-9"), requests=(5,)), "gpu-1", "present")["changed"]


def test_a_name_that_is_not_there_is_a_fault() -> None:
    with pytest.raises(SocketFault, match="no engine called gpu-7"):
        converge(HAProxy(("model_m", "gpu-1-9")), "gpu-7", "drained")


def test_what_haproxy_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = HAProxy(("model_m", "gpu-1-9"))
    say = proxy.say
    monkeypatch.setattr(
        proxy, "say", lambda command: say(command) if command.startswith("show") else "Permission denied"
    )
    with pytest.raises(SocketFault, match="refuses to set gpu-1-9 to state drain: Permission denied"):
        converge(proxy, "gpu-1", "drained")


TWO = (("model_m", "gpu-1-9"), ("model_m", "gpu-2-9"))


def test_a_loan_has_its_end_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, loans = HAProxy(*TWO), Loans()
    monkeypatch.setattr(proxy, "say", lambda command, say=proxy.say: say(command) if "drain" not in command else "no")
    with pytest.raises(SocketFault):
        converge(proxy, "gpu-1", "drained", loans=loans, for_seconds=60, settled_seconds=20)
    assert loans.said == {"gpu-1-9": (60, 20, 5)}


def test_a_loan_is_given_back_and_lent_anew() -> None:
    proxy, loans = HAProxy(*TWO), Loans()
    assert converge(proxy, "gpu-1", "drained", loans=loans, for_seconds=60)["servers"][0]["is_lent"]
    again = converge(proxy, "gpu-1", "drained", loans=loans, for_seconds=90)
    assert not again["changed"]
    assert loans.said["gpu-1-9"][0] == 90
    assert converge(proxy, "gpu-1", "ready", loans=loans, only_lent=True)["changed"]
    assert loans.said == {}
    assert not proxy.admin["model_m", "gpu-1-9"]


def test_what_a_person_drained_is_no_loan() -> None:
    proxy, loans = HAProxy(*TWO), Loans()
    converge(proxy, "gpu-1", "drained")
    assert not converge(proxy, "gpu-1", "drained", loans=loans, for_seconds=60)["changed"]
    assert loans.said == {}
    assert not converge(proxy, "gpu-1", "ready", loans=loans, only_lent=True)["changed"]
    assert proxy.admin["model_m", "gpu-1-9"]
    assert converge(proxy, "gpu-1", "ready", loans=loans)["changed"]


def test_a_return_does_not_believe_the_check_from_before() -> None:
    proxy = HAProxy(("model_m", "gpu-1-9"))
    converge(proxy, "gpu-1", "drained")
    converge(proxy, "gpu-1", "ready")
    assert proxy.said[1:] == ["set server model_m/gpu-1-9 health down", "set server model_m/gpu-1-9 state ready"]


def test_an_engine_without_another_one_stays_in_use() -> None:
    proxy = HAProxy(("model_m", "gpu-1-9"), ("model_n", "gpu-1-8"), ("model_n", "gpu-2-8"))
    done = converge(proxy, "gpu-1", "drained", served=True)
    assert [(s["name"], s["is_drained"], s["is_spared"]) for s in done["servers"]] == [
        ("gpu-1-9", False, True),
        ("gpu-1-8", True, False),
    ]


def test_a_twin_counts_only_while_it_serves() -> None:
    """Else a host alone with its model could never be changed, and with its twin at work never be drained."""
    proxy = HAProxy(("model_m", "gpu-1-9"), ("model_m", "gpu-1-twin-10"))
    proxy.state["model_m", "gpu-1-twin-10"] = 0
    assert converge(proxy, "gpu-1", "drained", served=True)["servers"][0]["is_spared"]
    proxy.state["model_m", "gpu-1-twin-10"] = 2
    (server,) = converge(proxy, "gpu-1", "drained", served=True)["servers"]
    assert (server["is_drained"], server["is_spared"]) == (True, False)


def test_the_last_good_engine_is_not_drained() -> None:
    proxy = HAProxy(*TWO)
    converge(proxy, "gpu-1", "drained", served=True)
    with pytest.raises(SocketFault, match=r"gpu-2-9 is the last engine that serves m \(gpu-1-9 is drained\)"):
        converge(proxy, "gpu-2", "drained", served=True)
    converge(proxy, "gpu-1", "ready")
    proxy.state["model_m", "gpu-1-9"] = 0
    with pytest.raises(SocketFault, match="gpu-1-9 is not good"):
        converge(proxy, "gpu-2", "drained", served=True)
    # One that serves nobody may go.
    assert converge(proxy, "gpu-1", "drained", served=True)["changed"]


@pytest.mark.parametrize(
    ("models", "told"),
    [
        ({"9": "n"}, "gpu-1-9 is to serve n, and gets requests for m"),
        ({"8": "m"}, "gpu-1-8 is new; gpu-1-9 is to go"),
    ],
)
def test_a_host_that_would_serve_what_the_gateway_does_not_know_is_refused(models: dict[str, str], told: str) -> None:
    assert converge(HAProxy(*TWO), "gpu-1", "present", models={"9": "m"})["changed"] is False
    with pytest.raises(SocketFault, match=told):
        converge(HAProxy(*TWO), "gpu-1", "present", models=models)


def test_all_engines_are_told_without_a_name() -> None:
    assert len(converge(HAProxy(*TWO), "", "present")["servers"]) == 2


@pytest.mark.parametrize(
    ("settled", "age", "last_change", "requests", "check", "is_taken_back"),
    [
        # It went, came, and has been good for long.
        (20, 100, 30, 0, "L7OK", True),
        # It came a moment ago, has a request, or is not good.
        (20, 100, 10, 0, "L7OK", False),
        (20, 100, 30, 1, "L7OK", False),
        (20, 100, 30, 0, "L4CON", False),
        # It has not gone yet: whoever drains may still wait for its last request, 60 s at most.
        (20, 70, 900, 0, "L7OK", False),
        (20, 70, 70, 0, "L7OK", False),
        (20, 90, 900, 0, "L7OK", True),
        # The end of the loan, whatever the engine does.
        (0, 100, 1, 3, "L4CON", True),
    ],
)
def test_a_loan_ends_by_itself_when_nobody_can_be_at_work_any_more(
    tmp_path: Path, settled: int, age: int, last_change: int, requests: int, check: str, *, is_taken_back: bool
) -> None:
    said: list[str] = []
    table = f"# pxname,svname,scur,lastchg,check_status,\nmodel_m,gpu-1-9,{requests},{last_change},{check},\n"
    (tmp_path / "systemctl").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/stopped\n')
    (tmp_path / "systemctl").chmod(0o755)
    path = str(tmp_path / "admin.sock")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()

        def serve() -> None:
            while True:
                try:
                    connection, _address = listening.accept()
                except OSError:
                    return
                with connection:
                    said.append(connection.recv(4096).decode().strip())
                    connection.sendall(table.encode() if said[-1] == "show stat" else b"")

        thread = threading.Thread(target=serve)
        thread.start()
        words = [path, "model_m", "gpu-1-9", str(settled), "60", str(time.time() - age), "a.timer", "b.timer"]
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        subprocess.run([sys.executable, "-c", gateway_server.END, *words], check=True, env=environment)
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert ("set server model_m/gpu-1-9 state ready" in said) == is_taken_back
    assert (tmp_path / "stopped").exists() == is_taken_back


def test_timers_are_told_apart_from_what_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    loans = gateway_server.Loans("/run/admin.sock")

    def run(*command: str) -> str:
        asked.append(command)
        return ""

    monkeypatch.setattr(loans, "run", run)
    loans.lend({"name": "gpu-1-9", "backend": "model_m"}, 900, 60, 300)
    timers = [command for command in asked if command[0] == "systemd-run"]
    assert len(timers) == 2
    # systemd makes a description of the whole command, whose lines `systemctl list-units` would then show as units.
    assert all(any(word.startswith("--description=") for word in command) for command in timers)
    assert not any("\n" in word for command in timers for word in command if word.startswith("--"))
