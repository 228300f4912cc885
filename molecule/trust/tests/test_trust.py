"""What an operator trusts the stack with: secrets stay unseen, units are confined, keys change in service.

The tests stand in the order in which they run; the last one removes what was installed.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import figures
import pytest
import yaml
from generate import HOSTILE
from testinfra.host import Host

ROOT = Path(__file__).parents[3]
SCENARIO = Path(__file__).parents[1]
HOST = "mol-trust"
INVENTORIES = ("molecule/inventory/hosts.yml", "molecule/trust/inventory/hosts.yml")
KEY_FILE = "/etc/api-server/api-key"
SECRET_FILES = (
    KEY_FILE,
    "/etc/open-webui/secret-key",
    "/etc/open-webui/admin-password",
    "/etc/gateway/private/api-key",
    "/etc/gateway/private/ca.key",
)
FULL = "TEST_FULL" in os.environ
full_only = pytest.mark.skipif(not FULL, reason="takes minutes: script/test --full")
# The same host has everything that there is.
WHOLE = {name: {"hosts": {"mol-trust": {}}} for name in ("gateways", "monitors")}
# What `systemd-analyze security` may say at most.
SCORES = {"api-server.service": 1.3, "open-webui.service": 1.1}
OTHERS = 2.0
SEARCH = (SCENARIO / "files/search.py").read_text(encoding="utf-8")
PROBE = (SCENARIO / "files/probe.py").read_text(encoding="utf-8")
# What an inventory can't hold as data (templates), and what preflight refuses (no process can be given it).
NOT_FOR_AN_ENVIRONMENT = ("template", "template_open", "statement", "nul", "lone_surrogate")
# An inventory that gives no secret: connections follow the engine, and the rest is generated.
FREE = {
    "api_server_api_key": "",
    "open_webui_admin_password": "",
    "open_webui_connections": [],
    "open_webui_secret_key": "",
}
PROBE_PATH = "/usr/local/lib/trust-probe.py"
# What the backup's user reads, since it is what is saved.
SAVED = ("read /etc/open-webui/open-webui.env", "read /etc/open-webui/admin-password")
# How many lines of each playbook's output showed a secret, here or in the last run that looked.
SHOWN: dict[str, int] = dict(figures.noted().get("secrets", {}).get("shown_by", {}))
JUDGED: set[str] = set()
# What a copy of a unit leaves out: its program, and what belongs to that.
PROGRAM = (
    "ExecStart",
    "ExecReload",
    "EnvironmentFile",
    "LoadCredential",
    "Type=",
    "Watchdog",
    "Restart",
    "Wants",
    "After",
)


def verb(
    name: str,
    *arguments: str,
    expected: int = 0,
    inventory: dict[str, Any] | None = None,
    groups: dict[str, Any] | None = None,
    **variables: Any,
) -> str:
    """Run a playbook on the host and return what it printed. Variables go through files, as secrets should.

    ``inventory`` is what the inventory says of the host, ``groups`` are more groups; the other ones are given as on the
    command line.
    """
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"}
    with tempfile.TemporaryDirectory() as folder:
        extra, hosts = Path(folder, "extra.json"), Path(folder, "hosts.json")
        extra.write_text(json.dumps(variables), encoding="utf-8")
        written = {"all": {"hosts": {HOST: inventory or {}}, "children": groups or {}}}
        hosts.write_text(json.dumps(written), encoding="utf-8")
        inventories = [word for path in (*INVENTORIES, str(hosts)) for word in ("-i", path)]
        command = ["ansible-playbook", *inventories, f"playbooks/{name}.yml", "-e", f"@{extra}", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == expected, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def on_host(program: str, text: str = "") -> str:
    """Run a Python program on the host, its standard input as given, and return what it printed."""
    command = ["ssh", "-F", str(ROOT / ".lab/ssh/config"), HOST, "python3 -c " + shlex.quote(program)]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def canaries() -> list[str]:
    """Return the secrets that the inventory gives."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(SCENARIO.glob("inventory/group_vars/**/*.yml"))]
    found = sorted(set(re.findall(r"canary-[a-z0-9-]+", "\n".join(texts))))
    assert len(found) == 5, found
    return found


