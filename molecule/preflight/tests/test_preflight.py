"""Every bad input ends before anything on the host has changed, in one message that names it and the way out.

Each case is a host of an inventory with one wish changed; all are the same machine. One run of the playbook judges them
all. The machine has a card as far as nvidia-smi says, replayed from a fixture of the unit tests, and a second SSH
server whose process 1 is not systemd and whose operating system is another one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

ROOT = Path(__file__).parents[3]
MACHINE = "mol-preflight"
INVENTORIES = ("molecule/inventory/hosts.yml", "molecule/preflight/inventory/hosts.yml")
CARD = ROOT / "tests/unit/fixtures/nvidia_smi/rtx3090"
SECRETS = ("canary-key-1", "canary-pw", "canary-url")
# What a role could have touched, with times. systemd itself keeps times below /var/lib/systemd.
FINGERPRINT = (
    "find /etc /opt /usr/local /var/lib /srv /home -xdev -path /var/lib/systemd -prune -o -path /srv/channel -o "
    r"-printf '%p %y %m %u %s %T@ %C@\n' | sort"
)
BARE = """
mkdir -p /run/sshd
sed 's/^ID=.*/ID=fedora/; s/^VERSION_ID=.*/VERSION_ID=43/' /etc/os-release > /run/other-os
exec unshare --fork --pid --mount --mount-proc sh -c \
  'mount --bind /run/other-os /etc/os-release && mount -t tmpfs none /run/systemd && exec /usr/sbin/sshd -D -p 2222'
