#!/usr/bin/python3
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Backups of Open WebUI's data: make, check, restore. Standard library only.

The module webui_backup calls these functions, and the role backup puts this very file on the host, where a timer starts
it as `webui_backup SETTINGS.json`. What an archive holds:

    data/...         the data folder; databases are consistent copies, whatever is being written meanwhile
    database/...     pg_dump's copy, where Open WebUI keeps accounts and chats in PostgreSQL
    config/...       secret key, admin password and environment: what the data can't be read or run without
    system/...       the unit and its helper, by their full paths
    manifest.json    versions, and size and sha256 of every file; written last, so an archive that was cut has none
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import hashlib
import io
import json
import os
import pwd
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMAT = 1
MANIFEST = "manifest.json"
DATABASE = "webui.db"
NAME = re.compile(
    r"open-webui-(?P<moment>\d{8}T\d{6}Z)-(?P<version>[0-9A-Za-z.]+)-(?P<reason>[a-z]+)\.tar\.gz(?P<age>\.age)?"
)
SQLITE_HEADER = b"SQLite format 3\0"
# Beside a database, and nothing without it: its copy holds what they hold.
SQLITE_COMPANIONS = ("-wal", "-shm", "-journal")
# Models that Open WebUI fetched and can fetch again; a restore keeps those that are there.
FETCHED = ("cache/embedding/models", "cache/whisper/models")
# How long a database may be too busy to be copied.
PATIENCE_SECONDS = 60.0
# What a restore makes in the data folder, so that everything is moved within one file system.
NEW, OLD, COMPLETE = ".restore-new", ".restore-old", ".complete"
ASIDE = ".before-restore"
# Of a database that is no file: its copy in an archive, the schema that a restore puts aside, and what says so.
DUMP = "database/postgresql.dump"
BEFORE = "before_restore"
NOTE = ".database.json"
# Parameters of an address, and how libpq's programs are told; a password must not stand in their arguments.
LIBPQ = {
    "connect_timeout": "PGCONNECT_TIMEOUT",
    "host": "PGHOST",
    "options": "PGOPTIONS",
    "port": "PGPORT",
    "sslcert": "PGSSLCERT",
    "sslcrl": "PGSSLCRL",
    "sslkey": "PGSSLKEY",
    "sslmode": "PGSSLMODE",
    "sslrootcert": "PGSSLROOTCERT",
    "target_session_attrs": "PGTARGETSESSIONATTRS",
}
CHUNK_BYTES = 1 << 20
MANIFEST_BYTES_MAX = 256 << 20
# Room that stays free on the disk: a full one would stop the service that shares it.
SPARE_BYTES = 64 << 20


class BackupError(Exception):
    """What went wrong, in words for a person, with the way out."""


@dataclass(frozen=True)
class Settings:
    """What is backed up and where to; ``folder`` holds the archives."""

    folder: str
    data_dir: str
    config_dir: str
    prefix: str
    files: list[str] = field(default_factory=list)
    user: str = ""
    keep: int = 7
    recipient: str = ""
    copy_to: str = ""

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Read the settings that the role backup wrote."""
        given = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{item.name: given[item.name] for item in fields(cls) if item.name in given})


# ---------------------------------------------------------------------------------------
# What is there


def installed(prefix: str) -> tuple[str, str]:
    """Return version and release of the Open WebUI that an environment holds; empty where there is none."""
    folder = Path(prefix).resolve()
    try:
        marker = json.loads((folder / "release.json").read_text(encoding="utf-8"))
        return str(marker["packages"]["open-webui"]), str(marker["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", ""


def version_key(version: str) -> tuple[int, ...]:
    """Return a version in a form that sorts."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def archives(folder: Path) -> list[Path]:
    """List the archives of a folder, the newest first."""
    try:
        found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    return sorted(found, key=lambda path: path.name, reverse=True)


def data_files(data: Path) -> Iterator[tuple[str, Path]]:
    """Yield every file of the data folder with its name inside it; links are followed, each folder once."""
    seen: set[tuple[int, int]] = set()
    for top, folders, names in os.walk(data, followlinks=True):
        here = Path(top)
        inside = here.relative_to(data).as_posix()
        about = here.stat()
        if (about.st_dev, about.st_ino) in seen or inside in FETCHED:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        if here == data:
            folders[:] = [name for name in folders if name not in (NEW, OLD)]
        folders.sort()
        for name in sorted(names):
            path = here / name
            if path.is_file() and not is_companion(path):
                yield path.relative_to(data).as_posix(), path


def is_companion(path: Path) -> bool:
    """Tell whether a file belongs to a database beside it."""
    for ending in SQLITE_COMPANIONS:
        if path.name.endswith(ending) and is_database(path.with_name(path.name.removesuffix(ending))):
            return True
    return False


