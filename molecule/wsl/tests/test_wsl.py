"""What people notice on WSL: wsl.conf keeps what is theirs, a run stops until WSL starts anew, Windows gets files."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
FOLDER = "/var/lib/selfhost-wsl"
BARE_INIT = "echo init > /run/wsl-dress/comm; mount --bind /run/wsl-dress/comm /proc/1/comm"


@pytest.fixture
def without_systemd(host: Any) -> Iterator[None]:
    """Let process 1 be WSL's own, as before the first wsl --shutdown, and wsl.conf as people have it."""
    host.run_expect([0], BARE_INIT)
    host.run_expect([0], "sed -i /^systemd/d /etc/wsl.conf")
    yield
    host.run_expect([0], "umount /proc/1/comm")


def script(host: Any) -> str:
    """Return the PowerShell script as Windows sees it."""
    return str(host.file(f"{FOLDER}/selfhost-wsl.ps1").content_string)


def test_other_settings_of_wsl_conf_stay(host: Any) -> None:
    assert host.file("/etc/wsl.conf").content_string == (
        "# Mine.\n[boot]\ncommand = service cron start # stays\nsystemd=true\n[network]\nhostname=box\n"
    )


def test_windows_is_told_about_memory_and_idle_shutdown(host: Any) -> None:
    lines = host.file(f"{FOLDER}/.wslconfig").content_string.splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == [
        *("[general]", "instanceIdleTimeout=-1"),
        *("[wsl2]", "vmIdleTimeout=-1", "networkingMode=nat", "memory=24GB"),
    ]


def test_the_script_opens_the_ports_of_the_inventory_in_nat_mode(host: Any) -> None:
    text = script(host)
    assert "$Ports = @(8080, 443)" in text
    assert "$NetworkingMode = 'nat'" in text
    # Both .wslconfig and the script come from one place.
    assert re.findall(r", @\('(\w+)', '(\w+)', '(.+)'\)", text) == [
        ("general", "instanceIdleTimeout", "-1"),
        ("wsl2", "vmIdleTimeout", "-1"),
        ("wsl2", "networkingMode", "nat"),
        ("wsl2", "memory", "24GB"),
    ]
    # The address is asked for when the script runs: no address of today stands in it.
    assert re.search(r"\d+\.\d+\.\d+\.\d+", text.replace("0.0.0.0", "")) is None
    assert text.isascii(), "Windows PowerShell 5.1 reads another encoding"


def test_mirrored_mode_is_opened_in_the_hyper_v_firewall(host: Any, play: Callable[..., Any]) -> None:
    assert play("wsl", wsl_networking_mode="mirrored", wsl_lan_ports=[8080]).changed() == 1
    assert "$NetworkingMode = 'mirrored'" in script(host)
    assert "hostAddressLoopback=true" in host.file(f"{FOLDER}/.wslconfig").content_string
    assert "networkingMode=mirrored" in host.file(f"{FOLDER}/.wslconfig").content_string


def test_people_find_the_programs_of_the_driver(host: Any) -> None:
    assert host.run("bash -lc nvidia-smi").stdout.strip() == "GPU 0: of Windows"
    assert host.run("nvidia-smi").rc == 127


def test_the_way_to_run_the_script_is_told(play: Callable[..., Any]) -> None:
    played = play("wsl", wsl_lan_ports=[8081])
    assert played.changed() == 1
    told = " ".join(played.output.split())
    assert r"-File \\wsl.localhost\DISTRIBUTION\var\lib\selfhost-wsl\selfhost-wsl.ps1" in told


@pytest.mark.usefixtures("without_systemd")
def test_without_systemd_the_run_stops_with_one_word_about_the_way_on(host: Any, tmp_path: Path) -> None:
    """The whole playbook: preflight lets it pass, wsl.conf is written, and nothing else is touched."""
    (tmp_path / "hosts.yml").write_text(
        "model_servers: {hosts: {mol-wsl: {api_server_engine: llama_cpp, api_server_model: /srv/m.gguf, "
        "preflight_skipped_checks: [model_missing]}}}"
    )
    command = ["ansible-playbook", "site.yml", "-i", "molecule/inventory/hosts.yml", "-i", str(tmp_path / "hosts.yml")]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"}

    def run() -> str:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stdout + done.stderr
        return " ".join((done.stdout + done.stderr).split())

    said = run()
    assert "/etc/wsl.conf now says systemd=true below [boot]" in said, said
    assert "wsl --shutdown" in said
    assert "systemd=true" in host.file("/etc/wsl.conf").content_string
    assert not host.file("/opt/miniconda3").exists
    again = run()
    assert "/etc/wsl.conf says systemd=true below [boot] already" in again, again
    assert "changed=0" in again


def test_weights_and_data_on_the_disks_of_windows_are_refused(play: Callable[..., Any]) -> None:
    played = play(
        "preflight",
        preflight_roles=["wsl", "open_webui", "model_weights", "api_server", "mirrors"],
        open_webui_data_dir="/mnt/c/chats",
        api_server_engine="llama_cpp",
        api_server_model="/mnt/d/m.gguf",
    )
    said = played.message()
    assert "open_webui_data_dir" in said
    assert "/mnt/c/chats" in said
    assert "api_server_model" in said
    assert "Windows" in said


def test_another_host_is_left_alone(host: Any, play: Callable[..., Any]) -> None:
    """Undressed, the same host gets nothing, and the files go with uninstall."""
    assert play("wsl", "uninstall").changed() == 1
    host.run_expect([0], "umount /proc/version /proc/sys/kernel/osrelease")
    assert play("wsl").changed() == 0
    assert not host.file(FOLDER).exists
    assert not host.file("/etc/profile.d/selfhost-wsl.sh").exists


def test_a_checkout_whose_settings_are_ignored_says_so(tmp_path: Path) -> None:
    """As below /mnt/c: Ansible ignores ansible.cfg where everyone may write, and warns about it at most."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    checkout.chmod(0o777)
    for name in ("site.yml", "playbooks", "roles", "plugins", "ansible.cfg", ".collections"):
        (checkout / name).symlink_to(ROOT / name)
    environment = {key: value for key, value in os.environ.items() if key != "ANSIBLE_CONFIG"}
    command = ["ansible-playbook", "site.yml", "-i", "localhost,", "--syntax-check"]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode != 0
    assert "ansible.cfg was not read" in said, said
    assert "export ANSIBLE_CONFIG=$PWD/ansible.cfg" in said
    checkout.chmod(0o755)
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
