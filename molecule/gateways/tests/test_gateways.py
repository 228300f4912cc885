"""What clients notice of two gateways with one address: one answers when the other, or HAProxy on it, does not."""

from __future__ import annotations

import http.client
import json
import os
import re
import ssl
import subprocess
import sys
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
FIRST, SECOND = "mol-gateways", "mol-gateways-1"
INVENTORIES = ("-i", "molecule/inventory/hosts.yml", "-i", "molecule/gateways/inventory/hosts.yml")
ADDRESS, MODEL = "10.213.0.250", "SmolLM2-135M-Instruct"
EXPOSURE = 2.0
# A dead gateway is missed after three seconds and a bit; the rest is for a machine that other tests use too.
LONGEST_GAP_SECONDS = 10
CONNECT_SECONDS, ANSWER_SECONDS, PACE_SECONDS = 1.0, 10.0, 0.4
# Every test works on the scenario's hosts, so they run in the order in which they stand; the last removes the address.
pytestmark = pytest.mark.usefixtures("host")


def on(name: str) -> Any:
    """Return a host of the scenario."""
    return testinfra.get_host(f"ssh://{name}", ssh_config=str(ROOT / ".lab/ssh/config"))


def holders() -> list[str]:
    """Return the gateways that have the address."""
    found = []
    for name in (FIRST, SECOND):
        # A host without power can't be asked.
        with suppress(RuntimeError):
            found += [name] if on(name).check_output("ip -4 -brief address show to %s", f"{ADDRESS}/32") else []
    return found


def runs(name: str) -> bool:
    """Tell whether a host is there with all that a gateway needs."""
    with suppress(RuntimeError):
        return bool(on(name).run("systemctl is-active keepalived.service haproxy.service").rc == 0)
    return False


def other_than(name: str) -> str:
    """Return the other gateway."""
    return SECOND if name == FIRST else FIRST


def wait_for(what: Any, seconds: float = 60) -> None:
    """Wait until something is so."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        time.sleep(0.2)


def converge(**variables: Any) -> subprocess.CompletedProcess[str]:
    """Bring both gateways to their state with other variables."""
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"}
    command = ["ansible-playbook", *INVENTORIES, "molecule/gateways/converge.yml", "--limit", "gateways"]
    whole = [*command, "-e", json.dumps(variables)]
    return subprocess.run(whole, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


class Client:
    """A client that knows the address, one authority and one key, and asks all the time."""

    def __init__(self, authority: str, key: str) -> None:
        """Keep who it is."""
        self.context, self.key = ssl.create_default_context(cadata=authority), key
        self.answered: list[float] = []
        self.faults: list[str] = []
        self.stopped = threading.Event()

    def send(self, path: str, body: Any, seconds: float) -> Any:
        """Return an answer's JSON; whoever answers must have a certificate for the address."""
        connection = http.client.HTTPSConnection(ADDRESS, timeout=CONNECT_SECONDS, context=self.context)
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json", "Connection": "close"}
        try:
            connection.connect()
            connection.sock.settimeout(seconds)
            connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        if answer.status != 200:
            message = f"{answer.status}: {text}"
            raise OSError(message)
        return json.loads(text)

    def chat(self) -> str:
        """Return the engine's answer to a short question."""
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "temperature": 0, "model": MODEL}
        return str(self.send("/v1/chat/completions", body, 120)["choices"][0]["message"]["content"])

    def once(self) -> None:
        """Ask what the gateway answers by itself, and keep when the answer came."""
        try:
            self.send("/v1/models", None, ANSWER_SECONDS)
            self.answered.append(time.monotonic())
        except (OSError, http.client.HTTPException) as fault:
            self.faults.append(repr(fault))

    def run(self) -> None:
        """Ask at an even pace: a request that waits for an answer in vain does not hide that others are answered."""
        asked = []
        while not self.stopped.is_set():
            asked.append(threading.Thread(target=self.once))
            asked[-1].start()
            time.sleep(PACE_SECONDS)
        for thread in asked:
            thread.join()

    def gap(self) -> float:
        """Return the longest time between two answers."""
        moments = sorted(self.answered)
        return max((after - before for before, after in pairwise(moments)), default=0.0)


