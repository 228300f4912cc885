"""What clients of a fleet notice: one door, keys, every model, and nothing when an engine or the gateway changes."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import figures
import pytest
import testinfra

ROOT = Path(__file__).parents[3]
GATEWAY, FIRST, SECOND = "mol-gateway", "mol-gateway-1", "mol-gateway-2"
INVENTORIES = ("-i", "molecule/inventory/hosts.yml", "-i", "molecule/gateway/inventory/hosts.yml")
MODEL, OTHER_MODEL = "SmolLM2-135M-Instruct", "second-model"
MOST_SECONDS = 120
# What a key may ask in a minute, at the end of these tests.
REQUESTS = 12
# Every test works on the scenario's host, so they run in the order in which they stand; the last removes the gateway.
pytestmark = pytest.mark.usefixtures("host")
EXPOSURE = 2.0

# Runs on a host: prints the ports of an address that answer.
SCAN = r"""
import asyncio, sys
async def look(port, free):
    async with free:
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(sys.argv[1], port), 5)
            writer.close()
            return port
        except (OSError, asyncio.TimeoutError):
            return 0
async def main():
    free = asyncio.Semaphore(400)
    print(*[port for port in await asyncio.gather(*(look(port, free) for port in range(1, 65536))) if port])
asyncio.run(main())
"""


# Runs on a host: prints how many files everyone may read, and those that hold a secret. Secrets come backwards, so that
# the search does not find itself.
SEARCH = r"""
import json, os, pathlib, stat, sys
secrets = [secret[::-1].encode() for secret in json.loads(sys.argv[1])]
searched, places = 0, []
for top in ("/etc", "/home", "/root", "/run", "/tmp", "/usr/local", "/var/lib", "/var/log", "/var/tmp"):
    for folder, _, names in os.walk(top):
        for name in names:
            path = pathlib.Path(folder, name)
            about = path.lstat()
            if stat.S_ISREG(about.st_mode) and about.st_mode & stat.S_IROTH and about.st_size < 10_000_000:
                searched += 1
                if any(secret in path.read_bytes() for secret in secrets):
                    places.append(str(path))
print(searched, *places)
"""


def other(name: str) -> Any:
    """Return another host of the scenario."""
    return testinfra.get_host(f"ssh://{name}", ssh_config=str(ROOT / ".lab/ssh/config"))


def ansible(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a tool of Ansible on the scenario's inventory."""
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"}
    whole = [command[0], *INVENTORIES, *command[1:]]
    return subprocess.run(whole, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def converge(**variables: Any) -> subprocess.CompletedProcess[str]:
    """Bring the gateway to its state with other variables, which go through a file, as secrets should."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as extra:
        json.dump(variables, extra)
        extra.flush()
        return ansible("ansible-playbook", "molecule/gateway/converge.yml", "--limit", GATEWAY, "-e", f"@{extra.name}")


def server(name: str, state: str) -> dict[str, Any]:
    """Take an engine's host out of the balancing, or back."""
    words = f"name={name} state={state} timeout_seconds={MOST_SECONDS}"
    done = ansible("ansible", GATEWAY, "-m", "selfhost.lmdeploy.gateway_server", "-a", words, "-o")
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout.split("=>", 1)[1]))


class Client:
    """A client that trusts the gateway's authority and nobody else."""

    def __init__(self, authority: str, address: str, key: str) -> None:
        """Keep who it is."""
        self.context = ssl.create_default_context(cadata=authority)
        self.address, self.key = address, key

    def connection(self) -> http.client.HTTPConnection:
        """Return an open connection; the certificate must be the gateway's."""
        found = http.client.HTTPConnection(GATEWAY, timeout=MOST_SECONDS)
        plain = socket.create_connection((self.address, 443), timeout=MOST_SECONDS)
        found.sock = self.context.wrap_socket(plain, server_hostname=GATEWAY)
        return found

    def send(self, path: str, body: Any = None, key: str | None = None) -> http.client.HTTPResponse:
        """Send a request and return the answer with its body still to be read."""
        connection = self.connection()
        key = self.key if key is None else key
        # The last read of the answer closes the connection.
        headers = {"Connection": "close", **({"Authorization": f"Bearer {key}"} if key else {})}
        data = None if body is None else json.dumps(body)
        connection.putrequest("GET" if data is None else "POST", path, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        if data is not None:
            connection.putheader("Content-Length", str(len(data)))
        try:
            connection.endheaders(data.encode() if data else None)
            return connection.getresponse()
        except OSError:
            connection.close()
            raise

    def status(self, path: str, body: Any = None, key: str | None = None) -> int:
        """Return the status of an answer that came whole."""
        answer = self.send(path, body, key)
        answer.read()
        return answer.status

    def ask(self, model: str = MODEL, **more: Any) -> dict[str, Any]:
        """Return the answer to a short question."""
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "temperature": 0, "model": model}
        answer = self.send("/v1/chat/completions", {**body, **more})
        text = answer.read().decode()
        assert answer.status == 200, f"{answer.status}: {text}"
        content = json.loads(text)
        assert content["model"] == model
        assert content["usage"]["completion_tokens"] > 0
        return dict(content)


