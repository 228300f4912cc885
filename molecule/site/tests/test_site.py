"""The verbs on a converged host, as an operator uses them: ask, look, narrow, change, rotate secrets, remove.

The tests stand in the order in which they run; the last ones take the host apart.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

ROOT = Path(__file__).parents[3]
HOST = "mol-site"
INVENTORIES = ("molecule/inventory/hosts.yml", "molecule/site/inventory/hosts.yml")
MODEL = "SmolLM2-135M-Instruct"
DATA = ("/var/lib/open-webui/data/webui.db", f"/var/lib/models/{MODEL}.Q4_1.gguf")
LEFTOVERS = (
    "/etc/api-server",
    "/etc/open-webui",
    "/etc/systemd/system/api-server.service",
    "/etc/systemd/system/open-webui.service",
    "/opt/miniconda3",
    "/usr/local/lib/api-server",
    "/usr/local/lib/open-webui",
    "/var/cache/api-server",
    "/var/cache/open-webui",
)
# What may differ from the bare host after everything was removed, each for its reason.
UNAVOIDABLE = (
    r"/(proc|sys|run|tmp|var/tmp|dev)/.*",  # gone with the next boot
    r"/var/log/.*",  # what happened stays on record
    r"/var/(lib/(apt|dpkg)|cache/(apt|debconf|ldconfig))/.*",  # what apt remembers
    r"/etc/(passwd|group|shadow|gshadow|subuid|subgid)-",  # backups that the account tools make
    r"/var/lib/systemd/.*",  # what systemd remembers: timers, random seed
    r"/root/\.ansible(/.*)?",  # Ansible's own folder
    r".*/__pycache__(/.*)?",  # the system's Python, compiled
    r"/etc/ld\.so\.cache",
)


def verb(name: str, *arguments: str, expected: int = 0, **variables: Any) -> str:
    """Run a playbook on the host; variables go through a file, as secrets should. Return what it printed."""
    inventories = [word for path in INVENTORIES for word in ("-i", path)]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as extra:
        json.dump(variables, extra)
        extra.flush()
        command = ["ansible-playbook", *inventories, f"playbooks/{name}.yml", "-e", f"@{extra.name}", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == expected, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def recap(output: str, word: str) -> int:
    """Return a number of the host's line in the recap."""
    found = re.search(rf"^{HOST} .*\b{word}=(\d+)", output, re.MULTILINE)
    assert found, output
    return int(found[1])


def secret(host: Host, path: str) -> str:
    """Return a secret of the host."""
    return str(host.file(path).content_string).strip()


def test_smoke_shows_the_answer_of_engine_and_interface() -> None:
    output = verb("smoke")
    assert re.search(rf"{MODEL} at http://127\.0\.0\.1:\d+, [\d.]+ s: .*Paris", output), output
    assert re.search(rf"{MODEL} through Open WebUI, [\d.]+ s: .*Paris", output), output
    assert recap(output, "changed") == 0


def test_smoke_fails_when_the_answer_is_another() -> None:
    output = verb("smoke", expected=2, smoke_expected="no model says this")
    assert "was expected" in output or "does not match" in output, output


def test_status_tells_machines_what_runs(tmp_path: Path) -> None:
    output = verb("status", status_file=str(tmp_path / "status.json"))
    assert re.search(rf"{HOST} +api-server +active +good +llama_cpp [\d.]+ +[0-9a-f]{{12}} +{MODEL}", output), output
    services = json.loads((tmp_path / "status.json").read_text(encoding="utf-8"))[HOST]
    by_unit = {service["unit"]: service for service in services}
    assert set(by_unit) == {"api-server.service", "open-webui.service"}
    assert all(service["healthy"] and service["enabled"] for service in services), services
    assert by_unit["open-webui.service"]["version"] == "0.12.4"
    assert MODEL in by_unit["api-server.service"]["gate"]
    assert '"unit": "api-server.service"' in verb("status", status_format="json").replace("\\", "")


@dataclass(frozen=True)
class Outside:
    """Another folder, without the checkout's settings, with the collection as `ansible-galaxy` installs it."""

    folder: Path

    def run(self, *command: str, expected: int = 0, folder: Path | None = None) -> str:
        """Return what a command printed there."""
        environment = {
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": str(self.folder),
            "ANSIBLE_CONFIG": str(self.folder / "none.cfg"),
            "ANSIBLE_FORCE_COLOR": "0",
        }
        place = folder or self.folder
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == expected, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def play(self, name: str, *, expected: int = 0, **variables: Any) -> str:
        """Run a playbook by its full name."""
        inventories = [word for path in INVENTORIES for word in ("-i", str(ROOT / path))]
        # Other hosts of the inventory belong to other scenarios, which may run beside this one.
        given = ["--limit", f"{HOST}:localhost", "-e", json.dumps(variables)]
        return self.run("ansible-playbook", *inventories, f"selfhost.lmdeploy.{name}", *given, expected=expected)


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Outside:
    """Return a folder with the installed collection."""
    found = Outside(tmp_path_factory.mktemp("outside"))
    found.run("ansible-galaxy", "collection", "build", "--output-path", str(found.folder), folder=ROOT)
    (archive,) = found.folder.glob("selfhost-lmdeploy-*.tar.gz")
    found.run("ansible-galaxy", "collection", "install", "--offline", "-p", str(found.folder), str(archive))
    return found