def stored(host: Host) -> list[str]:
    """Return the secrets that lie on the host, and the tokens of the admin's session among them."""
    there = [path for path in SECRET_FILES if host.file(path).exists]
    words = "\n".join(str(host.file(path).content_string) for path in there).split()
    return sorted({word for word in words if len(word) >= 16})


def seen_on_host(words: list[str]) -> list[str]:
    """Return the places on the host where a secret can be seen."""
    return on_host(SEARCH, "\n".join(words)).splitlines()


def in_output(words: list[str], output: str, playbook: str = "") -> list[str]:
    """Return the lines of an output that show a secret; of a playbook their number is kept."""
    lines = [line.strip()[:200] for line in output.splitlines() for word in words if word in line]
    if playbook:
        SHOWN[playbook] = len(lines) + (SHOWN[playbook] if playbook in JUDGED else 0)
        JUDGED.add(playbook)
        figures.note("secrets", shown_by=SHOWN)
    return lines


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("preflight", ()),
        ("site", ("--check",)),
        ("site", ()),
        ("smoke", ()),
        ("status", ()),
        ("doctor", ("--limit", HOST)),
    ],
)
def test_no_playbook_shows_a_secret(host: Host, name: str, arguments: tuple[str, ...]) -> None:
    words = [*canaries(), *stored(host)]
    assert in_output(words, verb(name, "-vvv", "--diff", *arguments), name) == []


def test_no_secret_can_be_seen_on_the_host(host: Host) -> None:
    words = [*canaries(), *stored(host)]
    assert seen_on_host(words) == []
    caches = [path.read_text(errors="replace") for path in (ROOT / ".ansible").rglob("*") if path.is_file()]
    assert in_output(words, "\n".join(caches)) == []


def test_the_search_finds_what_was_planted(host: Host) -> None:
    word = canaries()[0]
    host.check_output("printf %s > /etc/planted; systemd-cat echo %s", word, word)
    host.run("(exec -a %s sleep 30) & (PLANTED=%s exec sleep 30) & true", word, word)
    found = "\n".join(seen_on_host([word]))
    host.check_output("rm /etc/planted; journalctl --rotate --vacuum-time=1s -q; true")
    for place in ("/etc/planted", "journalctl"):
        assert place in found, found


def ours(host: Host) -> list[str]:
    """Return the units that we installed, and those of the distribution that we gave a drop-in."""
    listed = host.check_output("grep -rlE 'selfhost.lmdeploy' --include=*.service --include=*.conf /etc/systemd/system")
    found = {next(part for part in Path(line).parts[4:] if ".service" in part) for line in listed.split()}
    return sorted(name.removesuffix(".d") for name in found)


# Starts at boot only while a switch is unfinished, and then starts, stops and replaces units: that is root's.
SWITCHES_UNITS = ("engine-releases.service",)


def judged(host: Host) -> dict[str, float]:
    """Return what `systemd-analyze security` says of each unit of ours; none may be root's."""
    found = {}
    for unit in ours(host):
        if unit in SWITCHES_UNITS:
            continue
        text = host.run(f"systemd-analyze security --no-pager {unit}").stdout
        score = re.search(r"exposure level for \S+: ([\d.]+)", text)
        assert score, text
        found[unit] = float(score[1])
        assert host.check_output(f"systemctl show -P User {unit}") not in ("", "root"), f"{unit} runs as root"
    print(f"systemd-analyze security: {found}")
    figures.note("units", scores=found)
    assert {unit: score for unit, score in found.items() if score > SCORES.get(unit, OTHERS)} == {}
    return found


def test_every_unit_is_as_closed_as_promised(host: Host) -> None:
    assert set(SCORES) <= set(judged(host))


