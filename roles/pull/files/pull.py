#!/usr/bin/python3
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Take the repository and run its playbook on this host: what pull.service starts.

Everything that it is told stands in systemd's credentials, written by the role pull. In order:

1. git fetches the revision into a repository without files; or a folder is copied.
2. Where signers are wanted, the commit must be signed by one of them. Nothing of it was written as a file before.
3. The files are laid out in /var/lib/pull/checkout, exactly those of the commit.
4. ansible-playbook runs with the repository's inventory, limited to this host, which it reaches without a connection.

How it ended stands in /var/lib/pull/status.json. Exit codes: 0 done, 2 the source could not be had or was refused (the
host is as it was), else ansible-playbook's own.

Standard library only, Python 3.10 or later.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STATE = Path("/var/lib/pull")
CHECKOUT = STATE / "checkout"
REPOSITORY = STATE / "repository.git"
STATUS = STATE / "status.json"
EXIT_SOURCE = 2
RECAP = re.compile(r"ok=(\d+) +changed=(\d+) +unreachable=(\d+) +failed=(\d+)")


class Refused(Exception):
    """The source can't be had, or must not be run. The text has cause and way out."""


class Git:
    """git with a configuration that depends on nobody: not root's, not the host's, not the repository's."""

    def __init__(self, settings: dict[str, Any], credentials: Path) -> None:
        """Prepare its environment."""
        ssh = ["ssh", "-F", "none", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes"]
        ssh += ["-o", f"UserKnownHostsFile={credentials}/known_hosts", "-o", "GlobalKnownHostsFile=/dev/null"]
        ssh += ["-o", "IdentitiesOnly=yes", "-o", "ConnectTimeout=20"]
        if settings["has_key"]:
            ssh += ["-i", f"{credentials}/ssh-key"]
        options = {
            "gpg.ssh.allowedSignersFile": f"{credentials}/allowed_signers",
            # A folder of another user is as good as any other source: it is read, and then judged.
            "safe.directory": "*",
            "core.hooksPath": "/dev/null",
            "protocol.ext.allow": "never",
        }
        self.environment = {
            **os.environ,
            **{str(name): str(value) for name, value in settings["environment"].items()},
            "LC_ALL": "C.UTF-8",
            "HOME": str(STATE),
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_SSH_COMMAND": " ".join(ssh),
            "GIT_CONFIG_COUNT": str(len(options)),
        }
        for number, (name, value) in enumerate(options.items()):
            self.environment |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": value}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run git on the repository; the caller looks at the exit code."""
        command = ["git", f"--git-dir={REPOSITORY}", *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)

    def need(self, why: str, *arguments: str) -> str:
        """Run git and return what it printed; a failure is refused with its last lines."""
        done = self.run(*arguments)
        if done.returncode != 0:
            said = " | ".join([line.strip() for line in done.stderr.splitlines() if line.strip()][-6:])
            message = f"{why}: {said}"
            raise Refused(message)
        return done.stdout.strip()


def from_git(settings: dict[str, Any], credentials: Path) -> str:
    """Lay out the files of the revision and return its commit."""
    git = Git(settings, credentials)
    source, revision = settings["source"], settings["revision"]
    if not (REPOSITORY / "HEAD").exists():
        REPOSITORY.mkdir(exist_ok=True)
        git.need("no repository could be made", "init", "--quiet", "--bare")
    fetch = ["fetch", "--quiet", "--no-tags", "--no-write-fetch-head", "--force", source]
    why = f"pull_source {source} does not give pull_revision {revision}"
    if re.fullmatch("[0-9a-f]{40}", revision):
        done = git.run(*fetch, f"{revision}:refs/pulled")
        # Not every server gives a bare commit; then one of its branches must have it.
        if done.returncode != 0:
            git.need(why, *fetch, "+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*")
            git.need(why, "update-ref", "refs/pulled", revision)
    else:
        git.need(why, *fetch, f"+{revision}:refs/pulled")
    commit = git.need(why, "rev-parse", "--verify", "refs/pulled^{commit}")
    if settings["signed"]:
        git.need(
            f"commit {commit} of {revision} is not signed by one of pull_signers, so it is not run",
            "verify-commit",
            commit,
        )
    CHECKOUT.mkdir(mode=0o700, exist_ok=True)
    tree = f"--work-tree={CHECKOUT}"
    git.need("the files could not be laid out", tree, "read-tree", commit)
    git.need("the files could not be laid out", tree, "checkout-index", "--all", "--force", "--quiet")
    git.need("old files could not be removed", tree, "clean", "-ffdxq", str(CHECKOUT))
    return commit


def from_folder(settings: dict[str, Any]) -> str:
    """Copy the folder."""
    source = Path(settings["source"])
    if not (source / settings["playbook"]).is_file():
        message = f"pull_source {source} has no {settings['playbook']} (pull_playbook): is it mounted?"
        raise Refused(message)
    shutil.rmtree(CHECKOUT, ignore_errors=True)
    shutil.copytree(source, CHECKOUT, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", ".cache", ".lab"))
    return ""


def play(settings: dict[str, Any], credentials: Path) -> tuple[int, dict[str, int]]:
    """Run the playbook; return its exit code and what it counted on this host."""
    for variable in ("inventory", "playbook"):
        if not (CHECKOUT / settings[variable]).exists():
            message = f"{settings['source']} has no {settings[variable]} (pull_{variable})"
            raise Refused(message)
    command = [settings["ansible"], settings["playbook"], "--inventory", settings["inventory"]]
    command += ["--inventory", f"{credentials}/inventory.json", "--limit", settings["host"], *settings["arguments"]]
    if settings["has_vault"]:
        command += ["--vault-password-file", f"{credentials}/vault-password"]
    environment = {
        **os.environ,
        **{str(name): str(value) for name, value in settings["environment"].items()},
        "HOME": str(STATE),
        "LC_ALL": "C.UTF-8",
        "ANSIBLE_HOME": "/var/cache/pull",
        "ANSIBLE_NOCOLOR": "1",
        "PYTHONUNBUFFERED": "1",
    }
    counted: dict[str, int] = {}
    with subprocess.Popen(
        command,
        cwd=CHECKOUT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as running:
        assert running.stdout is not None  # noqa: S101  # a pipe was asked for
        for line in running.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            if line.startswith(f"{settings['host']} ") and (match := RECAP.search(line)):
                names = ("ok", "changed", "unreachable", "failed")
                counted = dict(zip(names, map(int, match.groups()), strict=True))
    code = running.returncode
    if code == 0 and not counted:
        message = (
            f"{settings['playbook']} did nothing on '{settings['host']}' (pull_host): {settings['inventory']} has not "
            "this name in a group of the playbook"
        )
        raise Refused(message)
    return code, counted


def main() -> int:
    """Pull once and tell how it ended."""
    credentials = Path(os.environ["CREDENTIALS_DIRECTORY"])
    settings = json.loads((credentials / "settings.json").read_text(encoding="utf-8"))
    counted: dict[str, int] = {}
    began, commit, reason = time.time(), "", ""
    try:
        is_folder = settings["source"].startswith("/")
        commit = from_folder(settings) if is_folder else from_git(settings, credentials)
        sys.stdout.write(f"pull: {settings['source']} {commit[:12]}\n")
        code, counted = play(settings, credentials)
    except (Refused, OSError) as error:
        reason, code = str(error), EXIT_SOURCE
        sys.stderr.write(f"pull: {reason}\n")
    status = {"source": settings["source"], "commit": commit, "began": began, "seconds": round(time.time() - began, 1)}
    temporary = STATUS.with_suffix(".new")
    temporary.write_text(
        json.dumps({**status, "code": code, "reason": reason, **counted}, indent=1) + "\n", encoding="utf-8"
    )
    temporary.chmod(0o644)
    temporary.replace(STATUS)
    return code


if __name__ == "__main__":
    sys.exit(main())