def is_database(path: Path) -> bool:
    """Tell whether a file is an SQLite database."""
    try:
        with path.open("rb") as file:
            return file.read(len(SQLITE_HEADER)) == SQLITE_HEADER
    except OSError:
        return False


def config_files(settings: Settings) -> Iterator[tuple[str, Path]]:
    """Yield the files of the configuration and of the unit with their names in the archive."""
    folder = Path(settings.config_dir)
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_file():
            yield f"config/{path.name}", path
    for name in settings.files:
        if Path(name).is_file():
            yield f"system{name}", Path(name)


def database_url(config_dir: Path) -> str:
    """Return the address of a database that is not in the data folder, as the environment names it, or nothing."""
    path = config_dir / "open-webui.env"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.search(r"^DATABASE_URL=[\"']?([^\"'\n]+)", text, re.MULTILINE)
    return "" if found is None or found[1].startswith("sqlite:") else found[1]


def has_data(settings: Settings) -> bool:
    """Tell whether there is anything to save."""
    url = database_url(Path(settings.config_dir))
    return Postgresql(url, settings.user).holds("public") if url else Path(settings.data_dir, DATABASE).is_file()


# ---------------------------------------------------------------------------------------
# A database


def copy_database(source: Path, target: Path, patience_seconds: float = PATIENCE_SECONDS) -> None:
    """Copy a database that may be written to meanwhile, and have SQLite judge the copy.

    Nothing is written beside the source, not even a lock file. Raises BackupError where the copy is not whole.
    """
    until = time.monotonic() + patience_seconds
    # Between two of its writers a database has a log or none: what failed a moment ago may go now.
    while fault := copy_live(source, target):
        target.unlink(missing_ok=True)
        if copy_resting(source, target):
            break
        if time.monotonic() > until:
            raise BackupError(f"{source} changes while it is copied, and SQLite can't open it: {fault}")
        time.sleep(0.1)
    try:
        with contextlib.closing(sqlite3.connect(target)) as copy:
            # One file, without a log beside it.
            copy.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.DatabaseError as fault:
        raise BackupError(f"The database {source} is damaged: {fault}") from None
    judge_database(target, str(source))


def copy_live(source: Path, target: Path) -> str:
    """Copy a database through SQLite; return why that can't be done now, or nothing."""
    with source.open("rb") as file:
        has_log = file.read(20)[18:] == b"\2\2"
    # A reader leaves no trace: a database with a log needs its log and the index, or makes them.
    if has_log and not all(Path(f"{source}{ending}").exists() for ending in ("-wal", "-shm")):
        return "it has no log"
    try:
        with (
            contextlib.closing(sqlite3.connect(f"{source.as_uri()}?mode=ro&readonly_shm=1", uri=True)) as live,
            contextlib.closing(sqlite3.connect(target)) as copy,
        ):
            live.backup(copy)
    except sqlite3.OperationalError as fault:
        # A process that ended left the index of its log, and only a writer could mend it.
        return str(fault)
    except sqlite3.DatabaseError as fault:
        raise BackupError(f"The database {source} is damaged: {fault}") from None
    return ""


def copy_resting(source: Path, target: Path) -> bool:
    """Copy a database with the log that a crash left; tell whether nobody wrote meanwhile, else there is no copy."""
    log, copied_log = Path(f"{source}-wal"), Path(f"{target}-wal")

    def state() -> list[tuple[int, int]]:
        return [(path.stat().st_size, path.stat().st_mtime_ns) for path in (source, log) if path.exists()]

    with contextlib.suppress(FileNotFoundError):
        before = state()
        shutil.copyfile(source, target)
        if log.exists():
            shutil.copyfile(log, copied_log)
        if before == state():
            return True
    target.unlink(missing_ok=True)
    copied_log.unlink(missing_ok=True)
    return False


def judge_database(path: Path, shown: str) -> None:
    """Raise BackupError where SQLite finds fault with a database."""
    try:
        with contextlib.closing(sqlite3.connect(path)) as copy:
            verdict = str(copy.execute("PRAGMA integrity_check(5)").fetchone()[0])
    except sqlite3.DatabaseError as fault:
        verdict = str(fault)
    if verdict != "ok":
        raise BackupError(f"The database {shown} is damaged: {verdict}")


def revision_of(path: Path) -> str:
    """Return the revision of the schema that alembic wrote into a database, or nothing."""
    try:
        with contextlib.closing(sqlite3.connect(path)) as copy:
            row = copy.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.DatabaseError:
        return ""
    return str(row[0]) if row else ""


