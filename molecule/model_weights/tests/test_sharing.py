"""What people notice of hosts that share models: the hub is asked once, no source harms, and no door stays open."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import testinfra
from test_model_weights import NO_PACKAGES, SHARD, asked, faults  # noqa: F401  # a fixture

ROOT = Path(__file__).parents[3]
FIRST, SECOND, THIRD = "mol-model-weights", "mol-model-weights-1", "mol-model-weights-2"
PORT = 8377
FOLDER = "/srv/fleet"
SHARED: dict[str, Any] = {
    **NO_PACKAGES,
    "hosts": f"{FIRST}*",
    "model_weights_dir": FOLDER,
    "model_weights_shared": True,
    "model_weights_progress_seconds": 1,
}


@pytest.fixture(scope="module")
def fleet(host: Any) -> Iterator[dict[str, Any]]:
    """Return all three hosts by their names, without models."""
    found = {
        name: testinfra.get_host(f"ssh://{name}", ssh_config=str(ROOT / ".lab/ssh/config")) for name in (SECOND, THIRD)
    }
    hosts = {FIRST: host, **found}
    for one in hosts.values():
        one.run_expect([0], f"rm -rf {FOLDER}")
    yield hosts
    for one in hosts.values():
        one.run_expect([0], f"rm -rf {FOLDER}")


def sums(host: Any) -> str:
    """Return the checksums of a host's model."""
    return str(host.check_output(f"cd {FOLDER}/test--tiny/ && find . -type f ! -name '.*' | sort | xargs sha256sum"))


def nothing_left(host: Any) -> None:
    """Fail where a host still gives, or keeps anything of it."""
    assert host.check_output(f"ss -Hltn 'sport = :{PORT}'") == ""
    assert host.run("systemctl is-active model-share.service").stdout.strip() == "inactive"
    assert host.run("grep -rls 'BEGIN PRIVATE KEY' /root/.ansible /root/.ansible_async /tmp /srv/fleet").stdout == ""
    host.run_expect([2], "ls /run/model-share")


def test_the_hub_is_asked_once_for_all(fleet: dict[str, Any], play: Callable[..., Any], request: Any) -> None:
    """Every file comes from the hub once, and every host has all of them; then nobody is asked again."""
    request.getfixturevalue("faults")()
    planned = play("model_weights", check=True, **SHARED)
    assert planned.changed_by() == dict.fromkeys(fleet, 1)
    assert play("model_weights", **SHARED).changed_by() == dict.fromkeys(fleet, 1)
    files = [entry["path"] for entry in asked(fleet[FIRST]) if "/resolve/" in entry["path"]]
    assert sorted(files) == sorted(set(files))
    assert [path for path in files if path.endswith(SHARD)]
    assert sums(fleet[FIRST]) == sums(fleet[SECOND]) == sums(fleet[THIRD])
    for host in fleet.values():
        nothing_left(host)
    request.getfixturevalue("faults")()
    again = play("model_weights", **SHARED)
    assert again.changed_by() == dict.fromkeys(fleet, 0)
    assert asked(fleet[FIRST]) == []


def test_a_source_that_lies_and_dies_is_survived(fleet: dict[str, Any], play: Callable[..., Any], request: Any) -> None:
    """One host has wrong bytes, and its server is killed again and again; the third has the right model."""
    request.getfixturevalue("faults")()
    right = sums(fleet[FIRST])
    fleet[THIRD].run_expect([0], f"rm -rf {FOLDER}")
    spoil = f"printf wrong | dd of={FOLDER}/test--tiny/{SHARD} bs=1 seek=4000000 conv=notrunc"
    fleet[SECOND].run_expect([0], spoil)
    kill = "while :; do systemctl kill -s KILL model-share.service; sleep 0.5; done"
    fleet[SECOND].run_expect([0], f"systemd-run --unit=killer sh -c '{kill}'")
    try:
        assert play("model_weights", **SHARED).changed_by()[THIRD] == 1
    finally:
        fleet[SECOND].run_expect([0], "systemctl stop killer")
    assert sums(fleet[THIRD]) == right
    assert asked(fleet[FIRST]) == []
    for host in fleet.values():
        nothing_left(host)


def test_strangers_get_nothing_and_the_door_closes_by_itself(fleet: dict[str, Any]) -> None:
    """Without the certificate TLS refuses; from an address that was not named nothing answers; left alone it ends."""
    address = fleet[FIRST].check_output("hostname -I").split()[0]
    friend = fleet[SECOND].check_output("hostname -I").split()[0]
    lookup = "{{ lookup('selfhost.lmdeploy.run_certificate', 'model-share') }}"
    program = "{{ lookup('ansible.builtin.file', '%s') }}" % (ROOT / "roles/model_weights/files/model_share_server.py")
    arguments = {"path": FOLDER, "address": address, "allowed": [friend], "certificate": lookup, "idle_seconds": 30}
    command = [str(Path(sys.executable).with_name("ansible")), FIRST, "-i", str(ROOT / "molecule/inventory/hosts.yml")]
    command += ["-m", "selfhost.lmdeploy.model_share", "-a", json.dumps({**arguments, "program": program})]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    began = time.monotonic()
    assert float(fleet[FIRST].check_output("systemd-analyze security model-share.service | tail -1").split()[-3]) < 2.0
    trial = (
        "import ssl, urllib.request as u; c = ssl._create_unverified_context(); "
        f"print(u.urlopen('https://{address}:{PORT}/x/y/z', timeout=5, context=c).status)"
    )
    # The server's alert, or the end of the connection where that was read first.
    refusal = fleet[SECOND].run("python3 -c %s", trial)
    assert re.search(r"(?i)alert.certificate.required|EOF occurred|connection reset", refusal.stderr), refusal
    assert refusal.stdout == ""
    assert "timed out" in fleet[THIRD].run("python3 -c %s", trial.replace("timeout=5", "timeout=2")).stderr
    # This machine is on the hosts' network, and no host of the fleet.
    with pytest.raises(OSError, match="timed out"):
        socket.create_connection((address, PORT), timeout=1)
    while fleet[FIRST].run("systemctl is-active model-share.service").rc == 0:
        assert time.monotonic() - began < 150
        time.sleep(1)
    nothing_left(fleet[FIRST])