class Load:
    """Clients that ask one question after the other; every failed, cut or wrong answer is kept."""

    def __init__(self, client: Client, clients: int = 4) -> None:
        """Have clients that have not begun."""
        self.client, self.good, self.stopped = client, 0, threading.Event()
        self.faults: list[str] = []
        self.threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        while not self.stopped.is_set():
            try:
                self.client.ask()
                self.good += 1
            except (OSError, AssertionError, ValueError, http.client.HTTPException) as error:
                self.faults.append(repr(error))

    def more(self, count: int) -> None:
        """Wait for more good answers."""
        wanted, began = self.good + count, time.monotonic()
        while self.good < wanted:
            assert time.monotonic() - began < MOST_SECONDS, f"{self.good} good answers, {self.faults}"
            time.sleep(0.05)


@contextmanager
def load(client: Client) -> Iterator[Load]:
    """Have a load while something happens, and no fault in it."""
    running = Load(client)
    for thread in running.threads:
        thread.start()
    try:
        running.more(4)
        yield running
        running.more(4)
    finally:
        running.stopped.set()
        for thread in running.threads:
            thread.join()
    print(f"{running.good} answers, {len(running.faults)} faults")
    assert running.faults == []


@pytest.fixture(scope="session")
def client() -> Client:
    """Return a client with the key that the role generated."""
    host = other(GATEWAY)
    addresses = dict(line.split() for line in (ROOT / ".lab/hosts").read_text().splitlines())
    key = host.file("/etc/gateway/private/api-key").content_string.strip()
    return Client(host.file("/etc/gateway/ca.crt").content_string, addresses[GATEWAY], key)


def served(host: Any) -> dict[str, int]:
    """Return how many requests each engine has answered since the gateway started."""
    rows = host.check_output("python3 -c %s", SOCKET).splitlines()
    cells = [row.split(",") for row in rows]
    return {
        row[1]: int(row[7]) for row in cells if row[0].startswith("model_") and row[1] not in ("FRONTEND", "BACKEND")
    }


SOCKET = """
import socket
s = socket.socket(socket.AF_UNIX); s.connect("/run/gateway/admin.sock"); s.sendall(b"show stat\\n")
print(b"".join(iter(lambda: s.recv(65536), b"")).decode().strip())
"""


def test_the_unit_runs_with_few_rights(host: Any) -> None:
    assert host.service("haproxy").is_running
    assert host.service("haproxy").is_enabled
    assert set(host.check_output("ps -o user= -C haproxy").split()) == {"haproxy"}
    security = host.run("systemd-analyze security --no-pager haproxy.service").stdout
    score = float(re.search(r"Overall exposure level for \S+: ([0-9.]+)", security)[1])
    print(f"systemd-analyze security: {score}")
    assert score <= EXPOSURE, security


def test_every_model_is_listed_and_answers(client: Client) -> None:
    listed = json.loads(client.send("/v1/models").read())
    assert [model["id"] for model in listed["data"]] == [MODEL, OTHER_MODEL]
    assert client.ask(MODEL)
    assert client.ask(OTHER_MODEL)
    assert client.status("/v1/chat/completions", {"model": "no-such-model", "messages": []}) == 404


def test_only_those_with_a_key_come_in(client: Client) -> None:
    body = {"model": MODEL, "messages": []}
    engines_key = other(FIRST).file("/etc/api-server/api-key").content_string.strip()
    for key in ("", "wrong", engines_key, client.key[:-1]):
        assert client.status("/v1/models", key=key) == 401
        assert client.status("/v1/chat/completions", body, key=key) == 401


