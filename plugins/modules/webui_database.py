#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Have the PostgreSQL database that Open WebUI keeps its accounts and chats in."""

from __future__ import annotations

DOCUMENTATION = r"""
module: webui_database
short_description: Have the PostgreSQL database of Open WebUI
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Without O(url), has an account and a database in the server that the distribution runs on this host. The account is
    known by the socket, so there is no password. The backup's account may read what is in the database, and nobody else
    comes in.
  - With O(url), asks that server whether the account owns its database, which backups need to put one back.
  - Refuses to begin with an empty database where O(data_dir) holds accounts and chats in SQLite.
options:
  url:
    description: Address of a database on another server, as C(postgresql://USER:PASSWORD@HOST:5432/DATABASE).
    type: str
    default: ''
  state:
    description: Whether account and database are there. V(absent) removes what people made, on this host alone.
    type: str
    choices: [present, absent]
    default: present
  data_dir:
    description: Folder of Open WebUI's data.
    type: path
    default: /var/lib/open-webui/data
  user:
    description: The system's account of Open WebUI, whose name account and database have too.
    type: str
    default: open-webui
  backup_user:
    description: The system's account that makes backups.
    type: str
    default: open-webui-backup
attributes:
  check_mode:
    description: Says whether account or database would be made or removed.
    support: full
  diff_mode:
    description: Shows no difference.
    support: none
"""

EXAMPLES = r"""
- name: Have the database on this host
  selfhost.lmdeploy.webui_database:
  register: database
"""

RETURN = r"""
url:
  description: Address of the database on this host. Empty with O(url).
  returned: when O(state=present)
  type: str
  sample: postgresql://open-webui@/open-webui?host=/run/postgresql&port=5432
made:
  description: What was made or removed.
  returned: success
  type: list
  elements: str
  sample: [role open-webui, role open-webui-backup, database open-webui]
"""

import shutil
import subprocess
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.webui_backup import DATABASE, BackupError, Postgresql

SOCKETS = "/run/postgresql"
SERVER = "postgres"
DEFAULT_PORT = 5432


def address(name: str, port: int) -> str:
    """Return the address of a database on this host."""
    return f"postgresql://{name}@/{name}?host={SOCKETS}&port={port}"


def cluster_of(listing: str) -> tuple[str, int, bool] | None:
    """Return version, port and whether it runs of the cluster to take, out of the lines of pg_lsclusters.

    That is `main`, the distribution's own; of several the newest.
    """
    rows = [line.split() for line in listing.splitlines() if len(line.split()) >= 4]
    rows = [row for row in rows if row[1] == "main"]
    if not rows:
        return None
    version, _name, port, status = max(rows, key=lambda row: float(row[0]))[:4]
    return version, int(port), status.startswith("online")


def statements(user: str, backup_user: str, there: set[str]) -> list[tuple[str, str, str]]:
    """Return what makes the missing parts: what it makes, the database to say it in, and the SQL."""
    made = []
    for role in (user, backup_user):
        if f"role {role}" not in there:
            made.append((f"role {role}", SERVER, f'CREATE ROLE "{role}" LOGIN'))
    if f"database {user}" not in there:
        # Whatever language the host speaks.
        create = f'CREATE DATABASE "{user}" OWNER "{user}" TEMPLATE template0 ENCODING \'UTF8\''
        made.append((f"database {user}", SERVER, create))
    if f"rights {user}" not in there:
        schema = f'ALTER SCHEMA public OWNER TO "{user}"; GRANT USAGE ON SCHEMA public TO "{backup_user}"'
        close = f'REVOKE ALL ON DATABASE "{user}" FROM PUBLIC; GRANT CONNECT ON DATABASE "{user}" TO "{backup_user}"'
        kinds = {"TABLES": "SELECT", "SEQUENCES": "SELECT", "SCHEMAS": "USAGE"}
        # For what Open WebUI, or a restore, makes later on too.
        rights = [
            f'ALTER DEFAULT PRIVILEGES FOR ROLE "{user}" GRANT {right} ON {kind} TO "{backup_user}"'
            for kind, right in kinds.items()
        ]
        # Its last word is what is asked for the next time.
        made.append((f"rights {user}", user, "; ".join([schema, *rights, close])))
    return made