def test_an_installed_collection_finds_the_host_as_the_checkout_left_it(outside: Outside) -> None:
    """By their full names: same roles, same state, no change."""
    output = outside.play("site")
    assert recap(output, "changed") == 0, output
    assert "through Open WebUI" in outside.play("smoke")


@pytest.mark.skipif(os.environ.get("TEST_FULL") != "1", reason="takes minutes more: set TEST_FULL=1")
def test_every_playbook_runs_by_its_full_name(outside: Outside, tmp_path: Path) -> None:
    """To its end where that leaves the host as it is; the others say what they lack."""
    given: dict[str, dict[str, Any]] = {
        "bench": {"bench_clients": [1], "bench_requests": 1, "bench_max_tokens": 8, "bench_dir": str(tmp_path)},
        "doctor": {"doctor_file": str(tmp_path / "report.md")},
    }
    ends = ["preflight", "site", "smoke", "status", "drift", *given, "backup", "restore", "redeploy", "rotate"]
    refusals: dict[str, tuple[dict[str, Any], str]] = {
        "bundle": ({}, "bundle_dir"),
        "rollback": ({"rollback_release": "0" * 12}, "no whole release"),
        "uninstall": ({}, "uninstall_confirmed"),
    }
    assert {path.stem for path in (ROOT / "playbooks").glob("*.yml")} == {*ends, *refusals}
    for name in ends:
        assert recap(outside.play(name, **given.get(name, {})), "failed") == 0
    for name, (variables, word) in refusals.items():
        assert word in outside.play(name, expected=2, **variables)
    assert recap(outside.play("site"), "changed") == 0


@pytest.mark.parametrize("tag", ["model_weights", "api_server", "open_webui"])
def test_a_tag_works_alone(tag: str) -> None:
    output = verb("site", "--tags", tag, preflight_settled_hours=0)
    assert recap(output, "changed") == 0, output


LEFT_ALONE = f"As wanted already: 1 of 1 hosts ({HOST})"


def seen() -> str:
    """Return what the survey of a run sees of all that the roles have made."""
    folders = ["/var/backups/open-webui", "/var/lib/open-webui/data"]
    watched = {"trees": ["/var/lib/models"], "folders": folders, "prefix": "/opt/miniconda3"}
    inventories = [word for path in INVENTORIES for word in ("-i", path)]
    module = ["-b", "-m", "selfhost.lmdeploy.host_survey", "-a", json.dumps({"watched": watched})]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"}
    command = ["ansible", *inventories, HOST, "--one-line", *module]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return str(json.loads(done.stdout.split("=>", 1)[1])["survey"]["watch"]["seen"])


def test_a_host_that_is_as_wanted_is_left_alone(host: Host) -> None:
    output = verb("site")
    if "As wanted already" not in output:
        assert recap(output, "changed") == 0, output
        output = verb("site")
    assert LEFT_ALONE in output, output
    # Judged, compared, told: nothing of the roles ran.
    assert (recap(output, "ok"), recap(output, "changed"), recap(output, "skipped")) == (3, 0, 0), output
    assert LEFT_ALONE in verb("site", "--check", "--diff")
    note = host.file("/run/selfhost-settled.json")
    assert (note.user, note.mode) == ("root", 0o600)
    # Who asks for it has every role look.
    assert recap(verb("site", preflight_settled_hours=0), "ok") > 10
    # Another wish is another run.
    assert recap(verb("site", "--check", open_webui_port=8099), "changed") > 0


# Damage to a piece of each role, how it is done, and how it shows that it was mended.
DAMAGE = {
    "mirrors": ("rm /usr/local/share/ca-certificates/selfhost-mirrors-1.crt", "test -s {}"),
    "miniconda": ("rm /etc/profile.d/conda.sh", "test -s {}"),
    "llama_cpp": (
        "rm -r /opt/miniconda3/envs/llama-cpp/lib/python3.11/site-packages/xllamacpp-*.dist-info",
        "ls -d {}",
    ),
    "model_weights": (f"rm {DATA[1]}", "test -s {}"),
    "api_server": ("echo '# damage' >>/etc/systemd/system/api-server.service", "! grep -q damage {}"),
    "api_server's unit": ("systemctl stop api-server.service", "systemctl is-active {}"),
    "open_webui": ("echo ENABLE_SIGNUP=true >>/etc/open-webui/open-webui.env", "! grep -q ^ENABLE_SIGNUP=true {}"),
    "open_webui's unit": ("systemctl disable open-webui.service", "systemctl is-enabled {}"),
    "backup": ("chown 1:1 /var/backups/open-webui", "test $(stat -c %U {}) = open-webui-backup"),
    "backup's timer": ("systemctl stop open-webui-backup.timer", "systemctl is-active {}"),
}


