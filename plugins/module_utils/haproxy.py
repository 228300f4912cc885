# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""What HAProxy's runtime socket says of the engines behind a gateway. Standard library only, no Ansible."""

from __future__ import annotations

import csv
import re
import socket
from io import StringIO
from typing import Any

SOCKET = "/run/gateway/admin.sock"
REPLY_SECONDS = 10.0
# The backends of models; those of the interface are no engines.
BACKEND = "model_"
# Bits and values of `show servers state` (HAProxy's management guide).
FORCED_MAINTENANCE = 0x01
FORCED_DRAIN = 0x08
STOPPED = "0"


class SocketFault(Exception):
    """HAProxy does not answer, or refuses."""


def ask(path: str, command: str) -> str:
    """Return what HAProxy answers to a command."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(REPLY_SECONDS)
            connection.connect(path)
            connection.sendall(f"{command}\n".encode())
            pieces = []
            while piece := connection.recv(65536):
                pieces.append(piece)
    except OSError as error:
        message = f"HAProxy does not answer at {path}: {error}"
        raise SocketFault(message) from error
    return b"".join(pieces).decode(errors="replace").strip()


def servers(stat: str, state: str, name: str = "") -> list[dict[str, Any]]:
    """Return the engines of a name, or of a host's name, or all, from HAProxy's tables of figures and of states."""
    pattern = re.compile(rf"{re.escape(name)}(-\d+)?" if name else ".*")
    figures = {(row["pxname"], row["svname"]): row for row in csv.DictReader(StringIO(stat.removeprefix("# ")))}
    header, *lines = [line for line in state.splitlines() if " " in line]
    columns = header.removeprefix("# ").split()
    found = []
    for line in lines:
        row = dict(zip(columns, line.split(), strict=False))
        figure = figures.get((row["be_name"], row["srv_name"]))
        if figure is None or not row["be_name"].startswith(BACKEND) or not pattern.fullmatch(row["srv_name"]):
            continue
        found.append(
            {
                "backend": row["be_name"],
                "name": row["srv_name"],
                "is_drained": bool(int(row["srv_admin_state"]) & (FORCED_MAINTENANCE | FORCED_DRAIN)),
                "is_up": row["srv_op_state"] != STOPPED,
                "requests": int(figure["scur"] or 0) + int(figure["qcur"] or 0),
            }
        )
    return found