@contextmanager
def asking() -> Iterator[Client]:
    """Have a client ask while something happens; it must be answered before and after."""
    host = on(SECOND)
    key = host.file("/etc/gateway/private/api-key").content_string.strip()
    client = Client(host.file("/etc/gateway/ca.crt").content_string, key)
    thread = threading.Thread(target=client.run)
    thread.start()
    try:
        wait_for(lambda: len(client.answered) >= 3)
        yield client
        assert client.chat() != ""
        at = len(client.answered)
        wait_for(lambda: len(client.answered) >= at + 5)
    finally:
        client.stopped.set()
        thread.join()


def power(verb: str, name: str) -> None:
    """Cut a host's power, or give it back."""
    tool = [sys.executable, "script/hosts", "podman", verb, *(["--signal", "KILL"] if verb == "kill" else [])]
    subprocess.run([*tool, f"selfhost-{name}"], cwd=ROOT, check=True, capture_output=True)


def test_the_first_gateway_has_the_address_and_few_rights() -> None:
    assert holders() == [FIRST]
    for name in (FIRST, SECOND):
        host = on(name)
        assert host.service("keepalived").is_running
        assert host.service("keepalived").is_enabled
        assert set(host.check_output("ps -o user:32= -C keepalived").split()) == {"keepalived_script"}
        security = host.run("systemd-analyze security --no-pager keepalived.service").stdout
        score = float(re.search(r"Overall exposure level for \S+: ([0-9.]+)", security)[1])
        print(f"systemd-analyze security: {score}")
        assert score <= EXPOSURE, security


def test_the_journal_is_quiet() -> None:
    for name in (FIRST, SECOND):
        host = on(name)
        lines = host.check_output("journalctl --unit keepalived.service --output cat --no-pager").splitlines()
        assert len(lines) < 60, lines
        assert not [line for line in lines if "Couldn't" in line or "insecure" in line or "does not exist" in line]


def test_clients_need_one_authority_and_one_key() -> None:
    for path in ("/etc/gateway/ca.crt", "/etc/gateway/private/api-key", "/etc/gateway/keys.map"):
        assert on(FIRST).file(path).sha256sum == on(SECOND).file(path).sha256sum
    assert on(FIRST).file("/etc/gateway/gateway.pem").sha256sum != on(SECOND).file("/etc/gateway/gateway.pem").sha256sum
    with asking() as client:
        pass
    assert client.faults == []


def test_the_firewall_lets_gateways_hear_each_other_and_nobody_else() -> None:
    for name in (FIRST, SECOND):
        rules = on(name).check_output("nft list table inet selfhost")
        allowed = set(re.findall(r"ip saddr (\S+) meta l4proto (?:112|vrrp) accept", rules))
        known = dict(line.split() for line in (ROOT / ".lab/hosts").read_text().splitlines())
        assert allowed == {known[FIRST], known[SECOND]}, rules


def test_haproxy_that_is_gone_moves_the_address_and_its_return_does_not() -> None:
    holder = holders()[0]
    with asking() as client:
        on(holder).check_output("systemctl stop haproxy.service")
        wait_for(lambda: holders() == [other_than(holder)], LONGEST_GAP_SECONDS)
        at = len(client.answered)
        wait_for(lambda: len(client.answered) > at)
    print(f"HAProxy stopped: answers again after {client.gap():.1f} s, {len(client.faults)} faults")
    figures.note("haproxy_stopped", gap_seconds=round(client.gap(), 1), faults=len(client.faults))
    assert client.gap() <= LONGEST_GAP_SECONDS, client.faults
    with asking() as client:
        on(holder).check_output("systemctl start haproxy.service")
        wait_for(lambda: "succeeded" in on(holder).check_output("journalctl -u keepalived -n 3 -o cat --no-pager"), 20)
        at = len(client.answered)
        wait_for(lambda: len(client.answered) > at + 20)
    assert client.faults == []
    assert holders() == [other_than(holder)]


