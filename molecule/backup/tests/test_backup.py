"""An older Open WebUI with what people made in it, through upgrade, backup and restore: nothing is lost."""

from __future__ import annotations

import functools
import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hardening import exposure
from webui import ARCHIVES, archives, people_of_the_older_release, tunnel, upgrade_saves_the_data_first

if TYPE_CHECKING:
    from testinfra.host import Host

ROOT = Path(__file__).parents[3]
NAME, OTHER = "mol-backup", "mol-backup-1"
LOCK = ROOT / "roles/open_webui/files/locks/open-webui-0.12.4-slim.txt"
VARIABLES = {"open_webui_profile": "slim", "open_webui_offline": True, "backup_keep": 5}
EMAIL, WORD = "person@localhost", secrets.token_urlsafe(18)
CONTENT = secrets.token_hex(1 << 15)
# A release without this ends while it is imported.
NEEDED = "itsdangerous"
# An archive that is whole, with data that no release can read: run on the host, it prints the archive's path.
UNREADABLE = """
import contextlib, dataclasses, importlib.util, pathlib, sqlite3, sys
from importlib.machinery import SourceFileLoader
loader = SourceFileLoader("webui_backup", "/usr/local/lib/open-webui-backup/webui_backup")
program = sys.modules["webui_backup"] = importlib.util.module_from_spec(importlib.util.spec_from_loader("webui_backup", loader))
loader.exec_module(program)
data = pathlib.Path("/root/unreadable/data")
data.mkdir(parents=True)
program.copy_database(pathlib.Path("/var/lib/open-webui/data/webui.db"), data / "webui.db")
with contextlib.closing(sqlite3.connect(data / "webui.db")) as base:
    base.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    base.commit()
settings = program.Settings.read(pathlib.Path("/usr/local/lib/open-webui-backup/settings.json"))
settings = dataclasses.replace(settings, data_dir=str(data), folder="/root/unreadable/archives")
print(program.create(settings, "manual")["archive"])
"""  # noqa: E501 - a program as a text
full = pytest.mark.skipif(os.environ.get("TEST_FULL") != "1", reason="takes minutes more: set TEST_FULL=1")


def seen(name: str = NAME) -> tuple[str, list[str], list[str]]:
    """Return the version, the titles of the person's chats and what is in the person's files, as the API tells them."""
    with tunnel(name) as stranger:
        return stranger.seen(EMAIL, WORD)


def playbook(name: str, *hosts: str, **variables: object) -> subprocess.CompletedProcess[str]:
    """Run a playbook of the collection on hosts as its web interfaces."""
    inventory = json.dumps({"web_uis": {"hosts": dict.fromkeys(hosts)}})
    path = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"], "web_uis.json")
    path.write_text(inventory)
    command = [str(Path(sys.executable).with_name("ansible-playbook")), str(ROOT / f"playbooks/{name}.yml")]
    command += ["-i", str(ROOT / "molecule/inventory/hosts.yml"), "-i", str(path)]
    command += ["-e", json.dumps({**VARIABLES, **variables})]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)


@pytest.fixture(scope="module", autouse=True)
def made(host: Host) -> None:
    """Have a person with a chat and a file in the older release."""
    people_of_the_older_release(host, NAME, EMAIL, WORD, CONTENT)


def test_the_timer_makes_a_whole_archive_while_people_write(host: Host) -> None:
    with tunnel(NAME) as stranger:
        person = stranger.signed_in(EMAIL, WORD)
        writer = subprocess.Popen(
            ["ssh", "-F", str(ROOT / ".lab/ssh/config"), NAME, "systemctl start open-webui-backup.service"]
        )
        titles = ["Before the upgrade"]
        while writer.poll() is None or len(titles) < 3:
            titles.append(f"Meanwhile {len(titles)}")
            person.ask(titles[-1])
    journal = host.check_output("journalctl -u open-webui-backup.service -o cat")
    assert writer.returncode == 0, journal
    (archive,) = archives(host, "timer")
    assert f"{archive}: Open WebUI 0.12.0" in journal
    file = host.file(archive)
    assert (file.mode, host.file(ARCHIVES).mode) == (0o600, 0o700)
    names = host.check_output(f"tar -tzf {archive}").split()
    assert {"data/webui.db", "config/secret-key", "config/open-webui.env", "manifest.json"} <= set(names)
    assert any(re.fullmatch(r"data/uploads/.*plan\.txt", name) for name in names)
    assert host.service("open-webui-backup.timer").is_running
    # For the tests that follow.
    with tunnel(NAME) as stranger:
        person = stranger.signed_in(EMAIL, WORD)
        for chat in person.call("/api/v1/chats/list?page=1"):
            if chat["title"] != "Before the upgrade":
                person.delete(chat["id"])


def test_the_unit_can_do_little(host: Host) -> None:
    assert exposure(host, "open-webui-backup.service") <= 2.0


def test_an_upgrade_saves_the_data_first_and_loses_nothing(host: Host, play: Callable[..., Any]) -> None:
    upgrade_saves_the_data_first(host, functools.partial(play, "open_webui", **VARIABLES))
    assert seen() == ("0.12.4", ["Before the upgrade"], [CONTENT])


