"""What an operator notices of faults: a clear message or self-repair, nothing lost, and a plain re-run is enough.

The tests stand in the order in which they run. First one host is brought up undisturbed; then single faults meet it,
and each leaves it serving; then it is made anew for every moment at which the controller, or the host's power, is cut.

FAULTS_MOMENTS and FAULTS_POWER_CUTS say how many moments, FAULTS_REDEPLOY_MOMENTS and FAULTS_REDEPLOY_POWER_CUTS
how many of a redeploy, FAULTS_SEED which ones; what artifacts/trust/moments.jsonl holds of the whole set is not tried
again. FAULTS_UI=1 adds Open WebUI.
FAULTS_KEPT=1 takes a host that is up already for the undisturbed one, while a test is being written.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mirror
import pytest
import yaml
from campaign import Campaign, Lane, Reference
from comparison import differences
from harness import Host, Run

ROOT = Path(__file__).resolve().parents[3]
SCENARIO = Path(__file__).resolve().parents[1]
FULL = "TEST_FULL" in os.environ
MOMENTS = int(os.environ.get("FAULTS_MOMENTS") or (60 if FULL else 1))
POWER_CUTS = int(os.environ.get("FAULTS_POWER_CUTS") or (20 if FULL else 1))
REDEPLOY_MOMENTS = int(os.environ.get("FAULTS_REDEPLOY_MOMENTS") or 60)
REDEPLOY_POWER_CUTS = int(os.environ.get("FAULTS_REDEPLOY_POWER_CUTS") or 20)
# The reduced set is the same everywhere; the whole one looks for moments that nobody tried.
SEED = int(os.environ.get("FAULTS_SEED") or (secrets.randbelow(1 << 32) if FULL else 5))
WITH_UI = (os.environ.get("FAULTS_UI") or str(int(FULL))) == "1"
INVENTORIES = ["molecule/inventory/hosts.yml", "molecule/faults/inventory/hosts.yml"]
MIRROR_PORT, MIRROR = 8798, "http://127.0.0.1:8798"
HOST = Host("mol-faults", [*INVENTORIES, *(["molecule/faults/whole/hosts.yml"] if WITH_UI else [])])
VARIABLES: dict[str, Any] = yaml.safe_load((SCENARIO / "inventory/group_vars/model_servers.yml").read_text())
# Stands for the undisturbed run where none was made: its cuts are no moments of a run.
KEPT_RUN = Run(0, "", 60.0)
Play = Callable[..., Any]
full_only = pytest.mark.skipif(not FULL, reason="takes long: script/test --full")


@pytest.fixture(scope="session")
def undisturbed() -> Reference:
    """Bring the bare host up without a fault; return its state, and the run."""
    print(f"FAULTS_SEED={SEED}")
    if os.environ.get("FAULTS_KEPT"):
        return Reference({HOST.name: HOST.state()}, KEPT_RUN)
    if HOST.ssh("test -e /opt/miniconda3", check=False).returncode == 0:
        HOST.reset()
    run = HOST.play()
    assert run.code == 0, run.output
    state = HOST.state()
    assert "Paris" in state["answer"], state["answer"]
    return Reference({HOST.name: state}, run)


@pytest.fixture(autouse=True)
def up(host: Any, undisturbed: Reference) -> None:
    """Every test finds, or knows, the undisturbed host. Tests that all depend on `host` keep their order."""


def serves() -> None:
    """The model answers clients of the gateway as it should."""
    deadline = time.monotonic() + 60
    while "Paris" not in (answer := HOST.answer()):
        assert time.monotonic() < deadline, answer
        time.sleep(0.5)


def settled(run: Run) -> Run:
    """Return a run that ended well, or show what it said."""
    assert run.code == 0, run.output
    return run


# ---------------------------------------------------------------------------------------
# Downloads


@pytest.fixture(scope="session")
def index(undisturbed: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Have a package index and a channel on the host whose faults are chosen by the address."""
    program = (ROOT / "tests/faults/mirror.py").read_text(encoding="utf-8")
    HOST.ssh("cat >/usr/local/bin/mirror.py", program)
    HOST.ssh(f"systemd-run --quiet --unit=mirror python3 /usr/local/bin/mirror.py {MIRROR_PORT} /srv/channel")
    lock = tmp_path_factory.mktemp("lock") / "faultless.txt"
    lock.write_text(mirror.lock(), encoding="utf-8")
    yield {"conda_env_name": "faultless", "conda_env_lock": str(lock), "conda_env_cache_dir": "/root/cache"}
    HOST.ssh("systemctl stop mirror; rm -rf /usr/local/bin/mirror.py /root/cache /opt/miniconda3/releases/faultless")


