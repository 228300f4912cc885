"""The module host_status and the filter status_table: what is read from a host, and how people see it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.filter.status_table import status_table
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.haproxy import SocketFault
from ansible_collections.selfhost.lmdeploy.plugins.modules import host_status
from serving import serving

EXEC = "{{ path={0} ; argv[]={0} {1} ; ignore_errors=no ; start_time=[n/a] ; status=0/0 }}"


class Health(BaseHTTPRequestHandler):
    """Good health, and nothing else."""

    def do_GET(self) -> None:
        """Answer."""
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    """Serve good health on a free port."""
    server = HTTPServer(("127.0.0.1", 0), Health)
    with serving(server):
        yield server.server_port


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """Return the link to a release that holds all three programs."""
    packages = tmp_path / "releases/x/0123456789ab/lib/python3.11/site-packages"
    for name in ("lmdeploy-0.18.0", "xllamacpp-0.2.1", "open_webui-0.12.4"):
        (packages / f"{name}.dist-info").mkdir(parents=True)
    proof = {"providers": {"libnccl.so.2": "nvidia-nccl-cu12 2.27.5"}}
    (tmp_path / "releases/x/0123456789ab/lmdeploy.json").write_text(json.dumps(proof), encoding="utf-8")
    link = tmp_path / "envs/x"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "releases/x/0123456789ab")
    return link


def shown(program: Path, arguments: str, **changes: str) -> dict[str, str]:
    """Return what systemd shows of a unit that runs a program."""
    text = {
        "ActiveState": "active",
        "NRestarts": "0",
        "UnitFileState": "enabled",
        "StatusText": "Serving m: ready after 1.2 s",
        "ExecStart": EXEC.format(program, arguments),
        **changes,
    }
    return host_status.properties("\n".join(f"{k}={v}" for k, v in text.items()))


def instance(folder: Path, port: int, engine: str = "lmdeploy") -> None:
    """Leave an instance file as the role api_server does."""
    content = {
        "engine": engine,
        "model_name": "m",
        "model_path": "/var/lib/models/m",
        "host": "127.0.0.1",
        "port": port,
        "environment": {"CUDA_VISIBLE_DEVICES": "2,3"},
    }
    (folder / "api-server.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(("engine", "version"), [("lmdeploy", "0.18.0"), ("llama_cpp", "0.2.1")])
def test_an_engine_is_told_whole(tmp_path: Path, release: Path, port: int, engine: str, version: str) -> None:
    instance(tmp_path, port, engine)
    found = host_status.service("api-server.service", shown(release / "bin/python", "/x/launcher.py"), tmp_path, 2)
    assert found == {
        "unit": "api-server.service",
        "program": engine,
        "version": version,
        "release": "0123456789ab",
        "libraries": {"libnccl.so.2": "nvidia-nccl-cu12 2.27.5"},
        "gpus": "2,3",
        "environment": "0123456789ab",
        "pending": "",
        "model": "m",
        "model_path": "/var/lib/models/m",
        "url": f"http://127.0.0.1:{port}",
        "state": "active",
        "since": "",
        "restarts": 0,
        "enabled": True,
        "healthy": True,
        "gate": "Serving m: ready after 1.2 s",
    }


def test_an_interface_is_told_from_its_command(tmp_path: Path, release: Path, port: int) -> None:
    words = f"serve --host 0.0.0.0 --port {port}"
    found = host_status.service(
        "open-webui.service", shown(release / "bin/open-webui", words, NRestarts="2"), tmp_path, 2
    )
    assert (found["program"], found["version"], found["restarts"]) == ("open_webui", "0.12.4", 2)
    assert (found["url"], found["healthy"]) == (f"http://127.0.0.1:{port}", True)


def test_a_dead_service_has_no_health(tmp_path: Path, release: Path) -> None:
    instance(tmp_path, 1)
    text = shown(release / "bin/python", "x", ActiveState="failed", UnitFileState="disabled")
    found = host_status.service("api-server.service", text, tmp_path, 2)
    assert (found["state"], found["enabled"], found["healthy"]) == ("failed", False, False)


def test_a_damaged_host_is_told_and_not_a_crash(tmp_path: Path) -> None:
    found = host_status.service("api-server.service", shown(tmp_path / "gone/bin/python", "x"), tmp_path, 2)
    assert (found["version"], found["release"], found["healthy"]) == ("", "", False)
    assert "is damaged" in found["gate"]
    assert found["libraries"] == {}
    assert host_status.service("api-server.service", {}, tmp_path, 2)["state"] == "unknown"


def test_the_table_has_a_line_for_each_service_and_for_hosts_without(tmp_path: Path, release: Path) -> None:
    instance(tmp_path, 1)
    one = host_status.service("api-server.service", shown(release / "bin/python", "x", NRestarts="3"), tmp_path, 1)
    lines = status_table({"gpu-1": [one, {**one, "enabled": False}], "bare": [], "off": None}).splitlines()
    assert " ".join(lines[0].split()) == "HOST SERVICE STATE HEALTH PROGRAM RELEASE MODEL ADDRESS LAST GATE"
    assert lines[1].split("  ")[0] == "gpu-1"
    assert "active, 3 restarts  " in lines[1]
    assert "lmdeploy 0.18.0  0123456789ab  m      http://127.0.0.1:1  Serving m" in lines[1]
    assert "not at boot" in lines[2]
    assert lines[3].split() == ["bare", "nothing", "installed"]
    assert lines[4].endswith("could not be asked")
    assert lines[5:] == ["lmdeploy 0.18.0 0123456789ab loads libnccl.so.2 (nvidia-nccl-cu12 2.27.5)"]
    assert len({line.index(one["url"]) for line in lines[1:3]} | {lines[0].index("ADDRESS")}) == 1


CONFIG = """
frontend gateway
    bind *:443 ssl crt /etc/gateway/gateway.pem alpn h2,http/1.1
    bind 127.0.0.1:8444
    use_backend model_m if is_api { var(txn.model) -m str -- m }
    use_backend model_o-n if is_api { var(txn.model) -m str -- o/n }
frontend metrics
    bind 127.0.0.1:8405
"""


@pytest.mark.parametrize(
    ("admin", "state", "said", "healthy"),
    [(0, 2, "gpu-1-9 in use", True), (8, 2, "gpu-1-9 drained", False), (0, 0, "gpu-1-9 not good", False)],
)
def test_a_gateway_tells_its_engines(admin: int, state: int, said: str, healthy: bool) -> None:
    answers = {
        "show info": "Name: HAProxy\nVersion: 2.6.12-1\n",
        "show stat": "# pxname,svname,qcur,scur,\nmodel_m,gpu-1-9,0,1,\n",
        "show servers state": "1\n# be_id be_name srv_id srv_name srv_op_state srv_admin_state\n"
        f"3 model_m 1 gpu-1-9 {state} {admin}\n",
    }
    found = host_status.gateway({"ActiveState": "active", "UnitFileState": "enabled"}, CONFIG, answers.__getitem__)
    assert (found["version"], found["url"], found["model"]) == ("2.6.12-1", "http://127.0.0.1:8444", "m, o/n")
    assert (found["gate"], found["healthy"], found["state"]) == (said, healthy, "active")
    assert " ".join(status_table({"door": [found]}).splitlines()[1].split()).startswith("door haproxy active")


def test_a_gateway_that_does_not_answer_is_told() -> None:
    def silent(_: str) -> str:
        message = "HAProxy does not answer"
        raise SocketFault(message)

    found = host_status.gateway({}, CONFIG, silent)
    assert (found["healthy"], found["gate"], found["engines"]) == (False, "HAProxy does not answer", [])