@pytest.mark.parametrize(
    "path",
    [
        *("/nodes/status", "/distserve/p2p_initialize", "/terminate", "/update_weights", "/update_weights_from_disk"),
        *(
            "/init_weights_update_group",
            "/sleep",
            "/sleep?level=2",
            "/wakeup",
            "/is_sleeping",
            "/abort_request",
            "/docs",
        ),
        *("/docs/oauth2-redirect", "/redoc", "/openapi.json", "/generate", "/pooling", "/get_ppl", "/metrics"),
        *(
            "//terminate",
            "/./terminate",
            "/x/../terminate",
            "/%74erminate",
            "/TERMINATE",
            "/%2fterminate",
            "/;/terminate",
        ),
        *("/v1/terminate", "/v1/encode", "/v1/chat/completions/", "/v1//chat/completions", "/V1/chat/completions"),
        *("/v1/chat%2fcompletions", "/v1/models/../../metrics", "/v1/models/%2e%2e/%2e%2e/metrics"),
    ],
)
def test_nothing_else_of_an_engine_is_reached(client: Client, path: str) -> None:
    assert (client.status(path), client.status(path, {"model": MODEL, "messages": []})) == (404, 404)


def test_an_answer_comes_piece_by_piece(client: Client) -> None:
    body = {
        "model": MODEL,
        "stream": True,
        "max_tokens": 12,
        "ignore_eos": True,
        "messages": [{"role": "user", "content": "Hi"}],
    }
    began, times = time.monotonic(), []
    answer = client.send("/v1/chat/completions", body)
    last = ""
    while line := answer.readline().decode():
        if line.startswith("data:"):
            times.append(time.monotonic() - began)
            last = line.strip()
    assert last == "data: [DONE]"
    gaps = [after - before for before, after in pairwise(times)]
    assert len([gap for gap in gaps if gap > 0.001]) >= 6, times


def test_a_request_with_an_image_of_ten_megabytes_finds_its_engine(host: Any, client: Client) -> None:
    # The model's name comes last, as many clients have it. llama.cpp takes the smaller one and refuses the larger.
    more = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "model": OTHER_MODEL}
    assert client.status("/v1/chat/completions", {"pad": "A" * 7_000_000, **more}) == 200
    began = time.monotonic()
    client.status("/v1/chat/completions", {"pad": "A" * 10_000_000, **more})
    print(f"10 MB took {time.monotonic() - began:.2f} s")
    # The gateway answers and hangs up before the request has ended, so the client may meet a closed connection first.
    with suppress(OSError):
        client.status("/v1/chat/completions", {"pad": "A" * 17_000_000, **more})
    lines = host.check_output("journalctl --unit haproxy.service --output cat --lines 30").splitlines()
    *_, small, large, huge = [json.loads(line) for line in lines if line.startswith("{")]
    assert [small["engine"], large["engine"]] == [f"{SECOND}-23334"] * 2
    assert (huge["engine"], huge["status"]) == ("<NOSRV>", 413)


def test_both_hosts_share_the_work(host: Any, client: Client) -> None:
    before = served(host)
    with load(client) as running:
        running.more(4)
    after = served(host)
    assert all(after[name] > before[name] for name in (f"{FIRST}-23333", f"{SECOND}-23333")), (before, after)


def test_clients_do_not_notice_that_an_engine_dies(host: Any, client: Client) -> None:
    with load(client) as running:
        other(FIRST).check_output("systemctl kill --signal KILL api-server.service")
        running.more(6)
    assert "api-server.service" in other(FIRST).check_output("systemctl list-units --all api-server.service")


def test_an_engine_is_drained_under_load_and_comes_back(host: Any, client: Client) -> None:
    server(FIRST, "ready")
    with load(client) as running:
        assert server(FIRST, "drained")["changed"]
        before = served(host)
        running.more(4)
        after = served(host)
        assert not server(FIRST, "drained")["changed"]
        assert server(FIRST, "ready")["changed"]
        running.more(6)
    assert after[f"{FIRST}-23333"] == before[f"{FIRST}-23333"]
    assert after[f"{SECOND}-23333"] > before[f"{SECOND}-23333"]
    assert served(host)[f"{FIRST}-23333"] > after[f"{FIRST}-23333"]