"""

LMDEPLOY = {
    "api_server_engine": "lmdeploy",
    "api_server_model": "OpenGVLab/InternVL3-1B",
    # No hub is asked, on any machine.
    "model_weights_source_dir": "/srv/models",
}
ENGINES = [{"name": "one"}, {"name": "two"}]
UI = "http://10.0.0.5:23333/v1"


@dataclass(frozen=True)
class Case:
    """An inventory host with one wish changed: the checks that must speak, and the words that people must read."""

    name: str
    variables: dict[str, Any]
    checks: set[str] = field(default_factory=set)
    words: tuple[str, ...] = ()


CASES = [
    Case("good", {}),
    Case("good-lmdeploy", LMDEPLOY),
    Case("good-own-port", {"open_webui_port": 18081}),
    Case("good-slash", {"open_webui_connections": [{"url": f"{UI}/"}]}),
    Case("unknown-engine", {"api_server_engine": "vllm"}, {"variable_invalid"}, ("vllm", "auto, lmdeploy, llama_cpp")),
    Case("unknown-variable", {"api_server_prot": 1}, {"variable_unknown"}, ("Did you mean api_server_port?",)),
    Case("tp-3", {**LMDEPLOY, "api_server_tp": 3}, {"tp_form"}, ("api_server_tp = 3", "power of two")),
    Case("tp-2", {**LMDEPLOY, "api_server_tp": 2}, {"tp_gpus"}, ("api_server_tp = 2", "has 1", "RTX 3090")),
    Case("port-70000", {"api_server_port": 70000}, {"port_range"}, ("api_server_port = 70000", "65535")),
    Case("port-held", {"open_webui_port": 18080}, {"port_held"}, ("open_webui_port = 18080", "squatter.service")),
    Case("ports-of-two", {"api_server_instances": ENGINES}, {"port_clash"}, ("23333", "api-server-one.service")),
    Case("port-of-ui", {"open_webui_port": 23333}, {"port_clash"}, ("open_webui_port", "api-server.service")),
    Case(
        "vram",
        # Whether this machine's disk has room for the model is no matter of this case.
        {**LMDEPLOY, "api_server_model": "OpenGVLab/InternVL3-14B-Instruct", "preflight_skipped_checks": ["disk"]},
        {"memory"},
        ("InternVL3-14B-Instruct", "27.9 GiB", "24.0 GiB", "AWQ"),
    ),
    Case("no model", {"api_server_model": "/srv/m-1B.Q8_0.gguf"}, {"model_missing"}, ("Nothing is at /srv/m-1B",)),
    Case(
        "ram",
        {"api_server_model": "/srv/Big-9000B.Q8_0.gguf"},
        {"memory", "model_missing"},
        ("Big-9000B", "free for it"),
    ),
    Case("disk", {"miniconda_prefix": "/dev/shm/conda"}, {"disk"}, ("miniconda_prefix", "/dev/shm", "are free")),
    Case(
        "chat-template",
        {**LMDEPLOY, "api_server_chat_template": "internvl2_5"},
        {"chat_template"},
        ("internvl2_5", "internvl-zh", "Leave api_server_chat_template empty"),
    ),
    Case(
        "flag",
        {**LMDEPLOY, "api_server_extra_args": ["--enable-prefix-cachng"]},
        {"flag"},
        ("--enable-prefix-cachng", "Did you mean --enable-prefix-caching?"),
    ),
    Case(
        "tool-parser",
        {**LMDEPLOY, "api_server_tool_call_parser": "qwen9"},
        {"tool_call_parser"},
        ("api_server_tool_call_parser = qwen9", "qwen2d5"),
    ),
    Case(
        "reasoning-parser",
        {**LMDEPLOY, "api_server_extra_args": ["--reasoning-parser", "no"]},
        {"reasoning_parser"},
        ("deepseek-r1",),
    ),
    Case(
        "lmdeploy-floor",
        {**LMDEPLOY, "lmdeploy_version": "0.17.1"},
        {"version_floor", "lock", "engine_unknown"},
        ("lmdeploy_version = 0.17.1", "0.18.0"),
    ),
    Case("ui-floor", {"open_webui_version": "0.7.2"}, {"version_floor", "lock"}, ("open_webui_version = 0.7.2",)),
    Case(
        "lock",
        {"open_webui_lock": str(ROOT / "roles/lmdeploy/files/locks/lmdeploy-0.18.0.txt")},
        {"lock"},
        ("open_webui_lock", "doesn't pin open-webui"),
    ),
    Case(
        "url",
        {"open_webui_connections": [{"url": "10.0.0.5:23333/v1", "api_key": SECRETS[0]}]},
        {"url"},
        ("open_webui_connections[0].url", "http://"),
    ),
    Case(
        "data-in-env",
        {"open_webui_data_dir": "/opt/miniconda3/envs/open-webui/data"},
        {"data_dir"},
        ("open_webui_data_dir = /opt/miniconda3/envs/open-webui/data", "/var/lib"),
    ),
    Case("password", {"open_webui_admin_password": SECRETS[1]}, {"admin_password"}, ("9 characters", "12", "(hidden)")),
    Case("sha256", {"miniconda_installer_sha256": "abc"}, {"sha256"}, ("miniconda_installer_sha256 = abc", "64")),
    Case(
        "hostile",
        {"api_server_model_name": 'x"\nExecStartPre=/bin/false'},
        {"hostile_text"},
        ("api_server_model_name", "line break"),
    ),
    Case(
        "mirror",
        {"mirrors_pip_index_url": f"http://ann:{SECRETS[2]}@127.0.0.1:9/simple"},
        {"mirror"},
        ("mirrors_pip_index_url = http://***@127.0.0.1:9/simple", "refused"),
    ),
    Case("not-root", {"ansible_become_user": "nobody"}, {"privilege"}, ("ansible_become", "write to /etc")),
    Case("bare", {"ansible_port": 2222}, {"os", "systemd"}, ("fedora 43", "Debian 12 and 13", "process 1 is sshd")),
    Case(
        "several",
        {
            **LMDEPLOY,
            "api_server_tp": 3,
            "api_server_port": 70000,
            "open_webui_admin_password": SECRETS[1],
            "api_server_x": 1,
        },
        {"tp_form", "port_range", "admin_password", "variable_unknown"},
        ("4 faults on case-several; nothing was changed.",),
    ),
]
BAD = [case for case in CASES if case.checks]


def run(playbook: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a playbook on the scenario's inventories and those given."""
    command = ["ansible-playbook", playbook, *(word for path in INVENTORIES for word in ("-i", path)), *arguments]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Outcome:
    """What one run over all cases left."""

    output: str
    rc: int
    reports: dict[str, Any]
    before: str
    after: str