def test_every_damage_is_seen_and_mended_by_the_next_run(host: Host) -> None:
    before = seen()
    assert before == seen()
    for role, (command, _proof) in DAMAGE.items():
        host.check_output(command)
        after = seen()
        assert after != before, role
        before = after
    output = verb("site")
    assert "As wanted already" not in output, output
    assert recap(output, "changed") > 0, output
    for role, (command, proof) in DAMAGE.items():
        mended = host.run(proof.format(command.split(">>")[-1].split()[-1]))
        assert mended.rc == 0, (role, mended.stdout, mended.stderr, output)
    assert recap(verb("site"), "changed") == 0
    assert LEFT_ALONE in verb("site")


def test_a_changed_port_is_applied_once_and_the_interface_follows() -> None:
    wanted = {"api_server_port": 23444, "open_webui_port": 8081}
    assert recap(verb("site", **wanted), "changed") > 0
    output = verb("site", **wanted)
    assert recap(output, "changed") == 0, output
    assert "through Open WebUI" in verb("smoke")
    assert "http://127.0.0.1:8081" in verb("status")


def test_secrets_are_rotated_and_never_shown(host: Host) -> None:
    old = [secret(host, path) for path in ("/etc/api-server/api-key", "/etc/open-webui/admin-password")]
    new = ["rotated-key-of-this-test-0123456789", "rotated password of this test"]
    output = verb("site", "-vvv", "--diff", api_server_api_key=new[0], open_webui_admin_password=new[1])
    assert [secret(host, path) for path in ("/etc/api-server/api-key", "/etc/open-webui/admin-password")] == new
    output += verb("smoke", "-vvv", "--diff")
    output += verb("status", "-vvv", "--diff")
    shown = {
        "the output": output,
        "the journal": str(host.check_output("journalctl --no-pager -o cat")),
        "the process list": str(host.check_output("ps axww -o args")),
        "the units": str(
            host.check_output("systemctl show 'api-server*' open-webui.service; cat /etc/systemd/system/*.service")
        ),
        "open files": str(
            host.check_output(
                "find /etc /opt/miniconda3/envs /usr/local /var/lib -type f -perm -o+r -size -1M "
                "-exec grep -lFe %s -e %s {} +; true",
                *new,
            )
        ),
    }
    secrets = [*old, *new, secret(host, "/etc/open-webui/secret-key")]
    found = [place for place, text in shown.items() if any(word in text for word in secrets)]
    assert not found
    assert not shown["open files"]


def left_behind(host: Host) -> list[str]:
    """Return the paths that the bare host did not have, but for packages of the distribution and the unavoidable."""
    bare = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"], "bare.txt").read_text(encoding="utf-8").splitlines()
    # Packages stay: other programs may have come to need them.
    packaged = host.check_output("cat /var/lib/dpkg/info/*.list").splitlines()
    known = {*bare, *packaged, *(f"/usr{path}" for path in packaged)}
    found = [path for path in host.check_output("find / -xdev").splitlines() if path not in known]
    return [path for path in found if not any(re.fullmatch(pattern, path) for pattern in UNAVOIDABLE)]


def test_uninstall_asks_first(host: Host) -> None:
    output = verb("uninstall", expected=2)
    assert "uninstall_confirmed" in output, output
    assert HOST in output
    assert host.service("open-webui").is_running


def test_uninstall_keeps_data_and_models(host: Host) -> None:
    assert recap(verb("uninstall", uninstall_confirmed=True), "changed") > 0
    assert [path for path in LEFTOVERS if host.file(path).exists and path != "/etc/open-webui"] == []
    assert all(host.file(path).exists for path in DATA)
    data = ("/etc/open-webui", "/var/lib/open-webui", "/var/lib/models", "/var/backups/open-webui")
    assert [path for path in left_behind(host) if not path.startswith(data)] == []
    assert recap(verb("uninstall", uninstall_confirmed=True), "changed") == 0


def test_uninstall_removes_data_when_told(host: Host) -> None:
    verb("uninstall", uninstall_confirmed=True, uninstall_data_removed=True)
    assert [path for path in (*LEFTOVERS, "/var/lib/open-webui", "/var/lib/models") if host.file(path).exists] == []
    assert left_behind(host) == []
    users = host.check_output("getent passwd")
    assert "api-server" not in users
    assert "open-webui" not in users