def test_a_change_is_taken_by_a_reload_that_no_client_notices(host: Any, client: Client) -> None:
    main = host.check_output("systemctl show --property MainPID --value haproxy.service")
    with load(client):
        done = converge(gateway_hsts_seconds=77)
        assert done.returncode == 0, done.stdout + done.stderr
    answer = client.send("/v1/models")
    answer.read()
    assert answer.getheader("Strict-Transport-Security") == "max-age=77"
    assert host.check_output("systemctl show --property MainPID --value haproxy.service") == main


def test_what_haproxy_refuses_changes_nothing(host: Any, client: Client) -> None:
    before = host.file("/etc/gateway/haproxy.cfg").sha256sum
    done = converge(gateway_metrics_port=99999)
    assert done.returncode != 0
    assert "Nothing was written" in done.stdout
    assert "99999" in done.stdout
    assert host.file("/etc/gateway/haproxy.cfg").sha256sum == before
    assert client.ask()


def test_two_keys_are_good_while_one_replaces_the_other(client: Client) -> None:
    new = "new-key-of-this-test-0123456789abcdef"
    both = [{"name": "new", "key": new}, {"name": "old", "key": client.key}]
    assert converge(gateway_api_keys=both).returncode == 0
    assert (client.status("/v1/models", key=new), client.status("/v1/models")) == (200, 200)
    assert converge(gateway_api_keys=both[:1], gateway_requests_per_minute=REQUESTS).returncode == 0
    assert (client.status("/v1/models", key=new), client.status("/v1/models")) == (200, 401)
    client.key = new


def test_the_log_tells_who_asked_what_and_no_secret(host: Any, client: Client) -> None:
    client.ask(OTHER_MODEL)
    journal = host.check_output("journalctl --unit haproxy.service --output cat --no-pager")
    lines = [json.loads(line) for line in journal.splitlines() if line.startswith("{")]
    asked = [line for line in lines if line["model"] == OTHER_MODEL][-1]
    assert (asked["key"], asked["status"], asked["engine"]) == ("new", 200, f"{SECOND}-23334")
    assert asked["path"] == "/v1/chat/completions"
    secrets = [client.key, *(other(n).file("/etc/api-server/api-key").content_string.strip() for n in (FIRST, SECOND))]
    assert not any(secret in journal for secret in secrets)
    assert not any(secret in host.check_output("ps axww -o args") for secret in secrets)
    found = host.check_output("python3 -c %s %s", SEARCH, json.dumps([secret[::-1] for secret in secrets]))
    assert int(found.split()[0]) > 100
    assert found.split()[1:] == []


def test_a_key_that_asks_too_often_is_told_when_to_come_back(client: Client) -> None:
    """Of the limit that came with the last change of keys, the test before took one. Refused questions count too."""
    body = {"model": "none", "messages": []}
    answers = [client.send("/v1/chat/completions", body) for _ in range(REQUESTS + 1)]
    told = [(answer.status, answer.getheader("Retry-After"), answer.read().decode()) for answer in answers]
    assert {status for status, *_ in told[: REQUESTS - 2]} == {404}
    status, wait, text = told[-1]
    assert (status, wait) == (429, "10")
    assert f"more than {REQUESTS} times in a minute" in text
    # Who only looks what there is is not counted.
    assert client.status("/v1/models") == 200


def test_prometheus_finds_figures_on_this_host_only(host: Any) -> None:
    read = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:8405/metrics').read().decode())"
    assert f'server="{FIRST}-23333"' in host.check_output("python3 -c %s", read)


def test_others_see_two_ports(client: Client) -> None:
    found = other(SECOND).check_output("python3 -c %s %s", SCAN, client.address)
    figures.note("ports", open_from_another_host=[int(word) for word in found.split()])
    assert found.split() == ["22", "443"]


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_tls_is_refused(client: Client) -> None:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with socket.create_connection((client.address, 443), timeout=10) as plain, pytest.raises((ssl.SSLError, OSError)):
        context.wrap_socket(plain).close()


def test_uninstalling_leaves_nothing(host: Any) -> None:
    done = ansible(
        "ansible", GATEWAY, "-m", "include_role", "-a", "name=selfhost.lmdeploy.gateway tasks_from=uninstall"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    places = ("/etc/gateway", "/run/gateway", "/etc/systemd/system/haproxy.service.d/gateway.conf", "/usr/sbin/haproxy")
    assert [place for place in places if host.file(place).exists] == []