@pytest.fixture(scope="module")
def machine(host: Host) -> Iterator[Host]:
    """Give the host what the cases are about: a card, a taken port, a port of our own, a side without systemd."""
    program = f"#!/bin/sh\ncase \"$*\" in *query-gpu*) echo '{(CARD / 'gpus.csv').read_text().strip()}' ;; esac\n"
    server = "python3 -m http.server --bind 127.0.0.1"
    setup = [
        "install -d /usr/local/nvidia/bin",
        f"cat >/usr/local/nvidia/bin/nvidia-smi <<'E'\n{program}E\n",
        "chmod 755 /usr/local/nvidia/bin/nvidia-smi",
        f"systemd-run --unit=squatter {server} 18080",
        f"systemd-run --unit=open-webui {server} 18081",
        f"cat >/run/bare.sh <<'E'\n{BARE}E\n",
        "systemd-run --unit=bare sh /run/bare.sh",
        'for port in 18080 18081 2222; do timeout 20 sh -c "until ss -ltn | grep -q :$port; do sleep 0.1; done"; done',
    ]
    for command in setup:
        done = host.run(command)
        assert done.rc == 0, f"{command}\n{done.stdout}{done.stderr}"
    yield host
    host.run("systemctl stop squatter open-webui bare; rm -r /usr/local/nvidia")


@pytest.fixture(scope="module")
def outcome(machine: Host, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Judge all cases in one run."""
    folder = tmp_path_factory.mktemp("preflight")
    hosts = {f"case-{case.name}": {"ansible_host": MACHINE, **case.variables} for case in CASES}
    members = dict.fromkeys(hosts, None)
    groups = {"model_servers": {"hosts": members}, "web_uis": {"hosts": members}}
    inventory = folder / "hosts.json"
    inventory.write_text(json.dumps({"all": {"hosts": hosts, "children": groups}}))
    before = machine.check_output(FINGERPRINT)
    # The cases know nothing of each other.
    reports = ["-e", json.dumps({"preflight_report_dir": f"{folder}/reports", "preflight_model_servers": []})]
    # Few at once: they share one SSH connection, which takes ten sessions.
    done = run("playbooks/preflight.yml", "-i", str(inventory), "--forks", "4", "--limit", "case-*", "-vvv", *reports)
    after = machine.check_output(FINGERPRINT)
    told = {path.stem: json.loads(path.read_text()) for path in (folder / "reports").glob("*.json")}
    return Outcome(done.stdout + done.stderr, done.returncode, told, before, after)


def said(outcome: Outcome, name: str) -> str:
    """Return the one message about a host."""
    found = re.search(rf"^fatal: \[{name}\].*?(?=^\S|\Z)", outcome.output, re.MULTILINE | re.DOTALL)
    assert found, f"nothing failed on {name}\n{outcome.output}"
    return found.group()


def test_nothing_on_the_host_has_changed(outcome: Outcome) -> None:
    assert outcome.rc != 0
    assert set(outcome.after.splitlines()) ^ set(outcome.before.splitlines()) == set()


def test_the_fingerprint_notices_a_change(machine: Host) -> None:
    before = machine.check_output(FINGERPRINT)
    machine.check_output("touch /etc/canary")
    assert machine.check_output(FINGERPRINT) != before
    machine.check_output("rm /etc/canary")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exactly_its_fault_is_found(outcome: Outcome, case: Case) -> None:
    name = f"case-{case.name}"
    assert name in outcome.reports, outcome.output
    findings = outcome.reports[name]["findings"]
    assert {finding["check"] for finding in findings} == case.checks, json.dumps(findings, indent=1)
    assert outcome.reports[name]["passed"] is (not case.checks)


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_one_message_names_it_and_the_way_out(outcome: Outcome, case: Case) -> None:
    text = said(outcome, f"case-{case.name}")
    plain = " ".join(text.split())
    assert [word for word in case.words if word not in plain] == [], text
    assert plain.count("Fix: ") >= 1
    assert "nothing was changed" in plain


def test_no_secret_is_told(outcome: Outcome, machine: Host) -> None:
    everything = outcome.output + json.dumps(outcome.reports) + machine.check_output("journalctl --no-pager")
    assert [secret for secret in SECRETS if secret in everything] == []


def test_site_stops_before_its_first_change(machine: Host) -> None:
    before = machine.check_output(FINGERPRINT)
    done = run("playbooks/site.yml", "--limit", MACHINE, "-e", "api_server_port=70000")
    assert done.returncode != 0
    assert "api_server_port = 70000" in done.stdout + done.stderr
    assert "Serve the models" not in done.stdout
    assert machine.check_output(FINGERPRINT) == before
