"""What an operator notices of releases: changes stay or are taken back by the host, whatever is cut in between.

The tests stand in the order in which they run; each leaves an engine that serves.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
VARIABLES = yaml.safe_load((Path(__file__).parents[1] / "vars.yml").read_text())
HOST = "mol-releases"
MODEL = f"/var/lib/models/{VARIABLES['api_server_model']}"
HOME = "/etc/api-server/releases/api-server"
PROGRAM = "python3 /usr/local/lib/api-server/engine_releases.py"
MOST_SECONDS_TO_RETURN = 60
# What the machine may be busy with is no matter of the program.
PATIENCE_SECONDS = 120


def status(host: Any) -> dict[str, Any]:
    """Return what the host's program says of its engine."""
    found = json.loads(host.check_output(f"{PROGRAM} status --json"))["engines"]
    assert [engine["instance"] for engine in found] == ["api-server"]
    return dict(found[0])


def serves(host: Any) -> str:
    """Return the release that runs; it must be whole, confirmed, and answer."""
    now = status(host)
    assert now["pending"] == {}
    assert now["running"] == now["confirmed"]
    unit = host.file("/etc/systemd/system/api-server.service").content_string
    assert unit == host.file(f"{HOME}/{now['running']}/api-server.service").content_string
    assert host.file(f"{HOME}/current").linked_to == f"{HOME}/{now['running']}"
    command = host.check_output("systemctl show --property ExecStart --value api-server.service")
    assert f"{HOME}/{now['running']}/launcher.py" in command
    # Restarting the release that runs changes nothing, and passes through the gate only where the unit was down.
    assert host.run("systemctl is-active api-server.service").stdout.strip() == "active"
    return str(now["running"])


def converge(play: Callable[..., Any], entry: str = "main", **changes: object) -> Any:
    """Run an entry point of the role with the scenario's variables and some changed ones."""
    return play("api_server", entry, **{**VARIABLES, **changes})


def built(host: Any, play: Callable[..., Any], **changes: object) -> str:
    """Build a release and return its id."""
    before = {release["id"] for release in status(host)["releases"]}
    assert converge(play, "prepare", **changes).rc == 0
    (new,) = {release["id"] for release in status(host)["releases"]} - before
    return str(new)


def settled(host: Any) -> float:
    """Wait until nothing is pending; return the seconds it took."""
    began = time.monotonic()
    while host.file(f"{HOME}/pending.json").exists or host.run("systemctl is-active api-server.service").rc:
        assert time.monotonic() - began < PATIENCE_SECONDS
        time.sleep(0.3)
    return time.monotonic() - began


def test_a_change_is_a_new_release_and_the_old_one_stays(host: Any, play: Callable[..., Any]) -> None:
    before = serves(host)
    foretold = play("api_server", check=True, **{**VARIABLES, "api_server_session_len": 1024})
    assert foretold.changed() == 2
    assert serves(host) == before
    began = time.monotonic()
    assert converge(play, api_server_session_len=1024).changed() == 2
    print(f"a change took {time.monotonic() - began:.1f} s with its play")
    now = status(host)
    assert serves(host) != before
    assert now["previous"] == before
    assert "Paris" in now["releases"][0]["result"]["answer"]
    assert converge(play, api_server_session_len=1024).changed() == 0


def test_a_wrong_answer_is_taken_back(host: Any, play: Callable[..., Any]) -> None:
    before = serves(host)
    began = time.monotonic()
    message = converge(play, api_server_session_len=1280, api_server_gate_expected="London").message()
    print(f"the play that was taken back took {time.monotonic() - began:.1f} s")
    found = re.search(r"Release (\w{12}) serves again after ([\d.]+) s", message)
    assert found, message
    print(f"the release before served again after {found[2]} s")
    assert float(found[2]) < MOST_SECONDS_TO_RETURN
    assert found[1] == before
    assert "which does not match api_server_gate_expected, 'London'" in message
    assert serves(host) == before


def test_a_file_that_is_no_model_is_taken_back_and_mending_it_finishes(host: Any, play: Callable[..., Any]) -> None:
    before = serves(host)
    broken = {"api_server_model": "mended.gguf", "api_server_session_len": 1024}
    host.check_output("echo this is no model >/var/lib/models/mended.gguf")
    message = converge(play, **broken).message()
    for part in (
        "failed its gate",
        "did not become active",
        "The end of its journal",
        f"Release {before} serves again",
    ):
        assert part in message
    assert serves(host) == before
    host.check_output(f"cp --remove-destination {MODEL} /var/lib/models/mended.gguf")
    assert converge(play, **broken).changed() == 1, "the same release is attempted again"
    assert serves(host) != before


def test_the_playbook_goes_back_through_the_gate(host: Any) -> None:
    before, wanted = serves(host), status(host)["previous"]
    inventories = [f"--inventory=molecule/{name}/hosts.yml" for name in ("inventory", "releases/inventory")]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"}
    command = [str(Path(sys.executable).with_name("ansible-playbook")), *inventories, "playbooks/rollback.yml"]
    for arguments, expected in ([], wanted), (["-e", f"rollback_release={before}"], before):
        done = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout
        assert serves(host) == expected