def probed(host: Host, unit: str, own: str) -> dict[str, str]:
    """Return what a program could do inside a unit: a copy of the unit whose ExecStart is the probe."""
    text = host.check_output(f"systemctl cat --no-pager {unit}")
    lines = [line for line in text.splitlines() if not line.startswith(PROGRAM)]
    network = host.check_output("ip -4 route show default").split()[2]
    # The folder in /run that it has in common with the unit stays when the copy ends.
    start = f"Type=oneshot\nRuntimeDirectoryPreserve=yes\nExecStart=/usr/bin/python3 {PROBE_PATH} {own} {network}"
    lines.insert(lines.index("[Service]") + 1, start)
    content = {PROBE_PATH: PROBE, "/run/systemd/system/trust-probe.service": "\n".join(lines)}
    on_host(
        "import json, sys, pathlib; [pathlib.Path(p).write_text(t) for p, t in json.load(sys.stdin).items()]",
        json.dumps(content),
    )
    # A device of the kernel's that is no harm: /dev/kmsg's number, under a name that no unit knows.
    host.run("mknod -m 666 /dev/probe-device c 1 11; chmod 755 /home; mkdir -p /home/somebody; systemctl daemon-reload")
    done = host.run("systemctl start trust-probe.service; journalctl -u trust-probe.service -o cat --no-pager -n 50")
    host.run("rm -rf %s /run/systemd/system/trust-probe.service /dev/probe-device /home/somebody", PROBE_PATH)
    host.run("systemctl daemon-reload")
    found = [line for line in done.stdout.splitlines() if line.startswith("PROBE")]
    assert found, done.stdout + done.stderr
    told: dict[str, str] = json.loads(found[-1].removeprefix("PROBE"))
    return told


@pytest.mark.parametrize(
    ("unit", "own", "open_"),
    [
        # The interface may talk to the network: engines and mirrors stand there.
        ("api-server.service", "/var/lib/api-server", ()),
        ("open-webui.service", "/var/lib/open-webui", ("reach the network",)),
        ("open-webui-backup.service", "/var/backups/open-webui", SAVED),
    ],
)
def test_a_unit_can_do_no_more_than_it_must(host: Host, unit: str, own: str, open_: tuple[str, ...]) -> None:
    said = probed(host, unit, own)
    print(f"{unit}: {said}")
    allowed = {name: text for name, text in said.items() if name.startswith("ALLOWED")}
    refused = {name: text for name, text in said.items() if not name.startswith("ALLOWED") and name not in open_}
    assert {name: text for name, text in allowed.items() if text.startswith("refused")} == {}
    done = {name: text for name, text in refused.items() if not text.startswith("refused")}
    if "reach the network" in done:
        # IPAddressDeny= is a program in the kernel (eBPF on cgroup v2), which a container may not be allowed to load.
        assert not bpf_works(host), f"{unit} reaches the network, though this host can forbid it"
        done.pop("reach the network")
        print(f"{unit}: IPAddressDeny= is not in force here: this host can't attach eBPF to cgroups")
    assert done == {}


def bpf_works(host: Host) -> bool:
    """Tell whether this host's systemd can filter addresses: a unit that may reach nothing does not reach itself."""
    command = "systemd-run -q --wait --pipe -p IPAddressDeny=any bash -c 'exec 3<>/dev/tcp/127.0.0.1/22'"
    return bool(host.run(command).rc != 0)


def status_of(key: str) -> str:
    """Return how the engine answers a key, which goes through standard input."""
    program = (
        "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 23333, timeout=10); "
        "c.request('GET', '/v1/models', headers={'Authorization': 'Bearer ' + sys.stdin.read()}); "
        "print(c.getresponse().status)"
    )
    return on_host(program, key).strip()