INDEX_FAULTS = [
    ("wrong/simple", r"hash mismatch"),
    pytest.param("half/simple", r"hash|unexpected end|EOF|invalid|corrupt|zip", marks=full_only),
    pytest.param("status-500/simple", "500", marks=full_only),
    pytest.param("status-429/simple", "429", marks=full_only),
    pytest.param("cut/simple", r"end of file|EOF|incomplete|body|decod", marks=full_only),
]


@pytest.mark.parametrize(("path", "words"), INDEX_FAULTS)
def test_an_index_that_fails_leaves_nothing_behind_and_says_so(
    play: Play, index: dict[str, Any], path: str, words: str
) -> None:
    HOST.ssh("rm -rf /root/cache")
    message = play("conda_env", **index, mirrors_pip_index_url=f"{MIRROR}/{path}").message()
    assert re.search(words, message, re.IGNORECASE), message
    assert "mirrors_pip_index_url" in message
    assert HOST.ssh("ls /opt/miniconda3/releases/faultless /opt/miniconda3/envs/faultless; true").stdout.split() == [
        "/opt/miniconda3/releases/faultless:"
    ]


@full_only
@pytest.mark.parametrize(
    ("url", "words"),
    [("http://index.invalid/simple", r"dns|resolve|lookup"), ("http://127.0.0.1:9/simple", r"refused|connect")],
)
def test_an_index_that_is_not_there_is_named(play: Play, index: dict[str, Any], url: str, words: str) -> None:
    HOST.ssh("rm -rf /root/cache")
    message = play("conda_env", **index, mirrors_pip_index_url=url).message()
    assert re.search(words, message, re.IGNORECASE), message
    assert "mirrors_pip_index_url" in message


def test_a_busy_index_is_waited_for(play: Play, index: dict[str, Any]) -> None:
    HOST.ssh("rm -rf /root/cache")
    assert play("conda_env", **index, mirrors_pip_index_url=f"{MIRROR}/busy/simple").changed() == 1
    play("conda_env", "uninstall", **index)


@full_only
@pytest.mark.parametrize("fault", ["status-500", "status-429", "half", "wrong", "cut"])
def test_a_channel_that_fails_leaves_nothing_behind_and_says_so(play: Play, index: dict[str, Any], fault: str) -> None:
    # Packages that conda has already are not asked for again.
    HOST.ssh("mv /opt/miniconda3/pkgs /opt/miniconda3/pkgs.kept")
    try:
        message = play("conda_env", **index, mirrors_conda_channels=[f"{MIRROR}/{fault}/channel"]).message()
    finally:
        HOST.ssh("rm -rf /opt/miniconda3/pkgs; mv /opt/miniconda3/pkgs.kept /opt/miniconda3/pkgs")
    assert "mirrors_conda_channels" in message
    assert HOST.ssh("ls /opt/miniconda3/releases/faultless; true").stdout == ""


@full_only
@pytest.mark.parametrize("fault", ["status-500", "status-429", "half", "wrong", "cut"])
def test_an_installer_that_arrives_damaged_is_not_run(play: Play, index: dict[str, Any], fault: str) -> None:
    variables = yaml.safe_load((ROOT / "molecule/inventory/group_vars/all/machine.yml").read_text())
    name = variables["miniconda_installer_url"].rsplit("/", 1)[1]
    url = f"{MIRROR}/{fault}/channel/{name}"
    message = play("miniconda", miniconda_prefix="/opt/other", miniconda_installer_url=url).message()
    assert "installer" in message
    assert HOST.ssh("ls -d /opt/other /opt/.other*; true").stdout == ""


# ---------------------------------------------------------------------------------------
# The disk