def test_the_host_ends_a_switch_whose_controller_was_killed(host: Any, tmp_path: Path) -> None:
    before = serves(host)
    playbook, environment = tmp_path / "play.yml", {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
    role = {"role": "selfhost.lmdeploy.api_server"}
    mirrors = {"role": "selfhost.lmdeploy.mirrors", "tags": ["never"]}
    playbook.write_text(json.dumps([{"name": "P", "hosts": HOST, "gather_facts": False, "roles": [mirrors, role]}]))
    variables = json.dumps({**VARIABLES, "api_server_session_len": 1536})
    command = [str(Path(sys.executable).with_name("ansible-playbook")), str(playbook), "-e", variables]
    command += ["-i", str(ROOT / "molecule/inventory/hosts.yml")]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        while not host.file(f"{HOME}/pending.json").exists:
            assert process.poll() is None, "the play ended before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
    print(f"the host was done {settled(host):.1f} s after its controller was killed")
    assert serves(host) != before
    assert "passed" in host.check_output(f"{PROGRAM} status")


def test_the_timer_ends_what_the_program_could_not(host: Any, play: Callable[..., Any]) -> None:
    before = serves(host)
    bad = built(host, play, api_server_session_len=1664, api_server_gate_expected="London")
    switch = f"systemd-run --collect --unit=cut {PROGRAM} switch api-server {bad} --confirm-seconds 5"
    wait = f"timeout 60 sh -c 'until [ -e {HOME}/pending.json ]; do sleep 0.02; done'"
    host.check_output(f"{switch} && {wait} && systemctl kill --signal=KILL cut.service")
    print(f"the release before served again {settled(host):.1f} s after the program was killed")
    assert serves(host) == before


def test_a_power_cut_in_the_middle_is_survived(host: Any, play: Callable[..., Any]) -> None:
    before = serves(host)
    bad = built(host, play, api_server_session_len=1792, api_server_gate_expected="London")
    host.check_output(f"systemd-run --collect --unit=cut {PROGRAM} switch api-server {bad} --confirm-seconds 900")
    while not host.file(f"{HOME}/pending.json").exists:
        time.sleep(0.02)
    # A host whose engine is still being settled may call itself degraded meanwhile, which this command refuses.
    done = subprocess.run([ROOT / "script/hosts", "restart", HOST], check=False, capture_output=True, text=True)
    print(done.stderr)
    print(f"settled {settled(host):.1f} s after the host was up")
    assert serves(host) == before


def test_who_confirms_late_finds_the_release_before(host: Any, play: Callable[..., Any]) -> None:
    before = serves(host)
    changes = {"api_server_session_len": 1920, "api_server_confirmed": False}
    assert converge(play, **changes, api_server_confirm_seconds=600).changed() == 2
    assert status(host)["pending"]["awaits"] == "caller"
    assert converge(play, "confirm").changed() == 1
    after = serves(host)
    assert after != before
    assert converge(play, api_server_confirmed=False, api_server_session_len=896).changed() == 2
    settled(host)
    assert serves(host) == after


def test_two_controllers_take_turns(host: Any, play: Callable[..., Any]) -> None:
    releases = [built(host, play, api_server_session_len=length) for length in (512, 640)]
    both = " & ".join(f"{PROGRAM} switch api-server {release} --json >/root/{release}" for release in releases)
    host.check_output(f"({both} & wait)")
    for release in releases:
        answer = json.loads(host.check_output(f"cat /root/{release}; rm /root/{release}"))
        assert answer["gate"]["passed"], answer
    assert serves(host) in releases


def test_an_engine_from_before_there_were_releases_becomes_one(host: Any, play: Callable[..., Any]) -> None:
    release = serves(host)
    old, file, folder = (
        "/usr/local/lib/api-server/api_server_launcher.py",
        "/etc/api-server/api-server.json",
        f"{HOME}/{release}",
    )
    host.check_output(
        f"cp {folder}/launcher.py {old}; cp --remove-destination {folder}/instance.json {file}; "
        f"sed -i -e '/^# Release/d; s|{folder}/launcher.py|{old}|; s|{folder}/instance.json|{file}|' "
        f"/etc/systemd/system/api-server.service; rm -r {HOME}; systemctl daemon-reload; systemctl restart api-server"
    )
    assert converge(play).changed() == 2
    assert serves(host)
    assert not host.file(old).exists
    adopted = status(host)["previous"]
    host.check_output(f"{PROGRAM} rollback api-server")
    assert serves(host) == adopted


@pytest.mark.skipif("TEST_FULL" not in os.environ, reason="fetches packages anew, into a cache beside the environments")
def test_a_second_environment_costs_little(host: Any, play: Callable[..., Any], tmp_path: Path) -> None:
    (lock,) = (ROOT / "roles/llama_cpp/files/locks").glob("xllamacpp-*.txt")
    other = tmp_path / "other.txt"
    other.write_text(lock.read_text() + (ROOT / "molecule/conda_env/locks/second.txt").read_text())
    # On the file system of the environments, as on users' hosts, files are linked instead of copied.
    given = {"conda_env_name": "cost", "conda_env_cache_dir": "/opt/miniconda3/pkgs/uv"}
    seconds = []
    for path in (lock, other):
        began = time.monotonic()
        assert play("conda_env", conda_env_lock=str(path), **given).changed() == 1
        seconds.append(time.monotonic() - began)
    used = host.check_output("cd /opt/miniconda3/releases/cost && du --summarize --block-size=1 $(ls -tr)").splitlines()
    first, second = (int(line.split()[0]) for line in used)
    disk = int(host.check_output("df --output=size --block-size=1 /opt/miniconda3").splitlines()[1])
    print(
        f"first environment {first / 1e6:.0f} MB in {seconds[0]:.1f} s with its play; second {second / 1e6:.1f} MB in "
        f"{seconds[1]:.1f} s: {100 * second / first:.1f} % of the first, {100 * second / disk:.3f} % of the disk"
    )
    assert second < disk / 100
    assert play("conda_env", "uninstall", **given).changed() == 1
