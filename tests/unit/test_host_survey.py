"""The module host_survey: what it sees on this machine, in folders made for it and on a server of its own."""

from __future__ import annotations

import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import host_look, settled
from ansible_collections.selfhost.lmdeploy.plugins.modules import host_survey

if TYPE_CHECKING:
    from collections.abc import Iterator

NOTHING: dict[str, Any] = {
    "paths": [], "ports": [], "models": [], "environments": [], "units": [], "urls": [], "proxies": {}, "ca_pem": "",
    "trust_name": "", "conda": {}, "system_packages": [], "watched": {}, "timeout_seconds": 2.0,
}  # fmt: skip


@pytest.fixture
def server() -> Iterator[str]:
    """Return the address of a server that answers with the status that the path names, or never."""
    release = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            if self.path == "/private" and self.headers["Authorization"] != "Basic YW5uOnBAc3M=":
                self.path = "/502"
            if self.path.startswith("/never"):
                release.wait(10)
            self.send_response(int(self.path.strip("/")) if self.path.strip("/").isdigit() else 200)
            self.end_headers()

        def log_message(self, *_arguments: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    release.set()
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a proxy of this machine out of the tests, and theirs, which the module sets, out of later ones."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        for spelling in (name, name.upper()):
            # Set first, so that even one that is absent now is absent again afterwards.
            monkeypatch.setenv(spelling, "")
            monkeypatch.delenv(spelling)


def urls(*wanted: str, **changes: Any) -> dict[str, tuple[bool, str]]:
    """Return what is said about each address."""
    found = host_survey.survey({**NOTHING, "urls": wanted, **changes})["urls"]
    return {url: (facts["reached"], facts["detail"]) for url, facts in zip(wanted, found, strict=True)}


def test_a_live_server_is_reached_whatever_it_answers(server: str) -> None:
    found = urls(*(f"{server}/{status}" for status in (200, 301, 401, 403, 404, 405)))
    assert {reached for reached, _detail in found.values()} == {True}


def test_user_and_password_of_an_address_are_sent(server: str) -> None:
    private = server.replace("://", "://ann:p%40ss@") + "/private"
    assert urls(private)[private] == (True, "HTTP 200")
    assert not urls(f"{server}/private")[f"{server}/private"][0]


def test_gateways_without_their_server_are_not(server: str) -> None:
    assert urls(f"{server}/502")[f"{server}/502"] == (False, "HTTP 502 Bad Gateway")
    assert not urls(f"{server}/407")[f"{server}/407"][0]


def test_silence_costs_the_timeout_once(server: str) -> None:
    began = time.monotonic()
    found = urls(f"{server}/never", f"{server}/never?2", f"{server}/200", timeout_seconds=0.5)
    assert time.monotonic() - began < 2
    assert [reached for reached, _detail in found.values()] == [False, False, True]


def test_refused_unknown_and_missing_say_why(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        refused = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        found = urls(refused, "http://no-such-host.invalid/", f"file://{tmp_path}", f"file://{tmp_path}/none")
    assert "refused" in found[refused][1]
    assert not found["http://no-such-host.invalid/"][0]
    assert found[f"file://{tmp_path}"] == (True, "exists")
    assert found[f"file://{tmp_path}/none"] == (False, "no such file on the host")


def test_the_proxy_is_asked_for_other_hosts(server: str) -> None:
    answer = urls("http://no-such-host.invalid/404", proxies={"http_proxy": server})
    # The proxy, which is our server, gets the whole address as path and says 200.
    assert answer == {"http://no-such-host.invalid/404": (True, "HTTP 200")}


def test_a_listener_is_found_with_its_process() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as six,
    ):
        port, other = listening.getsockname()[1], six.getsockname()[1]
        found = {(entry["address"], entry["port"]): entry for entry in host_survey.survey_listeners([port, other])}
    assert set(found) == {("127.0.0.1", port), ("::1", other)}
    assert found["127.0.0.1", port]["pid"] == os.getpid()
    assert found["127.0.0.1", port]["process"]
    assert host_survey.survey_listeners([port]) == []


def test_a_path_that_is_not_there_is_on_its_parents_disk(tmp_path: Path) -> None:
    facts = host_survey.survey_path(f"{tmp_path}/a/b", Path("/proc/mounts").read_text())
    assert (facts["exists"], facts["nearest"]) == (False, str(tmp_path))
    assert facts["device"] == tmp_path.stat().st_dev
    assert facts["free_bytes"] > 0
    assert facts["file_system"]


def test_a_model_is_weighed(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x" * 10)
    (tmp_path / "b.safetensors").write_bytes(b"x" * 20)
    (tmp_path / "old.bin").write_bytes(b"x" * 1000)
    (tmp_path / "config.json").write_text('{"llm_config": {"num_attention_heads": 40}}')
    (tmp_path / "model.gguf").write_bytes(b"x" * 7)
    assert host_look.survey_model(str(tmp_path))["weight_bytes"] == 30
    assert host_look.survey_model(str(tmp_path))["heads"] == 40
    assert host_look.survey_model(str(tmp_path / "model.gguf"))["weight_bytes"] == 7
    assert not host_look.survey_model(str(tmp_path / "none"))["exists"]
    (tmp_path / "config.json").write_text("{broken")
    assert host_look.survey_model(str(tmp_path))["heads"] == 0


def test_installed_versions_are_read_from_metadata_folders(tmp_path: Path) -> None:
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    for name in ("open_webui-0.12.4.dist-info", "lmdeploy-0.18.0.dist-info", "lmdeploy_extras-9.dist-info"):
        (packages / name).mkdir(parents=True)
    facts = host_survey.survey_environment(str(tmp_path), ["open-webui", "lmdeploy", "torch"])
    assert facts == {"exists": True, "packages": {"open-webui": "0.12.4", "lmdeploy": "0.18.0"}}
    assert host_survey.survey_environment(str(tmp_path / "no"), ["x"]) == {"exists": False, "packages": {}}


def fake_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Put a program called nvidia-smi in front of PATH."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_an_old_driver_is_asked_again_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """case "$*" in
      *compute_cap*) echo 'Field "compute_cap" is not a valid field to query.'; exit 2 ;;
      *--query-gpu*) echo '0, GPU-1, NVIDIA GeForce GTX 1080 Ti, 470.256.02, 11178, 2, [N/A]' ;;
      *topo*) echo 'no' ;;
    esac"""
    fake_smi(tmp_path, monkeypatch, body)
    found = host_look.survey_gpus(5)
    assert found["cards"][0]["driver"] == "470.256.02"
    assert found["error"] == ""


def test_the_cards_that_are_left_are_told_beside_the_lost_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Path(__file__).parent / "fixtures/nvidia_smi/rtx3090_4_one_gone"
    body = f"""case "$*" in
      *--query-gpu*) cat {machine}/gpus.csv; exit 15 ;;
      *topo*) cat {machine}/topology.txt ;;
    esac"""
    fake_smi(tmp_path, monkeypatch, body)
    found = host_look.survey_gpus(5)
    assert (found["error"], len(found["cards"]), len(found["lost"])) == ("", 3, 1)
    assert [(card["numa"], card["cpus"]) for card in found["cards"]][1:] == [(0, "0-15,32-47"), (1, "16-31,48-63")]


def test_a_driver_that_fails_or_hangs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, monkeypatch, "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    assert "version mismatch" in host_look.survey_gpus(5)["error"]
    fake_smi(tmp_path, monkeypatch, "exec sleep 30")
    began = time.monotonic()
    assert "no answer within" in host_look.survey_gpus(0.3)["error"]
    assert time.monotonic() - began < 3


def test_the_whole_survey_is_quick_and_complete_on_this_machine() -> None:
    began = time.monotonic()
    found = host_survey.survey({**NOTHING, "paths": ["/opt/none"], "ports": [1], "units": ["none.service"]})
    assert time.monotonic() - began < 2
    assert found["os_id"]
    assert found["memory_bytes"] > found["memory_free_bytes"] > 0
    assert abs(found["time"] - time.time()) < 5
    assert found["units"] == {}


def test_what_is_as_wanted_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pem = "-----BEGIN CERTIFICATE-----\nQUJD\n-----END CERTIFICATE-----\n"
    monkeypatch.setattr(settled, "CERTIFICATES", tmp_path)
    monkeypatch.setattr(settled, "BUNDLE", tmp_path / "bundle")
    (tmp_path / "ours-1.crt").write_text(pem)
    (tmp_path / "bundle").write_text(f"others\n{pem}")
    prefix, profile = tmp_path / "conda", tmp_path / "conda.sh"
    for name in ("bin/conda", "bin/python", "conda-meta/history"):
        (prefix / name).parent.mkdir(parents=True, exist_ok=True)
        (prefix / name).touch()
    (prefix / settled.MARKER).write_text('{"sha256": "ab"}')
    profile.write_text(settled.PROFILE.format(prefix=prefix))
    wanted: dict[str, Any] = {
        "trust_name": "ours",
        "ca_pem": pem,
        "conda": {"prefix": str(prefix), "sha256": "AB", "profile": str(profile)},
        "system_packages": ["libc6", "no-such-package"],
    }

    def look(**changes: Any) -> Any:
        # The certificate of the test is none, so no address is tried with it.
        monkeypatch.setattr(host_survey, "survey_urls", lambda *_: [])
        return host_survey.survey({**NOTHING, **wanted, **changes})["settled"]

    assert look() == {"trust": True, "conda": True, "packages": ["libc6"]}
    # Another certificate, one too many, or none where one is.
    assert not look(ca_pem="")["trust"]
    assert not look(ca_pem=pem.replace("QUJD", "QUJE"))["trust"]
    assert not look(trust_name="")["trust"]
    (tmp_path / "bundle").write_text("others\n")
    assert not look()["trust"]
    # Another installer, a run that was cut, a profile that somebody changed.
    assert not look(conda={**wanted["conda"], "sha256": "cd"})["conda"]
    settled.unfinished(prefix).touch()
    assert not look()["conda"]
    settled.unfinished(prefix).unlink()
    profile.write_text("")
    assert not look()["conda"]
    assert look(conda={}, system_packages=[], trust_name="") == {"trust": False, "conda": False, "packages": []}