# ---------------------------------------------------------------------------------------
# A database of PostgreSQL


class Postgresql:
    """Open WebUI's database in PostgreSQL, asked by PostgreSQL's own programs."""

    def __init__(self, url: str, user: str = "") -> None:
        """Take its address; root asks a server on the same host as ``user``, which that server knows by the socket."""
        self.url = url
        parts = urlsplit(url)
        if parts.scheme.partition("+")[0] not in ("postgresql", "postgres"):
            raise BackupError(
                f"Open WebUI keeps its accounts and chats in {parts.scheme}, and this program saves SQLite and "
                "PostgreSQL: save that database with its own tools"
            )
        given = {
            "PGHOST": parts.hostname or "",
            "PGPORT": str(parts.port or ""),
            "PGUSER": unquote(parts.username or ""),
            "PGPASSWORD": unquote(parts.password or ""),
            "PGDATABASE": unquote(parts.path[1:]),
            "PGCONNECT_TIMEOUT": "10",
            **{LIBPQ[name]: value for name, value in parse_qsl(parts.query) if name in LIBPQ},
        }
        self.user = ""
        if given["PGHOST"].startswith("/"):
            self.user = user if os.geteuid() == 0 else ""
            given["PGUSER"] = self.user or pwd.getpwuid(os.geteuid()).pw_name
        self.environment = {name: value for name, value in given.items() if value}

    def run(self, command: list[str], source: IO[bytes] | None = None, target: IO[bytes] | None = None) -> str:
        """Run one of PostgreSQL's programs; return what it printed, or raise BackupError with its last words."""
        account: dict[str, Any] = {"user": self.user, "group": self.user, "extra_groups": []} if self.user else {}
        try:
            done = subprocess.run(
                command,
                stdin=source or subprocess.DEVNULL,
                stdout=target or subprocess.PIPE,
                stderr=subprocess.PIPE,
                check=False,
                cwd="/",
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", **self.environment},
                **account,
            )
        except FileNotFoundError:
            raise BackupError(f"The program {command[0]} is missing: apt install postgresql-client") from None
        if done.returncode:
            words = done.stderr.decode(errors="replace").strip().splitlines()
            raise BackupError(f"{command[0]} refused: {' | '.join(words[-3:]) or done.returncode}")
        return (done.stdout or b"").decode(errors="replace").strip()

    def ask(self, query: str) -> str:
        """Return the answer to a query, as psql prints it without decoration."""
        return self.run(["psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", query])

    def holds(self, schema: str) -> bool:
        """Tell whether a schema holds what Open WebUI made."""
        return self.ask(f"SELECT to_regclass('{schema}.alembic_version') IS NOT NULL") == "t"

    def revision(self) -> str:
        """Return the revision of the schema that alembic wrote."""
        return self.ask("SELECT version_num FROM public.alembic_version")

    def size(self) -> int:
        """Return the bytes that the database takes on its server."""
        return int(self.ask("SELECT pg_database_size(current_database())"))

    def dump(self, path: Path) -> None:
        """Copy the database as it is at one moment, and have the copy judged."""
        with path.open("wb") as file:
            # Owners and rights are the host's own, and another host has others.
            self.run(
                ["pg_dump", "--format=custom", "--schema=public", "--no-owner", "--no-privileges"],
                target=file,
            )
        judge_dump(path, "that pg_dump made")

    def load(self, path: Path, scratch: Path) -> None:
        """Put a copy in the place of what is there, which stays aside, in one transaction: all of it or nothing."""
        script = scratch / "load.sql"
        with path.open("rb") as copy, script.open("wb") as file:
            file.write(f"BEGIN; ALTER SCHEMA public RENAME TO {BEFORE}; CREATE SCHEMA public;\n".encode())
            file.flush()
            # The copy comes in by a descriptor: the account that the server knows may not reach its folder.
            self.run(
                ["pg_restore", "--schema=public", "--no-owner", "--no-privileges", "--file=-"],
                source=copy,
                target=file,
            )
            file.write(b"\nCOMMIT;\n")
        with script.open("rb") as file:
            self.run(["psql", "-Xq", "-v", "ON_ERROR_STOP=1", "-o", "/dev/null", "-f", "-"], source=file)

    def take_back(self) -> None:
        """Put what a load put aside back in its place, where it did that."""
        if self.holds(BEFORE):
            self.ask(f"BEGIN; DROP SCHEMA public CASCADE; ALTER SCHEMA {BEFORE} RENAME TO public; COMMIT")