def test_the_engines_key_changes_in_two_steps(host: Host) -> None:
    old = canaries_by_name()["api_server_api_key"]
    output = verb("rotate", "-vvv", "--diff", rotate_steps="open", inventory=FREE)
    new, beside = str(host.file(KEY_FILE).content_string).split()
    assert beside == old
    assert [status_of(key) for key in (new, old)] == ["200", "200"]
    assert "through Open WebUI" in verb("smoke")
    again = verb("rotate", rotate_steps="open", inventory=FREE)
    assert str(host.file(KEY_FILE).content_string).split() == [new, old], again
    output += verb("rotate", "-vvv", "--diff", rotate_steps="close", inventory=FREE)
    assert str(host.file(KEY_FILE).content_string).split() == [new]
    assert [status_of(key) for key in (new, old)] == ["200", "401"]
    assert "through Open WebUI" in verb("smoke")
    assert in_output([old, new], output, "rotate") == []
    settled = verb("site", inventory=FREE)
    assert re.search(rf"^{HOST} .*\bchanged=0\b", settled, re.MULTILINE), settled


def test_secrets_of_the_interface_are_made_anew(host: Host) -> None:
    refusal = verb("rotate", expected=2, rotate_secrets="secret_key")
    assert "open_webui_secret_key" in refusal, refusal
    before = stored(host)
    output = verb("rotate", "-vvv", "--diff", rotate_secrets="admin_password,secret_key", inventory=FREE)
    after = stored(host)
    assert len(set(before) - set(after)) == 2, "the engine's key stays"
    assert in_output([*before, *after], output, "rotate") == []
    # It signs in with the password that lies there now.
    assert "through Open WebUI" in verb("smoke")
    assert seen_on_host(after) == []


def vaulted(folder: Path) -> tuple[list[str], str, str]:
    """Return arguments that give the engine's key from a vault and the admin's password by a command, and both."""
    key, password = (secrets.token_urlsafe(32) for _ in range(2))
    lock, store = folder / "lock", folder / "store"
    lock.write_text(secrets.token_hex())
    store.write_text(password)
    command = ["ansible-vault", "encrypt_string", "--vault-password-file", str(lock), "--stdin-name"]
    encrypted = subprocess.run(
        [*command, "api_server_api_key"], input=key, capture_output=True, text=True, check=True
    ).stdout
    given = folder / "secrets.yml"
    looked_up = f"{{{{ lookup('ansible.builtin.pipe', 'cat {store}') }}}}"
    given.write_text(f'{encrypted}\nopen_webui_admin_password: "{looked_up}"\n')
    return ["-e", f"@{given}", "--vault-password-file", str(lock)], key, password


def test_hostile_values_and_secrets_of_a_vault_arrive_whole_and_nothing_else_does(host: Host, tmp_path: Path) -> None:
    """The texts that preflight lets into an environment, really applied: a process gets each as it was written."""
    texts = {f"HOSTILE_{name.upper()}": text for name, text in HOSTILE.items() if name not in NOT_FOR_AN_ENVIRONMENT}
    assert len(texts) > 30
    before = str(host.file("/etc/systemd/system/open-webui.service").content_string)
    arguments, key, password = vaulted(tmp_path)
    inventory = {**FREE, "open_webui_settings": texts, "api_server_environment": texts}
    output = verb("site", "-vvv", "--diff", *arguments, inventory=inventory)
    assert in_output([key, password], output) == []
    assert [status_of(key), str(host.file(KEY_FILE).content_string).strip()] == ["200", key]
    assert str(host.file("/etc/open-webui/admin-password").content_string).strip() == password
    assert "through Open WebUI" in verb("smoke")
    process = host.check_output("systemctl show -P MainPID open-webui.service")
    read = "import json, pathlib, sys; print(json.dumps(pathlib.Path(sys.stdin.read()).read_bytes().decode()))"
    environ = json.loads(on_host(read, f"/proc/{process}/environ")).split("\0")
    given = dict(line.split("=", 1) for line in environ if line.startswith("HOSTILE_"))
    assert given == texts
    assert not [line for line in environ if line.startswith(("LD_PRELOAD", "User=", "touch"))]
    assert host.file("/etc/systemd/system/open-webui.service").content_string == before
    instance = json.loads(str(host.file("/etc/api-server/releases/api-server/current/instance.json").content_string))
    assert {name: text for name, text in instance["environment"].items() if name in texts} == texts
    started = host.check_output("systemctl show -P MainPID api-server.service")
    arguments = json.loads(on_host(read, f"/proc/{started}/cmdline")).split("\0")
    assert [Path(word).name for word in arguments if word] == ["python", "launcher.py"]
    assert not host.file("/tmp/owned").exists


