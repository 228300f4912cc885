"""Open WebUI with accounts and chats in a real PostgreSQL: saved, upgraded, gone back and restored, nothing is lost.

The tests stand in the order in which they run.
"""

from __future__ import annotations

import functools
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hardening import exposure
from testinfra.host import Host
from webui import archives, people_of_the_older_release, tunnel, upgrade_saves_the_data_first

ROOT = Path(__file__).parents[3]
NAME = "mol-database"
VARIABLES = {"open_webui_profile": "slim", "open_webui_offline": True, "open_webui_database": "postgresql"}
EMAIL, WORD = "person@localhost", secrets.token_urlsafe(18)
CONTENT = secrets.token_hex(1 << 15)
# What an address can't hold is written as % and two digits.
PASSWORD, WRITTEN = "a/b@c:%20d", "a%2Fb%40c%3A%2520d"

# Restores an archive and ends, as a run does that is killed before the proof.
UNPROVEN = """
import dataclasses, importlib.util, pathlib, sys
from importlib.machinery import SourceFileLoader
loader = SourceFileLoader("webui_backup", "/usr/local/lib/open-webui-backup/webui_backup")
program = sys.modules["webui_backup"] = importlib.util.module_from_spec(importlib.util.spec_from_loader("webui_backup", loader))
loader.exec_module(program)
settings = program.Settings.read(pathlib.Path("/usr/local/lib/open-webui-backup/settings.json"))
program.restore(dataclasses.replace(settings, user="open-webui"), sys.argv[1])
"""  # noqa: E501 - a program as a text


def seen() -> tuple[str, list[str], list[str]]:
    """Return the version, the titles of the person's chats, and what is in the person's files."""
    with tunnel(NAME) as stranger:
        return stranger.seen(EMAIL, WORD)


def ask(title: str) -> None:
    """Have the person make a chat."""
    with tunnel(NAME) as stranger:
        stranger.signed_in(EMAIL, WORD).ask(title)


def told(host: Host, query: str, database: str = "open-webui", account: str = "postgres") -> Any:
    """Tell the server something as an account of the host."""
    return host.run(f"cd / && runuser -u {account} -- psql -XAtq -d {database} -c %s", query)


def sql(host: Host, query: str, database: str = "open-webui", account: str = "postgres") -> str:
    """Return the server's answer, which must be no error."""
    done = told(host, query, database, account)
    assert done.rc == 0, done.stderr
    return str(done.stdout).strip()


@pytest.fixture(scope="module", autouse=True)
def made(host: Host) -> None:
    """Have a person with a chat and a file in the older release."""
    people_of_the_older_release(host, NAME, EMAIL, WORD, CONTENT)


def test_accounts_and_chats_are_in_postgresql_alone(host: Host) -> None:
    assert sql(host, "SELECT count(*) FROM public.user") == "2"
    assert not host.file("/var/lib/open-webui/data/webui.db").exists
    listening = host.check_output("ss --listening --tcp --numeric --no-header")
    assert set(re.findall(r"(\S+):5432\b", listening)) <= {"127.0.0.1", "[::1]"}


def test_other_accounts_of_the_host_and_the_server_come_not_in(host: Host) -> None:
    host.check_output("useradd --system stranger")
    sql(host, "CREATE ROLE stranger LOGIN", "postgres")
    assert "permission denied for database" in told(host, "SELECT 1", account="stranger").stderr
    refused = host.run("cd / && runuser -u stranger -- psql -U open-webui -d open-webui -c 'SELECT 1'")
    assert "Peer authentication failed" in refused.stderr
    assert sql(host, "SELECT count(*) FROM public.chat", account="open-webui-backup") == "1"
    assert "permission denied" in told(host, "DELETE FROM public.chat", account="open-webui-backup").stderr


def test_a_server_that_restarts_is_found_again(host: Host) -> None:
    host.check_output("systemctl restart postgresql.service && systemctl is-active open-webui.service")
    assert seen()[1] == ["Before the upgrade"]


def test_the_timer_saves_it_while_people_write(host: Host) -> None:
    host.check_output("systemctl start open-webui-backup.service")
    (archive,) = archives(host, "timer")
    names = host.check_output(f"tar -tzf {archive}").split()
    assert {"database/postgresql.dump", "config/secret-key", "manifest.json"} <= set(names)
    assert any(re.fullmatch(r"data/uploads/.*plan\.txt", name) for name in names)
    assert exposure(host, "open-webui-backup.service") <= 2.0


def test_an_upgrade_saves_the_data_first_and_loses_nothing(host: Host, play: Callable[..., Any]) -> None:
    upgrade_saves_the_data_first(host, functools.partial(play, "open_webui", **VARIABLES))
    assert seen() == ("0.12.4", ["Before the upgrade"], [CONTENT])