class Server:
    """The distribution's server on this host."""

    def __init__(self) -> None:
        """Find its cluster; raise BackupError where there is none."""
        listing = subprocess.run(["pg_lsclusters", "--no-header"], capture_output=True, text=True, check=False)
        found = cluster_of(listing.stdout)
        if found is None:
            raise BackupError(
                "PostgreSQL is installed, and has no cluster main: pg_createcluster VERSION main --start makes one"
            )
        self.version, self.port, self.is_running = found

    def start(self) -> None:
        """Start the cluster."""
        unit = f"postgresql@{self.version}-main.service"
        done = subprocess.run(["systemctl", "start", unit], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BackupError(f"{unit} does not start: {done.stderr.strip()} journalctl -u {unit} says more")

    def ask(self, sql: str, database: str = SERVER) -> str:
        """Return the answer to SQL, asked as the server's own account."""
        url = f"postgresql://{SERVER}@/{database}?host={SOCKETS}&port={self.port}"
        return Postgresql(url, SERVER).ask(sql)

    def parts(self, user: str, backup_user: str) -> set[str]:
        """Return which of account, database and rights are there."""
        there = {f"role {name}" for name in self.ask("SELECT rolname FROM pg_roles").splitlines()}
        for line in self.ask("SELECT datname, datacl FROM pg_database").splitlines():
            name, _bar, rights = line.partition("|")
            there |= {f"database {name}", *([f"rights {name}"] if backup_user in rights else [])}
        return there & {f"role {user}", f"role {backup_user}", f"database {user}", f"rights {user}"}


def have_local(params: dict[str, Any], *, dry: bool) -> dict[str, Any]:
    """Have account, database and rights on this host."""
    user, backup_user = params["user"], params["backup_user"]
    if dry and shutil.which("pg_lsclusters") is None:
        made = [what for what, _database, _sql in statements(user, backup_user, set())]
        return {"changed": True, "url": address(user, DEFAULT_PORT), "made": made}
    server = Server()
    made = [] if server.is_running else [f"a running server {server.version}"]
    if made and dry:
        return {"changed": True, "url": address(user, server.port), "made": made}
    if made:
        server.start()
    for what, database, sql in statements(user, backup_user, server.parts(user, backup_user)):
        made.append(what)
        if not dry:
            server.ask(sql, database)
    url = address(user, server.port)
    if not (dry and made):
        refuse_to_begin_anew(Postgresql(url, user), Path(params["data_dir"]))
    return {"changed": bool(made), "url": url, "made": made}


def have_remote(params: dict[str, Any], *, dry: bool) -> dict[str, Any]:
    """See that a database elsewhere can be worked with."""
    if dry and shutil.which("psql") is None:
        return {"changed": False, "url": "", "made": []}
    base = Postgresql(params["url"], params["user"])
    owns = base.ask(
        "SELECT pg_has_role(datdba, 'USAGE') AND pg_has_role(nspowner, 'USAGE') FROM pg_database, pg_namespace "
        "WHERE datname = current_database() AND nspname = 'public'"
    )
    if owns != "t":
        names = base.environment
        database, account = names.get("PGDATABASE", ""), names.get("PGUSER", "")
        raise BackupError(
            f"The account {account} of open_webui_database_url does not own the database {database} on "
            f"{names.get('PGHOST', '')}, which a restore needs. There, as an administrator of that server: "
            f'ALTER DATABASE "{database}" OWNER TO "{account}"; and in it ALTER SCHEMA public OWNER TO "{account}"'
        )
    refuse_to_begin_anew(base, Path(params["data_dir"]))
    return {"changed": False, "url": "", "made": []}


def refuse_to_begin_anew(base: Postgresql, data: Path) -> None:
    """Raise BackupError where accounts and chats would seem to be lost."""
    file = data / DATABASE
    if file.is_file() and not base.holds("public"):
        raise BackupError(
            f"open_webui_database is postgresql, whose database is empty, and accounts and chats are in {file}: they "
            f"don't move by themselves. To keep them, set open_webui_database to sqlite; to begin anew, move {file} off"
        )


def remove_local(params: dict[str, Any], *, dry: bool) -> dict[str, Any]:
    """Remove account and database from this host; the server itself stays, since others may use it."""
    user, backup_user = params["user"], params["backup_user"]
    if shutil.which("pg_lsclusters") is None:
        return {"changed": False, "made": []}
    server = Server()
    if not server.is_running and dry:
        return {"changed": True, "made": [f"database {user}"]}
    if not server.is_running:
        server.start()
    there = server.parts(user, backup_user)
    removals = {
        f"database {user}": f'DROP DATABASE "{user}" WITH (FORCE)',
        f"role {backup_user}": f'DROP ROLE "{backup_user}"',
        f"role {user}": f'DROP ROLE "{user}"',
    }
    made = [what for what in removals if what in there]
    for what in made if not dry else []:
        server.ask(removals[what])
    return {"changed": bool(made), "made": made}


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "default": "", "no_log": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "data_dir": {"type": "path", "default": "/var/lib/open-webui/data"},
            "user": {"type": "str", "default": "open-webui"},
            "backup_user": {"type": "str", "default": "open-webui-backup"},
        },
        supports_check_mode=True,
    )
    try:
        if module.params["state"] == "absent":
            result = remove_local(module.params, dry=module.check_mode)
        elif module.params["url"]:
            result = have_remote(module.params, dry=module.check_mode)
        else:
            result = have_local(module.params, dry=module.check_mode)
    except (BackupError, OSError) as fault:
        module.fail_json(msg=str(fault))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
