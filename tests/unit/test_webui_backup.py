"""Backups of Open WebUI: consistent, whole or not there, restored only when every byte is right, and undone."""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import webui_backup
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.webui_backup import BackupError, Settings
from ansible_collections.selfhost.lmdeploy.plugins.modules import webui_backup as module

PROGRAM = Path(webui_backup.__file__)


@pytest.fixture
def place(tmp_path: Path) -> Settings:
    """Return an Open WebUI with an account, an upload and secrets; its database is closed."""
    data, config, release = tmp_path / "data", tmp_path / "config", tmp_path / "release"
    for folder in (data / "uploads", data / "vector_db", config, release):
        folder.mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(data / "webui.db")) as base:
        base.execute("PRAGMA journal_mode=WAL")
        base.execute("CREATE TABLE chat (n INTEGER, twin INTEGER)")
        base.execute("CREATE TABLE alembic_version (version_num TEXT)")
        base.execute("INSERT INTO alembic_version VALUES ('0bd252b206fb')")
        base.execute("INSERT INTO chat VALUES (1, 1)")
        base.commit()
    (data / "uploads/plan.txt").write_text("the plan")
    for name, content in (("secret-key", "key"), ("admin-password", "word"), ("open-webui.env", 'PORT="1"\n')):
        (config / name).write_text(content)
    (tmp_path / "unit.service").write_text("[Service]\n")
    (release / "release.json").write_text(json.dumps({"id": "0123456789ab", "packages": {"open-webui": "0.12.4"}}))
    return Settings(
        folder=str(tmp_path / "backups"),
        data_dir=str(data),
        config_dir=str(config),
        prefix=str(release),
        files=[str(tmp_path / "unit.service")],
    )


def rows(settings: Settings) -> list[tuple[int, int]]:
    """Return the chats of the data folder."""
    with contextlib.closing(sqlite3.connect(Path(settings.data_dir, "webui.db"))) as base:
        return list(base.execute("SELECT n, twin FROM chat ORDER BY n"))


def names(settings: Settings) -> list[str]:
    """Return the names of everything in the folder of the archives, the lock apart."""
    return sorted(path.name for path in Path(settings.folder).iterdir() if path.name != ".lock")


def test_an_archive_holds_data_secrets_unit_and_versions(place: Settings) -> None:
    made = webui_backup.create(place, "manual")
    manifest = webui_backup.unpack(Path(made["archive"]), None)
    assert set(manifest["files"]) == {
        "data/webui.db",
        "data/uploads/plan.txt",
        "config/secret-key",
        "config/admin-password",
        "config/open-webui.env",
        f"system{place.files[0]}",
    }
    assert (manifest["version"], manifest["release"], manifest["revision"]) == (
        "0.12.4",
        "0123456789ab",
        "0bd252b206fb",
    )
    assert Path(made["archive"]).stat().st_mode & 0o777 == 0o600
    assert names(place) == [Path(made["archive"]).name]
    # Looking at the data has left no trace in them.
    assert sorted(path.name for path in Path(place.data_dir).iterdir()) == ["uploads", "vector_db", "webui.db"]


def test_a_host_without_data_has_nothing_to_save(place: Settings) -> None:
    shutil.rmtree(place.data_dir)
    assert webui_backup.create(place, "manual")["archive"] == ""


def test_a_copy_is_consistent_while_others_write(place: Settings) -> None:
    end = threading.Event()

    def write() -> None:
        with contextlib.closing(sqlite3.connect(Path(place.data_dir, "webui.db"), timeout=30)) as base:
            number = 1
            while not end.is_set():
                number += 1
                # Both rows in one transaction: a torn copy would show one of them.
                base.execute("INSERT INTO chat VALUES (?, ?)", (number, -number))
                base.execute("INSERT INTO chat VALUES (?, ?)", (-number, number))
                base.commit()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        archives = [webui_backup.create(place, reason)["archive"] for reason in ("manual", "timer", "upgrade")]
    finally:
        end.set()
        writer.join()
    for archive in archives:
        webui_backup.restore(place, archive)
        found = rows(place)
        assert sorted(n for n, _ in found if n != 1) == sorted(twin for n, twin in found if n != 1)
        webui_backup.settle(place)


