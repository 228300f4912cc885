"""The module webui_database: what is missing in a server is made once, and nothing that people have is passed over."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.webui_backup import BackupError
from ansible_collections.selfhost.lmdeploy.plugins.modules import webui_database as module

CLUSTERS = """9.6 main 5433 down postgres /var/lib/postgresql/9.6/main /var/log/x
15  main 5432 online postgres /var/lib/postgresql/15/main /var/log/y
16  other 5434 online postgres /var/lib/postgresql/16/other /var/log/z
"""
PARAMS: dict[str, Any] = {"url": "", "user": "ui", "backup_user": "ui-backup"}


class Server:
    """A server of the distribution, as SQL changes it."""

    version, port, is_running = "15", 5433, False
    there: set[str]
    said: list[str]

    def start(self) -> None:
        """Start it."""
        type(self).is_running = True

    def parts(self, _user: str, _backup_user: str) -> set[str]:
        """Return what is there."""
        return set(self.there)

    def ask(self, sql: str, database: str = "postgres") -> str:
        """Take SQL."""
        self.said.append(f"{database}: {sql}")
        return ""


class Base:
    """A database behind an address."""

    environment: ClassVar = {"PGDATABASE": "chats", "PGUSER": "ui", "PGHOST": "db"}
    held, owned = False, "t"

    def __init__(self, url: str, user: str = "") -> None:
        """Take what nobody looks at."""

    def holds(self, _schema: str) -> bool:
        """Tell whether there are accounts."""
        return self.held

    def ask(self, _query: str) -> str:
        """Tell whether the account owns it."""
        return self.owned


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> type[Server]:
    """Put a server in the place of the host's."""
    monkeypatch.setattr(Server, "is_running", False)
    monkeypatch.setattr(Server, "there", set(), raising=False)
    monkeypatch.setattr(Server, "said", [], raising=False)
    monkeypatch.setattr(module, "Server", Server)
    monkeypatch.setattr(module, "Postgresql", Base)
    monkeypatch.setattr(shutil, "which", lambda _name: "/usr/bin/it")
    return Server


def test_the_distributions_own_cluster_is_taken() -> None:
    assert module.cluster_of(CLUSTERS) == ("15", 5432, True)
    assert module.cluster_of("16 other 5434 online postgres /x /y") is None
    assert module.cluster_of("") is None


def test_what_is_missing_is_made_once(server: type[Server], tmp_path: Path) -> None:
    params = {**PARAMS, "data_dir": str(tmp_path)}
    foretold = module.have_local(params, dry=True)
    assert (foretold["changed"], server.said) == (True, [])
    made = module.have_local(params, dry=False)
    assert made["made"] == ["a running server 15", "role ui", "role ui-backup", "database ui", "rights ui"]
    assert made["url"] == "postgresql://ui@/ui?host=/run/postgresql&port=5433"
    # Rights are a database's own matter, and what tells that they are there is said last.
    assert server.said[-1].startswith("ui: ")
    assert server.said[-1].endswith('GRANT CONNECT ON DATABASE "ui" TO "ui-backup"')
    server.there = {"role ui", "role ui-backup", "database ui", "rights ui"}
    assert module.have_local(params, dry=False)["changed"] is False


def test_a_bare_host_is_told_what_would_come(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    params = {**PARAMS, "data_dir": str(tmp_path)}
    assert module.have_local(params, dry=True)["url"].endswith("port=5432")
    assert module.have_remote({**params, "url": "postgresql://u:w@db/x"}, dry=True)["changed"] is False
    assert module.remove_local(params, dry=False)["changed"] is False


def test_accounts_in_sqlite_are_not_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "webui.db").touch()
    params = {**PARAMS, "data_dir": str(tmp_path), "url": "postgresql://u:secretword@db/x"}
    with pytest.raises(BackupError, match=r"webui.db: they don't move") as caught:
        module.have_remote(params, dry=False)
    assert "secretword" not in str(caught.value)
    monkeypatch.setattr(Base, "held", True)
    assert module.have_remote(params, dry=False)["changed"] is False


def test_an_account_that_does_not_own_its_database_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Base, "owned", "f")
    with pytest.raises(BackupError, match='ALTER DATABASE "chats" OWNER TO "ui"'):
        module.have_remote({**PARAMS, "data_dir": str(tmp_path), "url": "postgresql://u:w@db/x"}, dry=False)


def test_what_people_made_goes_and_the_server_stays(server: type[Server], tmp_path: Path) -> None:
    server.there = {"role ui", "database ui", "rights ui"}
    removed = module.remove_local({**PARAMS, "data_dir": str(tmp_path)}, dry=False)
    assert removed["made"] == ["database ui", "role ui"]
    assert server.said == ['postgres: DROP DATABASE "ui" WITH (FORCE)', 'postgres: DROP ROLE "ui"']