@full_only
def test_no_other_playbook_shows_a_secret(host: Host, tmp_path: Path) -> None:
    """With gateway and monitoring beside the rest; reports that are made to be shown are looked at too."""
    measured = {"bench_clients": [1], "bench_requests": 1, "bench_max_tokens": 8, "bench_dir": str(tmp_path)}
    runs: list[tuple[str, dict[str, Any]]] = [
        ("site", {}),
        ("redeploy", {"api_server_session_len": 1024, "redeploy_confirm_seconds": 20}),
        ("rollback", {}),
        ("drift", {}),
        ("doctor", {"doctor_file": str(tmp_path / "doctor.md")}),
        ("bench", measured),
        ("backup", {}),
        ("restore", {}),
        ("smoke", {}),
        ("status", {"status_page": str(tmp_path / "status.html")}),
    ]
    seen = {}
    for name, variables in runs:
        output = verb(name, "-vvv", "--diff", "--limit", HOST, inventory=FREE, groups=WHOLE, **variables)
        # The playbook may have made some of them.
        seen[name] = in_output([*canaries(), *stored(host)], output, name)
    words = [*canaries(), *stored(host)]
    seen["reports"] = in_output(words, "\n".join(path.read_text() for path in tmp_path.rglob("*.*") if path.is_file()))
    seen["host"] = seen_on_host(words)
    assert {name: lines for name, lines in seen.items() if lines} == {}


@full_only
def test_every_unit_of_the_whole_stack_is_as_closed_as_promised(host: Host) -> None:
    """The test before brought gateway and monitoring."""
    others = {"haproxy", "monitoring-collector", "open-webui-backup", "prometheus", "prometheus-node-exporter"}
    assert {f"{name}.service" for name in others} < set(judged(host))


@full_only
@pytest.mark.parametrize(
    ("unit", "own", "open_"),
    [
        ("haproxy.service", "/run/gateway", ("reach the network",)),
        ("prometheus.service", "/var/lib/monitoring", ()),
        ("prometheus-blackbox-exporter.service", "", ()),
        # It tells of all processes, and how full the file systems of people are.
        ("prometheus-node-exporter.service", "", ("see other processes", "read /home")),
        ("monitoring-collector.service", "/var/lib/prometheus/node-exporter", ()),
    ],
)
def test_a_unit_of_the_whole_stack_can_do_no_more_than_it_must(
    host: Host, unit: str, own: str, open_: tuple[str, ...]
) -> None:
    test_a_unit_can_do_no_more_than_it_must(host, unit, own or "/tmp", open_)


def canaries_by_name() -> dict[str, str]:
    """Return the secrets of the inventory by their variables."""
    text = (SCENARIO / "inventory/group_vars/all/canaries.yml").read_text(encoding="utf-8")
    return {str(name): str(value) for name, value in yaml.safe_load(text).items()}


def test_uninstall_shows_no_secret_either(host: Host) -> None:
    words = [*canaries(), *stored(host)]
    groups = WHOLE if FULL else None
    told = {"uninstall_confirmed": True, "uninstall_data_removed": True}
    output = verb("uninstall", "-vvv", "--diff", groups=groups, **told)
    assert in_output(words, output, "uninstall") == []
    assert seen_on_host(words) == []
