"""A host that reaches nothing installs the whole stack from a bundle, in time; a damaged bundle is refused by name.

The tests stand in the order in which they run.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
BUNDLE = "/srv/bundle"
READY_SECONDS = 90
# What the connected machine's inventory says about mirrors is not there; only how SSH reaches the host is.
WISHES: dict[str, Any] = {
    "ansible_user": "root",
    "ansible_python_interpreter": "/usr/bin/python3",
    "ansible_ssh_common_args": f"-F {ROOT}/.lab/ssh/config",
    "mirrors_bundle_dir": BUNDLE,
}


@pytest.fixture(scope="module")
def inventory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the inventory of a host without a network: the lab's wishes, without vars.yml of the bundle."""
    folder = tmp_path_factory.mktemp("inventory")
    groups = {name: {"hosts": {"mol-bundle": {}}} for name in ("model_servers", "web_uis")}
    (folder / "hosts.yml").write_text(json.dumps({"all": {"vars": WISHES}, **groups}))
    (folder / "group_vars").mkdir()
    for name in groups:
        target = folder / "group_vars" / f"{name}.yml"
        target.symlink_to(ROOT / "inventories/lab/group_vars" / f"{name}.yml")
    return folder / "hosts.yml"


def site(host: Any, inventory: Path, *arguments: str) -> tuple[int, str]:
    """Run what a user runs; return how it ended and what it printed, on one line."""
    variables = inventory.parent / "bundle.yml"
    variables.write_text(host.file(f"{BUNDLE}/vars.yml").content_string)
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"}
    command = ["ansible-playbook", "site.yml", "-i", str(inventory), "-e", f"@{variables}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.fixture(autouse=True)
def no_network(host: Any) -> None:
    """Take the host's way out; what is on its own link, as Ansible's SSH is, stays."""
    host.run("ip route del default; ip -6 route del default; echo > /etc/resolv.conf")
    # Caches that test hosts share would make it easy.
    host.run("umount /var/cache/selfhost/uv /srv/channel")


def test_the_host_has_no_way_out(host: Any) -> None:
    routes = host.check_output("ip route; ip -6 route")
    assert "default" not in routes, routes
    assert host.run("python3 -c \"import socket; socket.create_connection(('1.1.1.1', 443), 3)\"").rc == 1
    assert host.run("getent hosts example.org").rc == 2
    assert not host.file("/srv/channel/build.json").exists


def test_the_manifest_names_every_file(host: Any) -> None:
    manifest = json.loads(host.file(f"{BUNDLE}/manifest.json").content_string)
    there = host.check_output(f"cd {BUNDLE} && find . -path ./.work -prune -o -type f -printf '%P\\n'").split("\n")
    assert set(manifest["files"]) == {name for name in there if name} - {"manifest.json"}
    assert any(name.startswith("controller/selfhost-lmdeploy-") for name in manifest["files"])
    assert manifest["target"]["architecture"] == host.check_output("uname -m")


def test_a_damaged_file_is_refused_by_name_before_anything_changes(host: Any, inventory: Path) -> None:
    wheel = host.check_output(f"ls {BUNDLE}/wheels/yarl-*")
    host.run_expect([0], f"cp {wheel} /root/good && printf x | dd of={wheel} bs=1 seek=99 conv=notrunc status=none")
    code, said = site(host, inventory)
    host.run_expect([0], f"cp /root/good {wheel}")
    assert code == 2
    assert f"{wheel} is damaged" in said, said
    assert "nothing was changed" in said
    assert "changed=0" in said
    assert not host.file("/etc/apt/sources.list.d/selfhost-bundle.list").exists


def test_the_whole_stack_comes_out_of_the_bundle_in_time(host: Any, inventory: Path) -> None:
    started = time.monotonic()
    code, said = site(host, inventory)
    seconds = time.monotonic() - started
    assert code == 0, said
    print(f"ready from the bundle after {seconds:.0f} s of {READY_SECONDS}")
    assert host.service("api-server").is_running
    assert host.service("open-webui").is_running
    key = host.file("/etc/api-server/api-key").content_string.strip()
    assert "SmolLM2" in host.check_output(ask(key))
    assert seconds < READY_SECONDS, said[said.rindex("tasks ran") :]


def ask(key: str) -> str:
    """Return the command that asks the engine for its models."""
    code = (
        "import urllib.request as u; print(u.urlopen(u.Request('http://127.0.0.1:23333/v1/models', "
        f"headers=dict(Authorization='Bearer {key}'))).read().decode())"
    )
    return f'python3 -c "{code}"'


def test_a_second_run_changes_nothing(host: Any, inventory: Path) -> None:
    code, said = site(host, inventory)
    assert code == 0, said
    assert "changed=0" in said, said


def test_a_gateway_and_a_monitor_come_out_of_it_too(host: Any, inventory: Path) -> None:
    groups = json.loads(inventory.read_text())
    more = {name: {"hosts": {"mol-bundle": {}}} for name in ("gateways", "monitors")}
    inventory.write_text(json.dumps({**groups, **more}))
    code, said = site(host, inventory)
    assert code == 0, said
    for unit in ("haproxy", "prometheus", "prometheus-node-exporter", "prometheus-blackbox-exporter"):
        assert host.service(unit).is_running, unit
    ask_prometheus = (
        "import urllib.request as u; "
        "print(u.urlopen('http://127.0.0.1:9090/api/v1/query?query=count(up==1)').read().decode())"
    )
    deadline = time.monotonic() + 60
    answering = 0.0
    # Prometheus itself, exporter, engine and gateway at least.
    while answering < 4:
        assert time.monotonic() < deadline, answering
        time.sleep(1)
        found = json.loads(host.check_output(f'python3 -c "{ask_prometheus}"'))["data"]["result"]
        answering = float(found[0]["value"][1]) if found else 0.0
    code, said = site(host, inventory)
    assert "changed=0" in said, said
