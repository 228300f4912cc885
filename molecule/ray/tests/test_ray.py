"""What people notice of a cluster of Ray: work on both hosts, a restart of either heals, a stranger gets nothing."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import testinfra

ROOT = Path(__file__).parents[3]
HEAD, OTHER = "mol-ray", "mol-ray-1"
PYTHON = "/opt/miniconda3/envs/ray/bin/python"
# As the engine does: in the node's namespace of files, as its user, with the token.
WORK = """
import json, os, ray, socket
ray.init(address="{head}:23400", logging_level="error", log_to_driver=False)
@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
def where():
    import time
    time.sleep(1)
    return socket.gethostname()
print(json.dumps(sorted(set(ray.get([where.remote() for _ in range(4)], timeout=90)))))
"""
RUN = (
    "systemd-run --pipe --wait --quiet -p User=api-server -p LoadCredential=token:/etc/ray/token "
    "-E RAY_AUTH_MODE=token -E HOME=/var/lib/api-server sh -c "
    "'RAY_AUTH_TOKEN_PATH=$CREDENTIALS_DIRECTORY/token exec " + PYTHON + " /tmp/work.py'"
)


@pytest.fixture(scope="module")
def other() -> Any:
    """Return the host that is not the head."""
    return testinfra.get_host(f"ssh://{OTHER}", ssh_config=str(ROOT / ".lab/ssh/config"))


def address(name: str) -> str:
    """Return a host's address, as script/hosts has written it down."""
    lines = (ROOT / ".lab/hosts").read_text().splitlines()
    return dict(line.split() for line in lines if len(line.split()) == 2)[name]


def wait_for(condition: Callable[[], bool], seconds: int = 120) -> float:
    """Return after how many seconds a condition holds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        time.sleep(1)
    return time.monotonic() - began


def status(host: Any) -> str:
    """Return what systemctl shows of the node."""
    return str(host.check_output("systemctl show ray.service -P StatusText"))


def whole(host: Any) -> bool:
    """Tell whether a host's node is active and sees both nodes."""
    return host.run("systemctl is-active ray.service").rc == 0 and status(host).startswith("2 of the cluster's nodes")


def work(host: Any) -> list[str]:
    """Run work on the cluster and return the names of the hosts that did it."""
    host.run_expect(
        [0], "cat > /tmp/work.py <<'END'\n" + WORK.format(head=address(HEAD)) + "\nEND\nchmod 644 /tmp/work.py"
    )
    return list(json.loads(host.check_output(RUN).splitlines()[-1]))


def test_work_runs_on_both_hosts(host: Any, other: Any) -> None:
    """Both nodes are active, see each other, and do what the cluster is given."""
    wait_for(lambda: whole(host) and whole(other))
    assert work(host) == [HEAD, OTHER]


def test_the_token_is_roots_and_nowhere_else(host: Any, other: Any) -> None:
    """One token for both; in no argument, no environment, no journal, no file that others read."""
    token = host.check_output("cat /etc/ray/token")
    assert token == other.check_output("cat /etc/ray/token")
    assert len(token) >= 32
    for one in (host, other):
        assert one.file("/etc/ray/token").mode == 0o600
        # grep reads the token from its file: with it among the words it would find itself.
        found = "grep --fixed-strings --file=/etc/ray/token"
        assert one.run(f"cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | {found} -ac").stdout.strip() == "0"
        assert one.run(f"journalctl --no-pager | {found} -c").stdout.strip() == "0"
        assert one.run(f"{found} -rl /run/ray /etc/systemd /var/log").stdout == ""
        # A search that finds nothing at all would prove nothing.
        assert one.run(f"cat /etc/ray/token | {found} -ac").stdout.strip() == "1"


def test_strangers_are_refused(host: Any, other: Any) -> None:
    """A node without the token can't join, nor ask; whoever is no node of the list does not even reach the port."""
    ask = "from ray._raylet import GcsClient; print(len(GcsClient(address='{}:23400').get_all_node_info(timeout=5)))"
    question = f'{PYTHON} -c "{ask.format(address(HEAD))}"'
    for environment in ("RAY_AUTH_MODE=disabled", f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN={'x' * 48}"):
        refused = other.run(f"{environment} {question}")
        assert refused.rc != 0
        assert "AuthenticationError" in refused.stderr
    join = f"/opt/miniconda3/envs/ray/bin/ray start --address={address(HEAD)}:23400 --temp-dir=/tmp/stranger"
    refused = other.run(f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN={'x' * 48} timeout 60 {join}")
    assert refused.rc != 0
    assert "uthentication" in refused.stdout + refused.stderr
    for port in (23400, 23401, 23402):
        with pytest.raises(OSError, match="timed out"):
            socket.create_connection((address(HEAD), port), timeout=1)
    assert whole(host)


@pytest.mark.parametrize("name", [OTHER, HEAD])
def test_a_node_that_is_killed_comes_back(host: Any, other: Any, name: str) -> None:
    """Also when it is the head, with which the cluster itself is gone: the other node joins the new one by itself."""
    killed = host if name == HEAD else other
    killed.run_expect([0], "systemctl kill -s KILL ray.service")
    time.sleep(1)
    seconds = wait_for(lambda: whole(host) and whole(other), 150)
    print(f"{name} killed: both nodes are back after {seconds:.0f} s")
    assert work(host) == [HEAD, OTHER]


def test_nodes_restart_on_request(host: Any, other: Any) -> None:
    """A restart of the head by a person ends well, and the other node follows."""
    host.run_expect([0], "systemctl restart ray.service")
    wait_for(lambda: whole(host) and whole(other), 150)
    other.run_expect([0], "systemctl stop ray.service")
    assert other.check_output("systemctl show ray.service -P Result") == "success"
    other.run_expect([0], "systemctl start ray.service")
    wait_for(lambda: whole(host) and whole(other))


def test_the_unit_can_do_little(host: Any) -> None:
    """systemd's own judge of units finds little exposure."""
    last = host.check_output("systemd-analyze security ray.service | tail -1")
    assert float(last.split("ray.service: ")[1].split()[0]) < 3.0, last
