"""The module gateway_server: which engines a name stands for, and when a drain is over."""

from __future__ import annotations

from typing import Any

import pytest
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
        self.admin[backend, name] = 8 if command.endswith("drain") else 0
        return ""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_server, "POLL_SECONDS", 0)


def converge(proxy: HAProxy, name: str, state: str, *, dry: bool = False, timeout: float = 5) -> dict[str, Any]:
    """Run the module's work against a socket."""
    params = {"name": name, "state": state, "timeout_seconds": timeout}
    return gateway_server.converge(params, proxy.say, dry=dry)


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
    with pytest.raises(gateway_server.SocketFault, match="check bad"):
        converge(proxy, "gpu-1-9", "ready", timeout=0)
    proxy.state["model_m", "gpu-1-9"] = 2
    assert converge(proxy, "gpu-1-9", "ready")["servers"][0]["is_up"]


def test_a_drain_that_does_not_end_says_who_is_left() -> None:
    with pytest.raises(gateway_server.SocketFault, match=r"gpu-1-9 has 2 requests"):
        converge(HAProxy(("model_m", "gpu-1-9"), requests=(2,)), "gpu-1", "drained", timeout=0)


def test_check_mode_tells_and_touches_nothing() -> None:
    proxy = HAProxy(("model_m", "gpu-1-9"), requests=(5,))
    assert converge(proxy, "gpu-1", "drained", dry=True)["changed"]
    assert not converge(proxy, "gpu-1", "ready", dry=True)["changed"]
    assert proxy.said == []


def test_only_looking_changes_nothing() -> None:
    assert not converge(HAProxy(("model_m", "gpu-1-9"), requests=(5,)), "gpu-1", "present")["changed"]


def test_a_name_that_is_not_there_is_a_fault() -> None:
    with pytest.raises(gateway_server.SocketFault, match="no engine called gpu-7"):
        converge(HAProxy(("model_m", "gpu-1-9")), "gpu-7", "drained")


def test_what_haproxy_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = HAProxy(("model_m", "gpu-1-9"))
    say = proxy.say
    monkeypatch.setattr(
        proxy, "say", lambda command: say(command) if command.startswith("show") else "Permission denied"
    )
    with pytest.raises(gateway_server.SocketFault, match="refuses to set gpu-1-9 to drain: Permission denied"):
        converge(proxy, "gpu-1", "drained")
