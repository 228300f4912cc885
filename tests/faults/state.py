"""Prints what a host is as JSON: files, units, packages, engines behind its gateway, and what its model answers.

Runs on the host with its own Python: its text is given to `python3 -`. Nothing is changed.
"""

from __future__ import annotations

import grp
import hashlib
import json
import os
import pwd
import re
import socket
import stat
import subprocess
import sys
import urllib.request
from pathlib import Path

# What is gone with the next boot, what only records, and what tools remember of their own runs.
PASSED_OVER = (
    "/dev",
    "/proc",
    "/run",
    "/sys",
    "/tmp",
    "/var/tmp",
    "/var/log",
    "/var/cache/apt",
    "/var/cache/debconf",
    "/var/cache/ldconfig",
    "/var/lib/apt",
    "/var/lib/dpkg",
    "/var/lib/systemd",
    "/root/.ansible",
)
GATEWAY = "/run/gateway/admin.sock"
# A bit of the administrative state in `show servers state`: maintenance or drain, asked for by somebody.
HELD = 0x01 | 0x08
# Long, since the machine of a test may be busy with much else; who refuses is not asked again.
ANSWER_SECONDS = 60
# Generated, and another on every host; the rest of the file is compared.
SECRETS = {"/etc/gateway/haproxy.cfg": re.compile(rb"Bearer \S+")}
QUESTION = "What is the capital of France? Answer in one sentence."


def name_of(number: int, group: bool = False) -> str:
    """Return the name of a user or group: numbers depend on the order in which they were made."""
    try:
        return grp.getgrgid(number).gr_name if group else pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def content(path: str, about: os.stat_result) -> str:
    """Return what is compared of a path's content."""
    if stat.S_ISLNK(about.st_mode):
        return str(Path(path).readlink())
    if not stat.S_ISREG(about.st_mode):
        return ""
    with open(path, "rb") as stream:  # noqa: PTH123  # twice as quick for 30,000 files
        read = stream.read()
    secret = SECRETS.get(path)
    return hashlib.sha256(secret.sub(b"", read) if secret else read).hexdigest()


def files() -> dict[str, list[str]]:
    """Return kind and mode, owner, group and content of every path of the root file system."""
    found = {}
    device = os.lstat("/").st_dev
    todo = ["/"]
    while todo:
        folder = todo.pop()
        for entry in os.scandir(folder):
            if entry.path in PASSED_OVER or entry.name == "__pycache__":
                continue
            try:
                about = entry.stat(follow_symlinks=False)
                found[entry.path] = [
                    oct(about.st_mode),
                    name_of(about.st_uid),
                    name_of(about.st_gid, group=True),
                    content(entry.path, about),
                ]
            except FileNotFoundError:
                continue
            if entry.is_dir(follow_symlinks=False) and about.st_dev == device:
                todo.append(entry.path)
    return found


def printed(*command: str) -> list[str]:
    """Return the lines that a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()


def units() -> dict[str, str]:
    """Return whether units start at boot, and which ones run or failed."""
    types = "--type=service,timer,socket,path"
    found = {}
    for line in printed("systemctl", "list-unit-files", types, "--no-legend", "--plain"):
        words = line.split()
        found[words[0]] = words[1]
    for line in printed("systemctl", "list-units", types, "--no-legend", "--plain", "--state=active,failed,activating"):
        words = line.split()
        found[words[0]] = f"{found.get(words[0], '')} {words[2]}".strip()
    return found


def servers() -> dict[str, str]:
    """Return how the gateway finds its engines: up, down or held back."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(GATEWAY)
            connection.sendall(b"show servers state\n")
            text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    except OSError:
        return {}
    _version, header, *lines = text.splitlines()
    columns = header.removeprefix("# ").split()
    rows = [dict(zip(columns, line.split(), strict=False)) for line in lines if line]
    found = {}
    for row in rows:
        if row["be_name"].startswith("model_"):
            word = "up" if row["srv_op_state"] != "0" else "down"
            found[row["srv_name"]] = "held back" if int(row["srv_admin_state"]) & HELD else word
    return found


def answer(url: str, key_file: str, model: str) -> str:
    """Return how the model answers the question, or why it does not."""
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 32, "temperature": 0}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        key = Path(key_file).read_text(encoding="ascii").split()[0]
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)  # noqa: S310  # an address on loopback
        with opener.open(request, timeout=ANSWER_SECONDS) as stream:
            return str(json.load(stream)["choices"][0]["message"]["content"])
    except (OSError, ValueError, LookupError) as error:
        return f"no answer: {error!r}"


def main() -> None:
    """Print one JSON object. Arguments: address, key's file, model; `answer` or `servers` for that alone."""
    only = sys.argv[4:]
    told: dict[str, object] = {}
    if not only:
        shown = "--showformat=${Package} ${Version} ${db:Status-Status}\n"
        accounts = sorted(
            [
                *(f"user {entry.pw_name}" for entry in pwd.getpwall()),
                *(f"group {entry.gr_name}" for entry in grp.getgrall()),
            ]
        )
        told.update(
            files=files(), units=units(), packages=sorted(printed("dpkg-query", "--show", shown)), accounts=accounts
        )
    if only != ["answer"]:
        told["servers"] = servers()
    if only != ["servers"]:
        told["answer"] = answer(*sys.argv[1:4])
    print(json.dumps(told))


if __name__ == "__main__":
    main()