def test_haproxy_that_died_is_back_or_replaced() -> None:
    holder = holders()[0]
    with asking() as client:
        on(holder).check_output("systemctl kill --signal KILL haproxy.service")
        at = len(client.answered)
        wait_for(lambda: len(client.answered) > at + 5)
    print(f"HAProxy killed: answers again after {client.gap():.1f} s, {len(client.faults)} faults")
    figures.note("haproxy_killed", gap_seconds=round(client.gap(), 1), faults=len(client.faults))
    assert client.gap() <= LONGEST_GAP_SECONDS, client.faults
    assert len(holders()) == 1


def test_keepalived_that_died_leaves_one_holder() -> None:
    holder = holders()[0]
    with asking() as client:
        on(holder).check_output("systemctl kill --signal KILL keepalived.service")
        wait_for(lambda: on(holder).run("systemctl is-active keepalived.service").rc == 0 and len(holders()) == 1, 20)
    print(f"keepalived killed: the longest wait was {client.gap():.1f} s, {len(client.faults)} faults")
    assert client.gap() <= LONGEST_GAP_SECONDS, client.faults


def test_a_power_cut_moves_the_address_and_its_end_does_not() -> None:
    # The engine's host is to stay.
    if holders() != [FIRST]:
        on(SECOND).check_output("systemctl restart keepalived.service")
    wait_for(lambda: holders() == [FIRST], 20)
    with asking() as client:
        power("kill", FIRST)
        wait_for(lambda: holders() == [SECOND], LONGEST_GAP_SECONDS)
        at = len(client.answered)
        wait_for(lambda: len(client.answered) > at)
    print(f"power cut: answers again after {client.gap():.1f} s, {len(client.faults)} faults")
    figures.note("power_cut", gap_seconds=round(client.gap(), 1), faults=len(client.faults))
    assert client.gap() <= LONGEST_GAP_SECONDS, client.faults
    with asking() as client:
        power("start", FIRST)
        wait_for(lambda: runs(FIRST), 120)
        at = len(client.answered)
        wait_for(lambda: len(client.answered) > at + 20)
    assert client.faults == []
    assert holders() == [SECOND]


def test_a_change_leaves_the_address_where_it_is() -> None:
    holder = holders()
    with asking() as client:
        done = converge(gateway_hsts_seconds=77)
        assert done.returncode == 0, done.stdout + done.stderr
    assert client.faults == []
    assert holders() == holder


def test_an_address_that_can_not_be_shared_changes_nothing() -> None:
    before = on(FIRST).file("/etc/keepalived/keepalived.conf").sha256sum
    done = converge(gateway_virtual_address="192.0.2.1")
    assert done.returncode != 0
    said = " ".join(done.stdout.split())
    assert "gateway_virtual_address is 192.0.2.1, and 192.0.2.1 is not in 10.213.0.0/24" in said
    assert on(FIRST).file("/etc/keepalived/keepalived.conf").sha256sum == before


def test_without_the_variable_nothing_of_it_is_left() -> None:
    done = converge(gateway_virtual_address="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert holders() == []
    for name in (FIRST, SECOND):
        places = ("/usr/sbin/keepalived", "/etc/keepalived", "/etc/systemd/system/keepalived.service.d/gateway.conf")
        assert [place for place in places if on(name).file(place).exists] == []
        assert on(name).user("keepalived_script").exists is False
        assert on(name).service("haproxy").is_running
    again = converge(gateway_virtual_address="")
    assert re.findall(r"changed=([1-9]\d*)", again.stdout) == [], again.stdout