def full_disk(folder: str, mib: int) -> None:
    """Have a small file system at a folder."""
    HOST.ssh(f"mkdir -p {folder} && mount -t tmpfs -o size={mib}m,mode=755 none {folder}")


DISKS = [
    pytest.param("conda_env", "/opt/miniconda3/releases/faultless", 20, {}, id="environment"),
    pytest.param("miniconda", "/opt/full", 40, {"miniconda_prefix": "/opt/full/conda"}, id="conda", marks=full_only),
    pytest.param(
        "model_weights",
        "/srv/full",
        60,
        {"model_weights_dir": "/srv/full", "model_weights_packages": VARIABLES["model_weights_packages"]},
        id="model",
        marks=full_only,
    ),
]


@pytest.mark.parametrize(("role", "folder", "mib", "variables"), DISKS)
def test_a_full_disk_is_named_and_room_is_enough_to_go_on(
    play: Play, index: dict[str, Any], role: str, folder: str, mib: int, variables: dict[str, Any]
) -> None:
    given = (
        {**index, "mirrors_pip_index_url": f"{MIRROR}/good/simple", **variables} if role == "conda_env" else variables
    )
    full_disk(folder, mib)
    try:
        message = play(role, **given).message()
        assert re.search(r"no space left|os error 28|room", message, re.IGNORECASE), message
        HOST.ssh(f"mount -o remount,size=1g {folder}")
        assert play(role, **given).changed() == 1
    finally:
        HOST.ssh(f"umount --lazy {folder}; rm -rf {folder} /opt/miniconda3/envs/faultless")


needs_ui = pytest.mark.skipif(not WITH_UI, reason="needs Open WebUI: script/test --full, or FAULTS_UI=1")


@full_only
@pytest.mark.parametrize(
    ("folder", "wanted"),
    [
        ("/etc/api-server", {"api_server_session_len": 1024}),
        ("/etc/gateway", {"gateway_timeout_seconds": 111}),
        pytest.param("/etc/open-webui", {"open_webui_settings": {"WEBUI_NAME": "Full"}}, marks=needs_ui),
    ],
)
def test_a_full_disk_under_configuration_leaves_what_runs(folder: str, wanted: dict[str, Any]) -> None:
    """What is written is written beside, so a file is the old or the new one, never half of one."""
    HOST.ssh(
        f"rm -rf /root/kept && cp -a {folder} /root/kept && "
        f"mount -t tmpfs -o size=1m,mode=$(stat -c %a {folder}) none {folder} && "
        f"cp -a /root/kept/. {folder}/ && ! cat /dev/zero >{folder}/filler"
    )
    try:
        failed = HOST.play(**wanted)
        assert failed.code == 2, failed.output
        assert re.search(r"no space left", failed.failure(), re.IGNORECASE), failed.failure()
        assert folder in failed.failure()
        serves()
        HOST.ssh(f"rm {folder}/filler")
        settled(HOST.play(**wanted))
        serves()
    finally:
        HOST.ssh(f"umount --lazy {folder}")
    settled(HOST.play())
    serves()


# ---------------------------------------------------------------------------------------
# What runs


def test_a_port_that_was_stolen_is_named_and_the_engine_goes_on(play: Play) -> None:
    """Stolen after preflight looked: the role alone runs."""
    HOST.ssh("systemd-run --quiet --unit=thief python3 -m http.server --bind 127.0.0.1 23999")
    try:
        message = play("api_server", **VARIABLES, api_server_port=23999).message()
    finally:
        HOST.ssh("systemctl stop thief")
    assert "23999" in message
    assert re.search(r"in use|serves again", message), message
    serves()


def test_an_engine_that_the_kernel_kills_comes_back() -> None:
    """As when memory runs out: the kernel's signal is the same."""
    HOST.ssh("systemctl kill --kill-whom=main --signal=KILL api-server.service")
    serves()
    assert HOST.ssh("systemctl show -P NRestarts api-server.service").stdout.strip() != "0"


@pytest.mark.parametrize("path", ["/etc/api-server/api-key", pytest.param("/etc/gateway/private", marks=full_only)])
def test_secrets_that_were_removed_are_made_anew_where_they_are_needed(path: str) -> None:
    HOST.ssh(f"rm -r {path}")
    settled(HOST.play())
    serves()