def judge_dump(path: Path, shown: str) -> None:
    """Raise BackupError where PostgreSQL can't read the list of what a copy holds."""
    try:
        done = subprocess.run(["pg_restore", "--list", str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BackupError("The program pg_restore is missing: apt install postgresql-client") from None
    if done.returncode or "alembic_version" not in done.stdout:
        raise BackupError(f"The copy of the database {shown} is damaged: {done.stderr.strip() or 'it holds no data'}")


# ---------------------------------------------------------------------------------------
# Making an archive


class Hashing:
    """A file that is read through, and known by its sha256 afterwards."""

    def __init__(self, file: IO[bytes]) -> None:
        """Read from this file."""
        self.file = file
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        data = self.file.read(size)
        self.digest.update(data)
        return data


class Archive:
    """An archive that is being written."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        """Add to this tar."""
        self.tar = tar
        self.files: dict[str, dict[str, Any]] = {}

    def add(self, name: str, path: Path) -> None:
        """Add a file as it is now; one that was removed since it was listed is no part of the backup."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return
        with file:
            about = os.fstat(file.fileno())
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.mode = about.st_size, int(about.st_mtime), 0o600
            reader = Hashing(file)
            self.tar.addfile(member, reader)
        self.files[name] = {"bytes": about.st_size, "sha256": reader.digest.hexdigest()}

    def close(self, about: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest, the archive's last file."""
        manifest = {**about, "files": self.files}
        content = json.dumps(manifest, indent=1, sort_keys=True).encode()
        member = tarfile.TarInfo(MANIFEST)
        member.size, member.mode = len(content), 0o600
        self.tar.addfile(member, io.BytesIO(content))
        return manifest


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Be the only one who changes the folder's archives; a second one is refused."""
    with (folder / ".lock").open("a") as handle:
        if os.geteuid() == 0:
            # The folder is the timer's, which must be able to open it too.
            os.fchown(handle.fileno(), folder.stat().st_uid, folder.stat().st_gid)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BackupError(f"Another backup is being made in {folder}: wait until it is done") from None
        # What a killed run left behind.
        for rest in folder.glob(".partial-*"):
            shutil.rmtree(rest, ignore_errors=True)
        yield


@contextlib.contextmanager
def disk_faults(folder: Path, way_out: str) -> Iterator[None]:
    """Turn a full disk into words for a person."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as fault:
        full = isinstance(fault, OSError) and fault.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "disk is full" in str(fault) or "disk I/O error" in str(fault):
            free = shutil.disk_usage(folder).free >> 20
            raise BackupError(f"The disk of {folder} is full ({free} MiB free). {way_out}") from None
        raise BackupError(f"{folder}: {fault}") from None


def refuse_small_disk(folder: Path, wanted: int, way_out: str) -> None:
    """Raise BackupError, before anything is written, where the disk has no room."""
    free = shutil.disk_usage(folder).free
    if free < wanted + SPARE_BYTES:
        raise BackupError(
            f"The disk of {folder} has no room: up to {(wanted + SPARE_BYTES) >> 20} MiB are needed, "
            f"{free >> 20} MiB are free. {way_out}"
        )


def create(settings: Settings, reason: str, *, plain_kept: bool = False) -> dict[str, Any]:
    """Make a backup; return ``archive`` (its path), ``plain`` (the same without encryption), ``removed``, ``manifest``.

    ``archive`` is empty where there is no data yet. With a recipient the archive is encrypted, and ``plain`` is there
    only if asked for: to go back without the key. Nothing half is ever under an archive's name.
    """
    data, folder = Path(settings.data_dir), Path(settings.folder)
    kept = "The older backups are as they were. Give backup_dir another disk, or lower backup_keep"
    if not has_data(settings):
        return {"archive": "", "plain": "", "removed": [], "manifest": {}}
    url = database_url(Path(settings.config_dir))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with alone(folder), disk_faults(folder, kept):
        bytes_wanted = sum(path.stat().st_size for _name, path in data_files(data) if path.exists())
        # Twice: the copy of the databases, and an encrypted archive beside the plain one.
        database_bytes = sum(path.stat().st_size for _name, path in data_files(data) if is_database(path))
        database_bytes += Postgresql(url, settings.user).size() if url else 0
        refuse_small_disk(folder, bytes_wanted * (2 if settings.recipient else 1) + database_bytes, kept)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as scratch:
            new, manifest = write_archive(settings, reason, Path(scratch))
            return publish(settings, new, manifest, plain_kept=plain_kept)


def write_archive(settings: Settings, reason: str, scratch: Path) -> tuple[Path, dict[str, Any]]:
    """Write an archive into a scratch folder; return it, under its name, and its manifest."""
    data = Path(settings.data_dir)
    version, release = installed(settings.prefix)
    moment = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    name = f"open-webui-{moment}-{version or 'unknown'}-{reason}.tar.gz"
    copy = scratch / "database"
    url = database_url(Path(settings.config_dir))
    # The main database first: a file that comes after it is one too many, never one too few.
    if url:
        base = Postgresql(url, settings.user)
        base.dump(copy)
        revision = base.revision()
    else:
        copy_database(data / DATABASE, copy)
        revision = revision_of(copy)
    about: dict[str, Any] = {
        "format": FORMAT,
        "created": moment,
        "host": socket.gethostname(),
        "reason": reason,
        "version": version,
        "release": release,
        "revision": revision,
    }
    path = scratch / name
    path.touch(mode=0o600)
    with path.open("wb") as file:
        # Level 6: most of it is pictures and documents, which no level makes smaller.
        with gzip.GzipFile("", "wb", 6, file) as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
            archive = Archive(tar)
            archive.add(DUMP if url else f"data/{DATABASE}", copy)
            for inside, source in data_files(data):
                if inside == DATABASE and not url:
                    continue
                if is_database(source):
                    copy.unlink()
                    copy_database(source, copy)
                    archive.add(f"data/{inside}", copy)
                else:
                    archive.add(f"data/{inside}", source)
            for inside, source in config_files(settings):
                archive.add(inside, source)
            manifest = archive.close(about)
        file.flush()
        os.fsync(file.fileno())
    return path, manifest


def publish(settings: Settings, new: Path, manifest: dict[str, Any], *, plain_kept: bool) -> dict[str, Any]:
    """Give a whole archive its name, encrypt and copy it as wanted, and remove the oldest ones."""
    folder = Path(settings.folder)
    plain = archive = folder / new.name
    if settings.recipient:
        archive = folder / f"{new.name}.age"
        encrypted = new.with_name(archive.name)
        age("--encrypt", "--recipient", settings.recipient, "--output", str(encrypted), str(new))
        encrypted.chmod(0o600)
        sync(encrypted)
        encrypted.replace(archive)
    if plain_kept or not settings.recipient:
        new.replace(plain)
    sync(folder)
    removed = rotate(folder, settings.keep)
    result = {
        "archive": str(archive),
        "plain": str(plain) if plain.exists() else "",
        "removed": removed,
        "manifest": summary(manifest),
    }
    if settings.copy_to:
        copy_archive(archive, Path(settings.copy_to), settings.keep)
    return result


def copy_archive(archive: Path, target: Path, keep: int) -> None:
    """Copy an archive to another folder, in one step, and remove the oldest ones there."""
    if not target.is_dir():
        raise BackupError(f"{archive} was made, but not copied: backup_copy_to {target} is no folder. Is it mounted?")
    part = target / f".partial-{archive.name}"
    try:
        shutil.copyfile(archive, part)
        part.chmod(0o600)
        sync(part)
        part.replace(target / archive.name)
    except OSError as fault:
        part.unlink(missing_ok=True)
        raise BackupError(f"{archive} was made, but not copied to backup_copy_to {target}: {fault.strerror}") from None
    rotate(target, keep)


def rotate(folder: Path, keep: int) -> list[str]:
    """Remove the oldest archives; the newest ``keep`` of each reason stay. Return those removed."""
    counts: dict[str, int] = {}
    removed = []
    for path in archives(folder):
        match = NAME.fullmatch(path.name)
        reason = match["reason"] if match else ""
        counts[reason] = counts.get(reason, 0) + 1
        if counts[reason] > keep:
            path.unlink()
            removed.append(str(path))
    return removed


def sync(path: Path) -> None:
    """Have a file or folder on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def age(*arguments: str) -> None:
    """Run age; raise BackupError with what it said."""
    try:
        done = subprocess.run(["age", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BackupError(
            "The program age is missing: apt install age, or run the role backup with backup_recipient"
        ) from None
    if done.returncode:
        raise BackupError(f"age refused: {done.stderr.strip() or done.returncode}")


def summary(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest with the number of its files in the place of their list."""
    return {
        **{key: value for key, value in manifest.items() if key != "files"},
        "files": len(manifest["files"]),
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
    }


# ---------------------------------------------------------------------------------------
# Reading an archive


@contextlib.contextmanager
def opened(archive: Path, identity: str, scratch: Path) -> Iterator[Path]:
    """Give the archive without its encryption; ``identity`` is age's secret key, which lies on no disk here."""
    if archive.suffix != ".age":
        yield archive
        return
    if not identity:
        raise BackupError(
            f"{archive} is encrypted: give restore_identity_file, the file of age's secret key on this controller"
        )
    run = Path("/run") if os.access("/run", os.W_OK) else scratch
    handle, key = tempfile.mkstemp(dir=run, prefix="open-webui-backup.")
    plain = scratch / "plain.tar.gz"
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(identity)
        age("--decrypt", "--identity", key, "--output", str(plain), str(archive))
        yield plain
    finally:
        Path(key).unlink()
        plain.unlink(missing_ok=True)


def unpack(archive: Path, target: Path | None) -> dict[str, Any]:
    """Read an archive whole and return its manifest; with ``target`` its files are written there.

    Raises BackupError where a byte is other than it was, a file is missing or too many, or a name leads elsewhere.
    """
    found: dict[str, dict[str, Any]] = {}
    manifest: dict[str, Any] = {}
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if not member.isfile() or path.is_absolute() or ".." in path.parts:
                    raise BackupError(f"{archive} holds {member.name!r}, which no backup holds")
                stream = tar.extractfile(member)
                if stream is None:
                    continue
                if member.name == MANIFEST:
                    manifest = json.loads(stream.read(MANIFEST_BYTES_MAX))
                else:
                    found[member.name] = take(stream, target / path if target else None)
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, ValueError) as fault:
        raise BackupError(f"{archive} is damaged or cut: {fault}. Nothing was changed; take another one") from None
    except OSError as fault:
        if fault.errno is not None:
            raise
        raise BackupError(f"{archive} is damaged or cut: {fault}. Nothing was changed; take another one") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BackupError(f"{archive} is cut, or no backup of Open WebUI: its manifest is not there")
    wrong = sorted(name for name in {*found, *manifest["files"]} if found.get(name) != manifest["files"].get(name))
    if wrong:
        raise BackupError(
            f"{archive} is damaged: {', '.join(wrong[:5])} differ from the manifest. "
            "Nothing was changed; take another one"
        )
    return manifest


def take(stream: IO[bytes], path: Path | None) -> dict[str, Any]:
    """Read a file of an archive, and write it where asked; return its size and sha256."""
    digest, size = hashlib.sha256(), 0
    with contextlib.ExitStack() as stack:
        file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = stack.enter_context(path.open("xb"))
        while data := stream.read(CHUNK_BYTES):
            digest.update(data)
            size += len(data)
            if file is not None:
                file.write(data)
    return {"bytes": size, "sha256": digest.hexdigest()}


def check(
    settings: Settings, archive: str, identity: str = "", *, whole: bool = False, any_version: bool = False
) -> dict[str, Any]:
    """Judge an archive whole, and whether the Open WebUI that is here can read its data; return what it holds."""
    path = chosen(settings, archive)
    folder = path.parent
    with (
        disk_faults(folder, "Nothing was changed"),
        tempfile.TemporaryDirectory(dir=folder, prefix=".check-") as scratch,
        opened(path, identity, Path(scratch)) as plain,
    ):
        manifest = unpack(plain, None)
    for name in wanted_config(manifest, whole=whole):
        config_path(settings, name)
    if not any_version:
        refuse_newer(settings, manifest)
    if not whole:
        refuse_other_database(settings, manifest, path)
    return {"archive": str(path), "manifest": summary(manifest)}


def refuse_other_database(settings: Settings, manifest: dict[str, Any], archive: Path) -> None:
    """Raise BackupError where the data are of one kind of database and the inventory wants another."""
    held = "postgresql" if DUMP in manifest["files"] else "sqlite"
    wanted = "postgresql" if database_url(Path(settings.config_dir)) else "sqlite"
    if held != wanted:
        raise BackupError(
            f"{archive} holds data of {held}, and Open WebUI on this host keeps its own in {wanted}: set "
            f"open_webui_database to {held}, run site.yml, and restore then"
        )


def refuse_newer(settings: Settings, manifest: dict[str, Any]) -> None:
    """Raise BackupError where the data are of a later Open WebUI than the one that would read them."""
    version, _release = installed(settings.prefix)
    if not version:
        raise BackupError(f"{settings.prefix} holds no Open WebUI: run site.yml on this host first")
    if version_key(manifest["version"]) > version_key(version):
        raise BackupError(
            f"The backup is of Open WebUI {manifest['version']}, and {version} is here, which can't read later data: "
            f"set open_webui_version to {manifest['version']} or later, run site.yml, and restore then"
        )


def chosen(settings: Settings, archive: str, reason: str = "") -> Path:
    """Return the archive that is meant: the one named, or the newest, of one reason if it is given."""
    if archive:
        if not Path(archive).is_file():
            raise BackupError(f"The archive {archive} is not there. Here are: {listing(settings)}")
        return Path(archive)
    found = [path for path in archives(Path(settings.folder)) if not reason or f"-{reason}.tar" in path.name]
    if not found:
        kind = f"made before an {reason}" if reason == "upgrade" else reason
        raise BackupError(f"{settings.folder} holds no backup {kind}".rstrip() + ", and none is named")
    return found[0]


def listing(settings: Settings) -> str:
    """Return the names of the archives for a message."""
    return ", ".join(str(path) for path in archives(Path(settings.folder))[:5]) or f"none in {settings.folder}"


# ---------------------------------------------------------------------------------------
# Restoring: what was there is put aside, and stays until somebody says that the new one answers


def restore(
    settings: Settings, archive: str, identity: str = "", *, whole: bool = False, any_version: bool = False
) -> dict[str, Any]:
    """Put an archive's data in the place of those that are there; the service must be stopped.

    Everything is read and judged before anything is touched. Secret key and admin password come back too; with
    ``whole`` also the environment and the unit, as they were on this host. ``any_version`` is for a caller who switches
    the program as well.
    """
    path, data, config = chosen(settings, archive), Path(settings.data_dir), Path(settings.config_dir)
    way_out = "Nothing was changed. Make room on it"
    if (data / OLD).exists():
        raise BackupError(
            f"An earlier restore was cut: {data / OLD} holds the data from before it. Say "
            "-e restore_unfinished=kept if they may go, or -e restore_unfinished=undone if they are to come back first"
        )
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = data / NEW
    shutil.rmtree(new, ignore_errors=True)
    try:
        with disk_faults(data, way_out):
            refuse_small_disk(data, path.stat().st_size, way_out)
            new.mkdir(mode=0o700)
            with opened(path, identity, new) as plain:
                manifest = unpack(plain, new)
            # Beside a database of PostgreSQL there may be no file at all.
            (new / "data").mkdir(mode=0o700, exist_ok=True)
        if not any_version:
            refuse_newer(settings, manifest)
        if not whole:
            refuse_other_database(settings, manifest, path)
        judge_data(new, manifest, path)
        # Where all is to be as it was, the environment that comes back names the database.
        url = database_url(new / "config" if whole else config) if DUMP in manifest["files"] else ""
        with disk_faults(data, way_out):
            keep_fetched(data, new / "data")
            own(new / "data", settings.user)
        config_new = {
            config_path(settings, name): (new / name).read_bytes() for name in wanted_config(manifest, whole=whole)
        }
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    put_aside_config(config, settings.files)
    swap(data, url)
    if url:
        try:
            Postgresql(url, settings.user).load(new / DUMP, new)
        except BackupError:
            undo(settings)
            raise
        note_of(data / OLD, url, loaded=True)
    for target, content in config_new.items():
        write_private(target, content, 0o600 if target.parent == config else 0o644)
    shutil.rmtree(new, ignore_errors=True)
    return {"archive": str(path), "manifest": summary(manifest)}


def judge_data(new: Path, manifest: dict[str, Any], archive: Path) -> None:
    """Raise BackupError where the databases of an unpacked archive are missing or damaged."""
    if DUMP in manifest["files"]:
        judge_dump(new / DUMP, f"in {archive}")
    elif f"data/{DATABASE}" not in manifest["files"]:
        raise BackupError(f"{archive} holds no {DATABASE}, so it is no backup of Open WebUI")
    for name in manifest["files"]:
        if name.startswith("data/") and is_database(new / name):
            judge_database(new / name, f"{name} of {archive}")


def wanted_config(manifest: dict[str, Any], *, whole: bool) -> list[str]:
    """Name the files beside the data that come back: the inventory says the rest, unless all is to be as it was."""
    secrets = ("config/secret-key", "config/admin-password", "config/admin.json")
    beside = [name for name in manifest["files"] if name != DUMP and not name.startswith("data/")]
    return [name for name in beside if whole or name in secrets]


def config_path(settings: Settings, name: str) -> Path:
    """Return where a file beside the data belongs; a path that the settings don't name is refused."""
    if name.startswith("config/"):
        return Path(settings.config_dir, PurePosixPath(name).name)
    path = name.removeprefix("system")
    if path not in settings.files:
        raise BackupError(f"The backup holds {path}, which is no file of this Open WebUI")
    return Path(path)


def keep_fetched(data: Path, new: Path) -> None:
    """Carry models that were fetched over to the new data, without copying them."""
    for name in FETCHED:
        if (data / name).is_dir() and not (new / name).exists():
            shutil.copytree(data / name, new / name, copy_function=os.link, symlinks=True)


def own(folder: Path, user: str) -> None:
    """Give a tree to the service's user, for it alone."""
    entry = pwd.getpwnam(user) if user else None
    for top, _folders, names in os.walk(folder):
        for path in (Path(top), *(Path(top, name) for name in names)):
            if path.is_symlink():
                # Only what was fetched has links, and what they lead to lies there too.
                continue
            path.chmod(0o700 if path.is_dir() else 0o600)
            if entry:
                os.chown(path, entry.pw_uid, entry.pw_gid)


def put_aside_config(config: Path, files: list[str]) -> None:
    """Keep the configuration as it is, for the way back."""
    aside = config / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    config.mkdir(mode=0o700, exist_ok=True)
    aside.mkdir(mode=0o700)
    for path in config.iterdir():
        if path.is_file():
            shutil.copy2(path, aside / path.name)
    for name in files:
        if Path(name).is_file():
            target = aside / "system" / name.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(name, target)


def note_of(old: Path, url: str = "", *, loaded: bool = False) -> dict[str, Any]:
    """Return what a restore does with a database of PostgreSQL, after noting it where an address is given."""
    path = old / NOTE
    if url:
        write_private(path, json.dumps({"url": url, "loaded": loaded}).encode(), 0o600)
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def swap(data: Path, url: str) -> None:
    """Move what is in the data folder aside, then the new data in: renames within one file system."""
    old, new = data / OLD, data / NEW / "data"
    old.mkdir(mode=0o700)
    # Before anything moves, so that whoever finds a restore that was cut knows of the database.
    note_of(old, url)
    for path in list(data.iterdir()):
        if path.name not in (OLD, NEW):
            path.replace(old / path.name)
    # From here on what is in the data folder is new, and may be removed to go back.
    (old / COMPLETE).touch()
    sync(old)
    for path in list(new.iterdir()):
        path.replace(data / path.name)
    sync(data)


def write_private(path: Path, content: bytes, mode: int) -> None:
    """Replace a file in one step, never readable by more than it may be."""
    if path.exists():
        mode = path.stat().st_mode & 0o777
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    Path(name).chmod(mode)
    Path(name).replace(path)


def is_unsettled(settings: Settings) -> bool:
    """Tell whether a restore waits for its word: settled or undone."""
    return (Path(settings.data_dir) / OLD).exists()


def undo(settings: Settings) -> bool:
    """Put back what a restore put aside; tell whether there was anything."""
    data, config = Path(settings.data_dir), Path(settings.config_dir)
    old, aside = data / OLD, config / ASIDE
    shutil.rmtree(data / NEW, ignore_errors=True)
    if not old.exists():
        return False
    if note := note_of(old):
        Postgresql(note["url"], settings.user).take_back()
        (old / NOTE).unlink()
    if (old / COMPLETE).exists():
        for path in list(data.iterdir()):
            if path.name != OLD:
                remove(path)
        (old / COMPLETE).unlink()
        # No more: a second call after a cut must not take what came back for new.
        sync(old)
    for path in list(old.iterdir()):
        path.replace(data / path.name)
    old.rmdir()
    if aside.is_dir():
        for path in aside.iterdir():
            if path.is_file():
                write_private(config / path.name, path.read_bytes(), 0o600)
        for name in settings.files:
            kept = aside / "system" / name.lstrip("/")
            if kept.is_file():
                write_private(Path(name), kept.read_bytes(), 0o644)
        shutil.rmtree(aside)
    return True


def settle(settings: Settings) -> bool:
    """Remove what a restore put aside; tell whether there was anything."""
    old, aside = Path(settings.data_dir) / OLD, Path(settings.config_dir) / ASIDE
    found = old.exists() or aside.exists()
    if note := note_of(old):
        base = Postgresql(note["url"], settings.user)
        if not note["loaded"] and not base.holds(BEFORE):
            raise BackupError(
                "The restore was cut before the database took its data, so files and database are of two times: say "
                "-e restore_unfinished=undone, and restore again"
            )
        note_of(old, note["url"], loaded=True)
        base.ask(f"DROP SCHEMA IF EXISTS {BEFORE} CASCADE")
    if old.exists():
        shutil.rmtree(old)
    if aside.exists():
        shutil.rmtree(aside)
    return found


def remove(path: Path) -> None:
    """Remove a file or a whole folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


# ---------------------------------------------------------------------------------------


def main() -> int:
    """Make one backup as a settings file says; what the timer starts."""
    if len(sys.argv) != 2:
        sys.stderr.write(f"use: {sys.argv[0]} SETTINGS.json\n")
        return 2
    os.umask(0o077)
    try:
        made = create(Settings.read(Path(sys.argv[1])), "timer")
    except BackupError as fault:
        sys.stderr.write(f"{fault}\n")
        return 1
    if made["archive"]:
        about = made["manifest"]
        sys.stdout.write(f"{made['archive']}: Open WebUI {about['version']}, {about['files']} files\n")
    else:
        sys.stdout.write("Open WebUI has no data yet\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
