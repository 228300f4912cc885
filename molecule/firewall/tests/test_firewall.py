"""What an operator notices of the firewall: others see the open doors alone, and nobody is locked out.

The tests stand in the order in which they run; the last one removes the firewall.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import figures
import testinfra
from hardening import exposure

ROOT = Path(__file__).resolve().parents[3]
UNIT = "selfhost-firewall.service"
PORTS = (22, 80, 443, 8080, 9100, 23333)
# Connects to many ports at once: a closed one never answers, so each alone would cost the whole time limit.
SCAN = """
import resource, select, socket, sys, time
limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
ports = [port for word in sys.argv[2].split() for first, _, last in [word.partition("-")]
         for port in range(int(first), int(last or first) + 1)]
for start in range(0, len(ports), 4000):
    poll, waiting = select.poll(), {}
    for port in ports[start : start + 4000]:
        one = socket.socket()
        one.setblocking(False)
        one.connect_ex((sys.argv[1], port))
        waiting[one.fileno()] = (one, port)
        poll.register(one, select.POLLOUT)
    end = time.monotonic() + 2
    while (left := end - time.monotonic()) > 0:
        for number, _ in poll.poll(left * 1000):
            one, port = waiting.pop(number)
            poll.unregister(number)
            if one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                print(port)
            one.close()
    for one, _ in waiting.values():
        one.close()
"""
SCANNED = "1-12000 20000-24000"


def address(name: str) -> str:
    """Return the address of a test host."""
    command = ["ssh", "-G", "-F", str(ROOT / ".lab/ssh/config"), name]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return next(line.split()[1] for line in lines if line.startswith("hostname "))


FIRST, SECOND = address("mol-firewall"), address("mol-firewall-1")
VARIABLES: dict[str, Any] = {
    "firewall_enabled": True,
    "firewall_doors": [{"port": 443}],
    "firewall_other_doors": [{"port": 9100, "networks": [SECOND]}],
    "firewall_confirm_seconds": 20,
}


def other() -> Any:
    """Return the host that looks from outside."""
    config = str(ROOT / ".lab/ssh/config")
    return testinfra.get_host("ssh://mol-firewall-1", ssh_config=config)


def seen(ports: str = " ".join(map(str, PORTS))) -> list[int]:
    """Return the ports that the other host can connect to."""
    # A container that was restarted has another hardware address, which the neighbour would notice late.
    output = other().check_output("ip neigh flush all; python3 -c %s %s %s", SCAN, FIRST, ports)
    return sorted(int(word) for word in str(output).split())


def seen_from_here() -> list[int]:
    """Return the ports that this machine can connect to."""
    found = []
    for port in PORTS:
        with socket.socket() as connection:
            connection.settimeout(1)
            if connection.connect_ex((FIRST, port)) == 0:
                found.append(port)
    return found


def test_others_see_ssh_and_the_doors_alone(host: Any) -> None:
    assert "LISTEN" in host.check_output("ss -Hltn sport = :23333"), "what is closed must have been open"
    found = seen(SCANNED)
    figures.note("firewall", ports_scanned=SCANNED, ports_open=found)
    assert found == [22, 443, 9100]


def test_a_door_with_networks_is_closed_to_others(host: Any) -> None:
    assert host.file("/etc/selfhost-firewall/rules.nft").exists
    assert seen_from_here() == [22, 443]


def test_the_host_itself_reaches_everything(host: Any) -> None:
    host.check_output("python3 -c %s", "import urllib.request as u; u.urlopen('http://127.0.0.1:23333').read()")
    connect = f"import socket; socket.create_connection(('{SECOND}', 22), timeout=3)"
    host.check_output("python3 -c %s", connect)
    assert other().run(f"ping -c 1 -W 2 {FIRST}").rc in (0, 127)


def test_the_unit_can_do_little(host: Any) -> None:
    assert exposure(host, UNIT) <= 2.0
    assert host.check_output(f"systemctl show -P DynamicUser {UNIT}") == "yes"


def test_a_network_that_is_none_changes_nothing(host: Any, play: Callable[..., Any]) -> None:
    before = host.check_output("nft list ruleset")
    for network, word in (("10.0.0.0/99", "10.0.0.0/99"), ("some.name", "firewall_other_doors")):
        doors = [{"port": 9100, "networks": [network]}]
        assert word in play("firewall", **{**VARIABLES, "firewall_other_doors": doors}).message()
    assert host.check_output("nft list ruleset") == before


def test_tables_of_others_stay(host: Any, play: Callable[..., Any]) -> None:
    host.check_output("nft add table inet other")
    more = {**VARIABLES, "firewall_doors": [{"port": 443}, {"port": 8080}]}
    assert play("firewall", **more).changed() > 0
    assert seen() == [22, 443, 8080, 9100]
    assert play("firewall", **more).changed() == 0
    assert play("firewall", **VARIABLES).changed() > 0
    assert "table inet other" in host.check_output("nft list tables")
    assert host.run("systemctl is-active selfhost-firewall-undo.timer").rc != 0


def test_who_locks_himself_out_is_let_in_again(host: Any, play: Callable[..., Any]) -> None:
    """Rules that leave out the controller: the play fails, and the host opens by itself."""
    locked_out = play("firewall", **VARIABLES, firewall_ssh_networks=["192.0.2.0/24"])
    assert locked_out.rc != 0
    deadline = time.monotonic() + 30
    while 22 not in seen_from_here():
        assert time.monotonic() < deadline, "still closed"
    assert host.run(f"systemctl is-enabled {UNIT}").stdout.strip() == "disabled"
    assert play("firewall", **VARIABLES).changed() > 0
    assert seen() == [22, 443, 9100]


def test_a_reboot_changes_nothing(host: Any) -> None:
    subprocess.run([ROOT / "script/hosts", "restart", "mol-firewall"], check=True, capture_output=True)
    assert host.check_output(f"systemctl is-active {UNIT}") == "active"
    assert seen() == [22, 443, 9100]


def test_switching_it_off_leaves_nothing(host: Any, play: Callable[..., Any]) -> None:
    assert play("firewall", firewall_enabled=False).changed() > 0
    assert play("firewall", firewall_enabled=False).changed() == 0
    assert seen() == [22, 443, 8080, 9100, 23333]
    assert "selfhost" not in host.check_output("nft list tables")
    assert host.run("ls /etc/selfhost-firewall /etc/systemd/system/selfhost-firewall.service").stdout == ""