@full_only
def test_a_damaged_environment_is_replaced() -> None:
    HOST.ssh("rm -r /opt/miniconda3/envs/llama-cpp/lib/python3.11/site-packages/xllamacpp")
    settled(HOST.play())
    serves()


@full_only
def test_packages_that_were_cut_between_unpacking_and_configuring_are_finished() -> None:
    HOST.ssh(
        "systemctl stop haproxy; cp /etc/gateway/haproxy.cfg /root/; apt-get -q -y purge haproxy && "
        "cd /tmp && apt-get -q download haproxy && dpkg --unpack haproxy_*.deb; rm haproxy_*.deb"
    )
    settled(HOST.play())
    serves()


@full_only
def test_a_clock_that_was_ahead_costs_one_restart() -> None:
    """Files of the future would be newer than every process, and each run would restart what they belong to."""
    HOST.ssh(
        "touch -d '+1 year' /etc/api-server/api-key /etc/systemd/system/api-server.service /etc/gateway/haproxy.cfg "
        "/etc/systemd/system/haproxy.service.d/gateway.conf"
    )
    settled(HOST.play())
    assert settled(HOST.play()).changed() == 0
    serves()


def test_a_clock_that_is_wrong_now_is_refused_before_any_change() -> None:
    """The host's Python lives a year ahead of the controller."""
    ahead = "import time; now = time.time; time.time = lambda: now() + 3e7"
    HOST.ssh("mkdir -p /root/ahead && cat >/root/ahead/sitecustomize.py", ahead)
    wrapper = '#!/bin/sh\nPYTHONPATH=/root/ahead exec /usr/bin/python3 "$@"\n'
    HOST.ssh("cat >/root/python && chmod 755 /root/python", wrapper)
    refused = HOST.play(ansible_python_interpreter="/root/python")
    assert refused.code == 2, refused.output
    assert "ahead of the controller's" in refused.failure(), refused.failure()
    assert refused.changed() == 0
    HOST.ssh("rm -r /root/ahead /root/python")


@needs_ui
def test_a_database_that_somebody_holds_is_waited_for() -> None:
    """A program of the operator's holds the interface's database for some seconds while it starts."""
    hold = "import sqlite3, time; c = sqlite3.connect(path); c.execute('BEGIN EXCLUSIVE'); time.sleep(8)"
    HOST.ssh(f"systemd-run --quiet --unit=holder python3 -c \"path='/var/lib/open-webui/data/webui.db'; {hold}\"")
    settled(HOST.play(open_webui_settings={"WEBUI_NAME": "Held"}))
    settled(HOST.play())
    settled(HOST.play("playbooks/smoke.yml"))


# ---------------------------------------------------------------------------------------
# Moments


def test_after_a_cut_at_any_moment_a_plain_run_is_enough(undisturbed: Reference, tmp_path: Path) -> None:
    """Controller killed, or the host's power cut: one more run, and nothing tells it from the undisturbed host."""
    series = "site-ui" if WITH_UI else "site"
    campaign = Campaign(series, {"controller": MOMENTS, "power": POWER_CUTS}, SEED, anew=not FULL)
    campaign.work(Lane(series, HOST.name, tmp_path, references=[undisturbed]))
    assert campaign.lost() == []


@full_only
def test_a_redeploy_that_was_cut_is_ended_by_another(undisturbed: Reference) -> None:
    """Two engines behind a gateway: both serve, each with the new release, and none is held back."""
    HOST.hosts("down", HOST.name)
    campaign = Campaign("redeploy", {"controller": REDEPLOY_MOMENTS, "power": REDEPLOY_POWER_CUTS}, SEED)
    campaign.run(["cut-redeploy"])
    assert campaign.lost() == []


@full_only
def test_two_controllers_at_once_end_as_one(undisturbed: Reference) -> None:
    HOST.reset()
    with ThreadPoolExecutor(2) as pool:
        runs = [run.result() for run in [pool.submit(HOST.play) for _ in range(2)]]
    assert [run.code for run in runs] == [0, 0], "\n\n".join(run.output for run in runs if run.code)
    assert differences(undisturbed.states[HOST.name], HOST.state()) == []