def test_a_program_that_opens_and_closes_the_database_all_the_time_is_waited_for(
    place: Settings, tmp_path: Path
) -> None:
    # Its last one to close removes the log, so that a reader finds one and then none.
    code = (
        "import itertools, sqlite3, sys, time\n"
        "for number in itertools.count(2):\n"
        "    base = sqlite3.connect(sys.argv[1], timeout=30)\n"
        "    base.execute('PRAGMA journal_mode=WAL')\n"
        "    base.execute('INSERT INTO chat VALUES (?, zeroblob(5000))', (number,))\n"
        "    base.commit()\n"
        "    base.close()\n"
        "    time.sleep(0.002)\n"
    )
    source = Path(place.data_dir, "webui.db")
    with contextlib.closing(sqlite3.connect(source)) as base:
        base.execute("INSERT INTO chat VALUES (0, zeroblob(8000000))")
        base.commit()
    writers = [subprocess.Popen([sys.executable, "-c", code.replace("(2)", f"({n})"), source]) for n in (10, 10**6)]
    try:
        for number in range(25):
            webui_backup.copy_database(source, tmp_path / f"{number}.db")
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()


def test_what_a_crash_left_in_the_log_is_saved(place: Settings) -> None:
    code = (
        "import os, sqlite3, sys; base = sqlite3.connect(sys.argv[1]); "
        "base.execute('INSERT INTO chat VALUES (7, 7)'); base.commit(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, f"{place.data_dir}/webui.db"], check=True)
    Path(place.data_dir, "webui.db-shm").unlink()
    assert Path(place.data_dir, "webui.db-wal").stat().st_size > 0
    before = sorted(path.name for path in Path(place.data_dir).iterdir())
    made = webui_backup.create(place, "manual")
    assert sorted(path.name for path in Path(place.data_dir).iterdir()) == before
    webui_backup.restore(place, made["archive"])
    assert (7, 7) in rows(place)


def test_a_damaged_database_is_refused(place: Settings) -> None:
    path = Path(place.data_dir, "webui.db")
    path.write_bytes(path.read_bytes()[:4096] + b"\xff" * 8192)
    with pytest.raises(BackupError, match="is damaged"):
        webui_backup.create(place, "manual")
    assert names(place) == []


def test_the_oldest_of_each_reason_go(place: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    few = replace(place, keep=2)
    folder = Path(place.folder)
    folder.mkdir()
    for day in range(10, 14):
        for reason in ("timer", "upgrade"):
            (folder / f"open-webui-202611{day}T000000Z-0.12.4-{reason}.tar.gz").touch()
    (folder / "notes.txt").touch()
    made = webui_backup.create(few, "timer")
    assert len(made["removed"]) == 5
    assert [name for name in names(few) if "upgrade" in name] == [
        "open-webui-20261112T000000Z-0.12.4-upgrade.tar.gz",
        "open-webui-20261113T000000Z-0.12.4-upgrade.tar.gz",
    ]
    assert len([name for name in names(few) if "timer" in name]) == 2
    assert "notes.txt" in names(few)


def test_restoring_brings_data_and_secrets_and_keeps_what_was_there(place: Settings) -> None:
    made = webui_backup.create(place, "manual")
    data, config = Path(place.data_dir), Path(place.config_dir)
    (data / "uploads/plan.txt").write_text("overwritten")
    (data / "new.txt").touch()
    (data / "cache/embedding/models").mkdir(parents=True)
    (data / "cache/embedding/models/weights").write_text("large")
    (config / "secret-key").write_text("another")
    (config / "open-webui.env").write_text("ANOTHER=1\n")
    webui_backup.restore(place, made["archive"])
    assert (data / "uploads/plan.txt").read_text() == "the plan"
    assert not (data / "new.txt").exists()
    assert (data / "cache/embedding/models/weights").read_text() == "large"
    assert (config / "secret-key").read_text() == "key"
    # The inventory says what is in the environment.
    assert (config / "open-webui.env").read_text() == "ANOTHER=1\n"
    assert webui_backup.is_unsettled(place)
    with pytest.raises(BackupError, match="restore_unfinished"):
        webui_backup.restore(place, made["archive"])

    assert webui_backup.undo(place)
    assert (data / "uploads/plan.txt").read_text() == "overwritten"
    assert (data / "new.txt").exists()
    assert (config / "secret-key").read_text() == "another"
    assert not webui_backup.is_unsettled(place)
    assert not webui_backup.undo(place)
    assert sorted(path.name for path in data.iterdir()) == ["cache", "new.txt", "uploads", "vector_db", "webui.db"]

    webui_backup.restore(place, made["archive"], whole=True)
    assert (config / "open-webui.env").read_text() == 'PORT="1"\n'
    assert webui_backup.settle(place)
    assert not webui_backup.settle(place)
    assert sorted(path.name for path in data.iterdir()) == ["cache", "uploads", "webui.db"]


def test_a_restore_that_was_cut_while_it_moved_is_undone(place: Settings) -> None:
    data = Path(place.data_dir)
    before = sorted(path.name for path in data.iterdir())
    (data / ".restore-old").mkdir()
    (data / "uploads").rename(data / ".restore-old/uploads")
    assert webui_backup.undo(place)
    assert sorted(path.name for path in data.iterdir()) == before
    assert (data / "uploads/plan.txt").exists()


@pytest.mark.parametrize("fault", ["cut", "flipped", "foreign", "other"])
def test_a_damaged_archive_is_refused_before_anything_changes(place: Settings, fault: str) -> None:
    made = Path(webui_backup.create(place, "manual")["archive"])
    content = bytearray(made.read_bytes())
    if fault == "cut":
        made.write_bytes(content[: len(content) * 2 // 3])
    elif fault == "flipped":
        plain = bytearray(gzip.decompress(content))
        plain[plain.index(b"the plan")] ^= 1
        made.write_bytes(gzip.compress(plain))
    elif fault == "foreign":
        with tarfile.open(made, "w:gz") as tar:
            member = tarfile.TarInfo("../../etc/passwd")
            tar.addfile(member)
    else:
        made.write_text("not an archive")
    before = {path: path.read_bytes() for path in Path(place.data_dir).rglob("*") if path.is_file()}
    for step in (webui_backup.check, webui_backup.restore):
        with pytest.raises(BackupError, match=r"damaged|cut|which no backup holds"):
            step(place, str(made))
    assert {path: path.read_bytes() for path in Path(place.data_dir).rglob("*") if path.is_file()} == before
    assert not webui_backup.is_unsettled(place)


def test_data_of_a_later_release_are_refused(place: Settings) -> None:
    made = webui_backup.create(place, "manual")
    marker = Path(place.prefix, "release.json")
    marker.write_text(marker.read_text().replace("0.12.4", "0.12.3"))
    with pytest.raises(BackupError, match=r"0\.12\.4.*set open_webui_version"):
        webui_backup.restore(place, made["archive"])
    webui_backup.restore(place, made["archive"], any_version=True)


def test_a_full_disk_is_refused_before_anything_is_written(place: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Path(webui_backup.create(place, "manual")["archive"]).name
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(BackupError, match=r"no room.*are needed.*backup_keep"):
        webui_backup.create(place, "manual")
    assert names(place) == [first]


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_half(place: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(webui_backup.Archive, "close", full)
    with pytest.raises(BackupError, match=r"is full.*older backups are as they were"):
        webui_backup.create(place, "manual")
    assert names(place) == []


def test_two_at_once_do_not_mix(place: Settings) -> None:
    Path(place.folder).mkdir()
    with webui_backup.alone(Path(place.folder)), pytest.raises(BackupError, match="Another backup"):
        webui_backup.create(place, "manual")


def test_a_killed_backup_is_cleared_away(place: Settings) -> None:
    Path(place.folder, ".partial-x").mkdir(parents=True)
    made = webui_backup.create(place, "manual")
    assert names(place) == [Path(made["archive"]).name]


def test_another_database_is_not_passed_over_in_silence(place: Settings) -> None:
    with Path(place.config_dir, "open-webui.env").open("a") as file:
        file.write('DATABASE_URL="mysql://u:secretword@db/x"\n')
    with pytest.raises(BackupError, match="mysql") as caught:
        webui_backup.create(place, "manual")
    assert "secretword" not in str(caught.value)


class Server(webui_backup.Postgresql):
    """A database that is a file: its schemas are lines; ``refused`` is what it says to a load."""

    store = Path()
    refused = ""

    def schemas(self) -> dict[str, str]:
        """Return what each schema holds."""
        return dict(json.loads(self.store.read_text()))

    def keep(self, schemas: dict[str, str]) -> None:
        """Have these schemas."""
        self.store.write_text(json.dumps(schemas))

    def holds(self, schema: str) -> bool:
        return schema in self.schemas()

    def revision(self) -> str:
        return "0bd252b206fb"

    def size(self) -> int:
        return 1000

    def dump(self, path: Path) -> None:
        path.write_text(self.schemas()["public"])

    def load(self, path: Path, scratch: Path) -> None:
        assert scratch.is_dir()
        if self.refused:
            raise BackupError(self.refused)
        self.keep({"before_restore": self.schemas()["public"], "public": path.read_text()})

    def take_back(self) -> None:
        if self.holds("before_restore"):
            self.keep({"public": self.schemas()["before_restore"]})

    def ask(self, query: str) -> str:
        assert query.startswith("DROP SCHEMA IF EXISTS before_restore")
        self.keep({"public": self.schemas()["public"]})
        return ""


@pytest.fixture
def server(place: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Return the server of an Open WebUI that keeps accounts and chats there."""
    Path(place.data_dir, "webui.db").unlink()
    with Path(place.config_dir, "open-webui.env").open("a") as file:
        file.write('DATABASE_URL="postgresql+psycopg://u:secretword@db/x"\n')
    monkeypatch.setattr(Server, "store", tmp_path / "server.json")
    monkeypatch.setattr(webui_backup, "Postgresql", Server)
    monkeypatch.setattr(webui_backup, "judge_dump", lambda *_words: None)
    there = Server("postgresql://u:secretword@db/x")
    there.keep({"public": "chats of monday"})
    return there


def test_libpqs_programs_are_told_by_their_environment() -> None:
    base = webui_backup.Postgresql("postgresql+psycopg://u%40x:p%2Fw@db.lan:5433/chats?sslmode=verify-full", "ui")
    wanted = {"PGHOST": "db.lan", "PGPORT": "5433", "PGUSER": "u@x", "PGPASSWORD": "p/w", "PGDATABASE": "chats"}
    assert base.environment == {**wanted, "PGSSLMODE": "verify-full", "PGCONNECT_TIMEOUT": "10"}
    local = webui_backup.Postgresql("postgresql://ui@/ui?host=/run/postgresql&port=5433")
    assert (local.environment["PGHOST"], local.environment["PGPORT"]) == ("/run/postgresql", "5433")
    with pytest.raises(BackupError, match="mysql"):
        webui_backup.Postgresql("mysql://u:w@db/x")


def test_a_program_that_refuses_shows_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    base = webui_backup.Postgresql("postgresql://u:secretword@db/x")
    with pytest.raises(BackupError, match="false refused"):
        base.run(["false"])
    with pytest.raises(BackupError, match="postgresql-client"):
        base.run(["no-such-program"])
    assert "secretword" not in base.run(["ps", "axww", "-o", "args"])


def test_data_in_postgresql_are_saved_restored_and_proven(place: Settings, server: Server) -> None:
    made = webui_backup.create(place, "manual")
    manifest = webui_backup.unpack(Path(made["archive"]), None)
    assert {"database/postgresql.dump", "data/uploads/plan.txt"} <= set(manifest["files"])
    assert manifest["revision"] == "0bd252b206fb"
    server.keep({"public": "chats of tuesday"})
    webui_backup.restore(place, made["archive"])
    assert server.schemas() == {"before_restore": "chats of tuesday", "public": "chats of monday"}
    assert webui_backup.settle(place) is True
    assert server.schemas() == {"public": "chats of monday"}
    assert sorted(path.name for path in Path(place.data_dir).iterdir()) == ["uploads"]


def test_files_and_database_go_back_together(place: Settings, server: Server) -> None:
    made = webui_backup.create(place, "manual")
    server.keep({"public": "chats of tuesday"})
    Path(place.data_dir, "uploads/tuesday.txt").write_text("tuesday")
    webui_backup.restore(place, made["archive"])
    assert not Path(place.data_dir, "uploads/tuesday.txt").exists()
    assert webui_backup.undo(place) is True
    assert server.schemas() == {"public": "chats of tuesday"}
    assert Path(place.data_dir, "uploads/tuesday.txt").exists()
    assert not Path(place.data_dir, ".database.json").exists()


def test_a_database_that_refuses_the_data_leaves_all_as_it_was(
    place: Settings, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = webui_backup.create(place, "manual")
    Path(place.data_dir, "uploads/tuesday.txt").write_text("tuesday")
    monkeypatch.setattr(Server, "refused", "psql refused: disk full")
    with pytest.raises(BackupError, match="disk full"):
        webui_backup.restore(place, made["archive"])
    assert Path(place.data_dir, "uploads/tuesday.txt").exists()
    assert webui_backup.is_unsettled(place) is False
    assert server.schemas() == {"public": "chats of monday"}


def test_a_restore_that_was_cut_before_the_database_cant_be_kept(
    place: Settings, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = webui_backup.create(place, "manual")
    monkeypatch.setattr(Server, "load", lambda *_words: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        webui_backup.restore(place, made["archive"])
    with pytest.raises(BackupError, match="restore_unfinished=undone"):
        webui_backup.settle(place)
    assert webui_backup.undo(place) is True
    assert server.schemas() == {"public": "chats of monday"}


def test_an_archive_of_another_kind_of_database_is_refused(place: Settings, server: Server) -> None:
    made = webui_backup.create(place, "manual")
    Path(place.config_dir, "open-webui.env").write_text('PORT="1"\n')
    for act in (webui_backup.check, webui_backup.restore):
        with pytest.raises(
            BackupError, match="data of postgresql, and Open WebUI on this host keeps its own in sqlite"
        ):
            act(place, made["archive"])
    # Where all is to be as it was, its kind of database comes back too.
    webui_backup.restore(place, made["archive"], whole=True, any_version=True)
    assert "DATABASE_URL" in Path(place.config_dir, "open-webui.env").read_text()
    assert "before_restore" in server.schemas()


def test_a_copy_goes_to_another_folder(place: Settings, tmp_path: Path) -> None:
    away = tmp_path / "away"
    with pytest.raises(BackupError, match="Is it mounted"):
        webui_backup.create(replace(place, copy_to=str(away)), "manual")
    away.mkdir()
    time.sleep(1.1)
    made = Path(webui_backup.create(replace(place, copy_to=str(away)), "manual")["archive"])
    assert (away / made.name).read_bytes() == made.read_bytes()


def test_the_program_makes_a_backup_from_its_settings(place: Settings, tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({**place.__dict__, "user": ""}))
    command = [sys.executable, "-I", str(PROGRAM), str(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "-0.12.4-timer.tar.gz: Open WebUI 0.12.4, 6 files" in done.stdout
    Path(place.data_dir, "webui.db").write_bytes(b"SQLite format 3\0" + b"\xff" * 4096)
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr


def parameters(settings: Settings, action: str, **given: object) -> dict[str, object]:
    """Return the parameters of the module as Ansible hands them over."""
    common = {"reason": "manual", "plain_kept": False, "archive": None, "newest_of": "", "identity": ""}
    return {**settings.__dict__, **common, "whole": False, "any_version": False, "action": action, **given}


def test_check_mode_says_what_would_be_done_and_does_nothing(place: Settings) -> None:
    assert module.act(parameters(place, "create"), dry=True)["changed"] is True
    assert not Path(place.folder).exists()
    made = module.act(parameters(place, "create", reason="upgrade"), dry=False)
    before = sorted(str(path) for path in Path(place.data_dir).rglob("*"))
    foretold = module.act(parameters(place, "restore"), dry=True)
    assert (foretold["changed"], foretold["archive"]) == (True, made["archive"])
    assert module.act(parameters(place, "settle"), dry=True)["changed"] is False
    assert sorted(str(path) for path in Path(place.data_dir).rglob("*")) == before


def test_the_newest_archive_of_a_reason_is_found(place: Settings) -> None:
    made = module.act(parameters(place, "create", reason="upgrade"), dry=False)
    Path(place.folder, "open-webui-29991125T000000Z-0.12.4-timer.tar.gz").touch()
    judged = module.act(parameters(place, "check", newest_of="upgrade"), dry=False)
    assert (judged["changed"], judged["archive"]) == (False, made["archive"])
    with pytest.raises(BackupError, match="holds no backup rollback"):
        module.act(parameters(place, "check", newest_of="rollback"), dry=False)


@pytest.mark.skipif(shutil.which("age-keygen") is None, reason="age is not installed here")
def test_an_encrypted_archive_opens_with_the_key_alone(place: Settings) -> None:
    key = subprocess.run(["age-keygen"], capture_output=True, text=True, check=True).stdout
    recipient = next(word for word in key.split() if word.startswith("age1"))
    locked = replace(place, recipient=recipient)
    made = webui_backup.create(locked, "manual")
    assert names(place) == [Path(made["archive"]).name]
    assert made["archive"].endswith(".tar.gz.age")
    assert b"the plan" not in Path(made["archive"]).read_bytes()
    with pytest.raises(BackupError, match="restore_identity_file"):
        webui_backup.check(locked, made["archive"])
    other = subprocess.run(["age-keygen"], capture_output=True, text=True, check=True).stdout
    with pytest.raises(BackupError, match="age refused"):
        webui_backup.restore(locked, made["archive"], other)
    assert not webui_backup.is_unsettled(locked)
    webui_backup.restore(locked, made["archive"], key)
    assert not list(Path("/run").glob("open-webui-backup.*"))