def test_a_damaged_archive_is_refused_before_any_change(host: Host, play: Callable[..., Any]) -> None:
    (archive,) = archives(host, "upgrade")
    host.check_output(f"head -c 20000 {archive} > /root/cut.tar.gz")
    before = host.check_output("systemctl show open-webui.service --property=ExecMainPID --value")
    message = play("open_webui", "restore", open_webui_restore_archive="/root/cut.tar.gz", **VARIABLES).message()
    assert "/root/cut.tar.gz is damaged or cut" in message
    assert host.check_output("systemctl show open-webui.service --property=ExecMainPID --value") == before
    assert seen()[1] == ["Before the upgrade"]


def test_a_full_disk_leaves_the_older_backups_and_no_half_archive(host: Host, play: Callable[..., Any]) -> None:
    host.check_output("mkdir -p /mnt/small && mount -t tmpfs -o size=64m none /mnt/small")
    try:
        older = "open-webui-20260101T000000Z-0.12.0-manual.tar.gz"
        host.check_output(f"touch /mnt/small/{older}")
        message = play("backup", "now", backup_dir="/mnt/small", **VARIABLES).message()
        assert "The disk of /mnt/small has no room" in message
        assert "backup_dir" in message
        assert host.check_output("ls /mnt/small") == older
    finally:
        host.check_output("umount /mnt/small")


@full
def test_an_upgrade_that_fails_goes_back_by_itself(host: Host, play: Callable[..., Any], tmp_path: Path) -> None:
    lock = tmp_path / "broken.txt"
    # A lock of the right version that lacks what the program imports.
    lock.write_text(re.sub(rf"(?m)^{NEEDED}==.*\n(?: .*\n)+", "", LOCK.read_text(encoding="utf-8")))
    before = host.check_output("readlink /opt/miniconda3/envs/open-webui")
    unit = host.file("/etc/systemd/system/open-webui.service").content_string
    message = play("open_webui", open_webui_lock=str(lock), open_webui_port=8081, **VARIABLES).message()
    assert "did not take over" in message
    assert f"No module named '{NEEDED}'" in message
    assert host.check_output("readlink /opt/miniconda3/envs/open-webui") == before
    assert host.file("/etc/systemd/system/open-webui.service").content_string == unit
    assert seen() == ("0.12.4", ["Before the upgrade"], [CONTENT])
    assert play("open_webui", **VARIABLES).changed() == 0


@full
def test_going_back_and_forth_loses_nothing(host: Host, play: Callable[..., Any]) -> None:
    with tunnel(NAME) as stranger:
        stranger.signed_in(EMAIL, WORD).ask("After the upgrade")
    first = archives(host, "upgrade")[0]
    assert play("open_webui", "rollback", open_webui_rollback_archive=first, **VARIABLES).changed() > 0
    # What was made after the upgrade is in a backup; the older release can't read it.
    assert seen() == ("0.12.0", ["Before the upgrade"], [CONTENT])
    later = archives(host, "rollback")[-1]
    assert play("open_webui", **VARIABLES).changed() > 0
    assert seen() == ("0.12.4", ["Before the upgrade"], [CONTENT])
    assert play("open_webui", "restore", open_webui_restore_archive=later, **VARIABLES).changed() > 0
    assert seen() == ("0.12.4", ["After the upgrade", "Before the upgrade"], [CONTENT])
    assert host.run("ls -A /var/lib/open-webui/data | grep restore").stdout == ""


@full
def test_a_restore_that_does_not_answer_is_undone(host: Host, play: Callable[..., Any]) -> None:
    before = seen()
    secret = host.file("/etc/open-webui/secret-key").content_string
    host.check_output("cat > /root/unreadable.py <<'EOF'\n%s\nEOF" % UNREADABLE)  # noqa: UP031 - the text has braces
    archive = host.check_output("python3 /root/unreadable.py")
    message = play("open_webui", "restore", open_webui_restore_archive=archive, **VARIABLES).message()
    assert f"did not answer with the data of {archive}" in message
    assert "ffffffffffff" in message
    assert seen() == before
    assert host.file("/etc/open-webui/secret-key").content_string == secret
    assert play("open_webui", **VARIABLES).changed() == 0


@full
def test_another_host_takes_over(tmp_path: Path, host: Host) -> None:
    """With an archive that only the holder of a key can read, who is none of the hosts."""
    host.check_output("apt-get -qq install age")
    identity = tmp_path / "backup.key"
    identity.write_text(host.check_output("age-keygen"))
    recipient = next(word for word in identity.read_text().split() if word.startswith("age1"))
    fetched = tmp_path / "fetched"
    done = playbook("backup", NAME, backup_fetched_to=str(fetched), backup_recipient=recipient)
    assert done.returncode == 0, done.stdout
    (archive,) = (fetched / NAME).iterdir()
    assert archive.name.endswith(".tar.gz.age")
    assert archive.read_bytes().startswith(b"age-encryption.org/")
    installed = playbook("site", OTHER, backup_recipient=recipient)
    assert installed.returncode == 0, installed.stdout
    refused = playbook("restore", OTHER, restore_archive=str(archive), backup_recipient=recipient)
    assert refused.returncode == 2, refused.stdout
    assert "restore_identity_file" in refused.stdout, refused.stdout
    told = {"restore_archive": str(archive), "restore_identity_file": str(identity), "backup_recipient": recipient}
    restored = playbook("restore", OTHER, **told)
    assert restored.returncode == 0, restored.stdout
    assert seen(OTHER) == seen(NAME)
    password = host.file("/etc/open-webui/admin-password").content_string.strip()
    with tunnel(OTHER) as stranger:
        assert stranger.signed_in("admin@localhost", password).call("/api/v1/auths/")["role"] == "admin"
