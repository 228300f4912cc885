"""Prove what script/hosts promises about names, addresses, SSH and the image's mirrors."""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "script/hosts"


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """Load the script as a module whose state and keys lie in a temporary folder."""
    loader = importlib.machinery.SourceFileLoader("script_hosts", str(SCRIPT))
    spec = importlib.util.spec_from_loader("script_hosts", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    for name, folder in {"STATE": "state", "LAB": "lab", "SSH": "lab/ssh"}.items():
        monkeypatch.setattr(module, name, tmp_path / folder)
        (tmp_path / folder).mkdir(parents=True)
    return module


def test_a_name_keeps_its_address(hosts: ModuleType) -> None:
    first = hosts.address_of("mol-site")
    assert hosts.address_of("mol-fleet") != first
    assert hosts.address_of("mol-site") == first


def test_the_lab_has_the_address_of_its_inventory(hosts: ModuleType) -> None:
    inventory = (SCRIPT.parent.parent / "inventories/lab/hosts.yml").read_text(encoding="utf-8")
    assert f"ansible_host: {hosts.address_of('lab')}\n" in inventory


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "a.b", "../a", "a b"])
def test_no_other_name_than_a_host_name_is_taken(hosts: ModuleType, name: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        hosts.check_name(name)


def test_ssh_knows_a_scenario_by_both_spellings_and_checks_its_key(hosts: ModuleType) -> None:
    hosts.write_ssh_files(["mol-api-server"])
    for name in ("mol-api-server", "mol-api_server", hosts.address_of("mol-api-server")):
        command = ["ssh", "-G", "-F", str(hosts.SSH / "config"), name]
        settings = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        assert f"hostname {hosts.address_of('mol-api-server')}" in settings
        assert "hostkeyalias mol-api-server" in settings
        assert "stricthostkeychecking true" in settings
    known = (hosts.SSH / "known_hosts").read_text(encoding="ascii")
    public = (hosts.SSH / "host-keys/mol-api-server.pub").read_text(encoding="ascii").split()[1]
    assert known.startswith("mol-api-server,")
    assert public in known


def test_the_image_comes_from_the_mirrors_of_this_machine(hosts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [
        "Debian http://mirror.test/debian/ bookworm",
        "Debian http://mirror.test/debian/ bookworm",
        "Debian http://mirror.test/security/ bookworm-security",
        "Debian http://mirror.test/debian/ bookworm-backports",
        "Somebody http://other.test/debian/ bookworm",
    ]
    answer = subprocess.CompletedProcess([], 0, "\n".join(listed), "")
    monkeypatch.setattr(hosts, "run", lambda *_args, **_options: answer)
    monkeypatch.setattr(hosts, "machine_release", lambda: {"ID": "debian"})
    lines = [line.split() for line in hosts.apt_sources("bookworm")]
    assert [(line[-3], line[-2]) for line in lines] == [
        ("http://mirror.test/debian/", "bookworm"),
        ("http://mirror.test/security/", "bookworm-security"),
    ]
    assert hosts.apt_sources("trixie") == []