def test_going_back_and_forth_loses_nothing(host: Host, play: Callable[..., Any]) -> None:
    ask("After the upgrade")
    (upgrade,) = archives(host, "upgrade")
    assert play("open_webui", "rollback", open_webui_rollback_archive=upgrade, **VARIABLES).changed() > 0
    assert seen() == ("0.12.0", ["Before the upgrade"], [CONTENT])
    later = archives(host, "rollback")[-1]
    assert play("open_webui", **VARIABLES).changed() > 0
    assert seen() == ("0.12.4", ["Before the upgrade"], [CONTENT])
    assert play("open_webui", "restore", open_webui_restore_archive=later, **VARIABLES).changed() > 0
    assert seen() == ("0.12.4", ["After the upgrade", "Before the upgrade"], [CONTENT])
    assert sql(host, "SELECT count(*) FROM pg_namespace WHERE nspname = 'before_restore'") == "0"
    assert host.run("ls -A /var/lib/open-webui/data | grep restore").stdout == ""


def test_a_restore_that_does_not_answer_is_undone(host: Host, play: Callable[..., Any]) -> None:
    before = seen()
    # An archive that is whole, with data that no release can read.
    turned = "UPDATE public.alembic_version SET version_num = reverse(version_num)"
    sql(host, turned)
    host.check_output("systemctl start open-webui-backup.service")
    sql(host, turned)
    archive = archives(host, "timer")[-1]
    message = play("open_webui", "restore", open_webui_restore_archive=archive, **VARIABLES).message()
    assert f"did not answer with the data of {archive}" in message
    assert seen() == before
    assert play("open_webui", **VARIABLES).changed() == 0


def test_a_restore_that_was_killed_says_so_and_both_ways_on_are_whole(host: Host, play: Callable[..., Any]) -> None:
    before = seen()
    newest = archives(host, "upgrade")[-1]
    # As after a kill between restore and proof.
    host.check_output("systemctl stop open-webui.service && python3 -c %s %s", UNPROVEN, newest)
    assert sql(host, "SELECT count(*) FROM before_restore.chat") == "2"
    assert "restore_unfinished" in play("open_webui", "restore", **VARIABLES).message()
    again = {"open_webui_restore_unfinished": "undone", "open_webui_restore_archive": archives(host, "rollback")[-1]}
    assert play("open_webui", "restore", **again, **VARIABLES).changed() > 0
    assert seen() == before


def test_data_in_sqlite_are_not_left_behind_in_silence(host: Host, play: Callable[..., Any]) -> None:
    sql(host, "ALTER TABLE public.alembic_version RENAME TO away")
    host.check_output("touch /var/lib/open-webui/data/webui.db")
    message = play("open_webui", **VARIABLES).message()
    assert "webui.db: they don't move by themselves" in message
    host.check_output("rm /var/lib/open-webui/data/webui.db")
    sql(host, "ALTER TABLE public.away RENAME TO alembic_version")
    assert play("open_webui", **VARIABLES).changed() == 0


def test_a_server_elsewhere_is_named_by_an_address_that_nobody_sees(host: Host, play: Callable[..., Any]) -> None:
    sql(host, f"CREATE ROLE elsewhere LOGIN PASSWORD '{PASSWORD}'", "postgres")
    sql(host, "CREATE DATABASE elsewhere TEMPLATE template0 ENCODING 'UTF8'", "postgres")
    variables = {**VARIABLES, "open_webui_database_url": f"postgresql://elsewhere:{WRITTEN}@127.0.0.1:5432/elsewhere"}
    message = play("open_webui", **variables).message()
    assert 'ALTER DATABASE "elsewhere" OWNER TO "elsewhere"' in message
    assert PASSWORD not in message
    assert WRITTEN not in message
    sql(host, "ALTER DATABASE elsewhere OWNER TO elsewhere", "postgres")
    sql(host, "ALTER SCHEMA public OWNER TO elsewhere", "elsewhere")
    played = play("open_webui", **variables)
    assert played.changed() > 0
    assert WRITTEN not in played.output
    assert int(sql(host, "SELECT count(*) FROM public.user", "elsewhere")) == 1
    shown = host.check_output(
        "{ ps axww -o args; systemctl show open-webui open-webui-backup; journalctl --no-pager -o cat -b;"
        " find /etc /usr/local /run -type f -perm -o+r -exec cat {} + 2>/dev/null; } | tr -cd '\\11\\12\\40-\\176'"
    )
    assert "open-webui-backup" in shown
    assert WRITTEN not in shown
    assert PASSWORD not in shown
    assert play("backup", **variables).changed() > 0
    host.check_output("systemctl start open-webui-backup.service")
    newest = archives(host, "timer")[-1]
    assert play("open_webui", "restore", open_webui_restore_archive=newest, **variables).changed() > 0
    assert int(sql(host, "SELECT count(*) FROM public.user", "elsewhere")) == 1


def test_uninstalling_keeps_what_people_made_unless_told_otherwise(host: Host, play: Callable[..., Any]) -> None:
    play("open_webui", "uninstall", **VARIABLES)
    assert sql(host, "SELECT count(*) FROM public.chat") == "2"
    play("open_webui", "uninstall", open_webui_data_removed=True, **VARIABLES)
    assert sql(host, "SELECT count(*) FROM pg_database WHERE datname = 'open-webui'", "postgres") == "0"
    assert sql(host, "SELECT count(*) FROM pg_roles WHERE rolname LIKE 'open-webui%'", "postgres") == "0"
