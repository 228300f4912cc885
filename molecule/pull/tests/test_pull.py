"""What people notice of a host that pulls: it follows the repository, runs what is signed, tells how it ended."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
VARIABLES: dict[str, Any] = yaml.safe_load((ROOT / "molecule/pull/vars.yml").read_text())
# The same roles as everywhere, and a file that shows which commit ran.
PLAYBOOK = """
- name: Pulled
  hosts: model_servers
  gather_facts: false
  roles:
    - role: selfhost.lmdeploy.mirrors
  tasks:
    - name: Show the commit
      ansible.builtin.copy:
        content: "{{ pulled_word }} on {{ inventory_hostname }}"
        dest: /etc/pulled
        mode: "0644"
"""
INVENTORY = {"model_servers": {"hosts": {"mol-pull": None, "elsewhere": {"ansible_host": "192.0.2.1"}}}}


class Repository:
    """The repository on the host, and the keys that sign its commits."""

    def __init__(self, host: Any) -> None:
        """Make keys, and a repository of this checkout."""
        self.host = host
        host.run_expect([0], "rm -rf /srv/work /srv/fleet.git /srv/keys && mkdir -p /srv/work /srv/keys")
        for name in ("right", "wrong"):
            host.run_expect([0], f"ssh-keygen -q -t ed25519 -N '' -C {name} -f /srv/keys/{name}")
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True, capture_output=True
        ).stdout
        present = b"\0".join(name for name in listed.split(b"\0") if name and (ROOT / name.decode()).exists())
        packed = subprocess.run(
            ["tar", "--null", "-T", "-", "-cz"], cwd=ROOT, input=present, check=True, capture_output=True
        ).stdout
        command = ["ssh", "-F", str(ROOT / ".lab/ssh/config"), "mol-pull", "tar -xz -C /srv/work"]
        subprocess.run(command, input=packed, check=True)
        self.write("inventories/pulled/hosts.yml", json.dumps(INVENTORY))
        self.write("pulled.yml", PLAYBOOK)
        self.git("init -q -b main . && git init -q --bare /srv/fleet.git")

    def write(self, name: str, content: str) -> None:
        """Write a file of the working tree."""
        path = f"/srv/work/{name}"
        self.host.run_expect([0], "mkdir -p $(dirname %s) && printf '%%s' %s > %s", path, content, path)

    def git(self, arguments: str) -> None:
        """Run git in the working tree."""
        identity = "-c user.name=Test -c user.email=test@example.org -c gpg.format=ssh"
        self.host.run_expect([0], f"cd /srv/work && git {identity} {arguments}")

    def commit(self, word: str, signed_by: str = "") -> str:
        """Commit and push a word; return the commit."""
        self.write("inventories/pulled/group_vars/all.yml", f"pulled_word: {word}\n")
        signature = f"-c user.signingkey=/srv/keys/{signed_by} commit -S" if signed_by else "commit"
        self.git("add -A")
        self.git(f"{signature} -q -m {word}")
        self.git("push -q --force /srv/fleet.git HEAD:main")
        return str(self.host.check_output("git -C /srv/work rev-parse HEAD"))

    def key(self, name: str) -> str:
        """Return a public key."""
        return str(self.host.check_output(f"cat /srv/keys/{name}.pub"))


@pytest.fixture(scope="module")
def repository(host: Any) -> Repository:
    """Return the repository with one commit."""
    return Repository(host)


def pull(host: Any) -> dict[str, Any]:
    """Start the service, wait for its end, and return what it tells of it."""
    host.run("systemctl start pull.service")
    told: dict[str, Any] = json.loads(host.check_output("cat /var/lib/pull/status.json"))
    failed = host.run("systemctl is-failed pull.service").stdout.strip() == "failed"
    assert failed == (told["code"] != 0), host.check_output("journalctl -u pull -n 30 -o cat")
    host.run("systemctl reset-failed pull.service")
    return told


def word(host: Any) -> str:
    """Return what the last commit that ran has written."""
    return str(host.check_output("cat /etc/pulled"))


def test_the_host_follows_the_repository(host: Any, repository: Repository) -> None:
    """The commit runs with our roles, on this host alone; a second run changes nothing; a new commit is taken."""
    commit = repository.commit("first")
    told = pull(host)
    assert told["code"] == 0, host.check_output("journalctl -u pull -n 60 -o cat")
    assert told["commit"] == commit
    assert told["changed"] >= 1
    assert word(host) == "first on mol-pull"
    assert pull(host)["changed"] == 0
    repository.commit("second")
    assert pull(host)["changed"] == 1
    assert word(host) == "second on mol-pull"


def test_only_signed_commits_run(host: Any, repository: Repository, play: Callable[..., Any]) -> None:
    """No signature and another's signature are refused before a file is laid out; the signer's own runs."""
    play("pull", **VARIABLES, pull_signers=[repository.key("right")]).changed()
    before = word(host)
    for signer in ("", "wrong"):
        commit = repository.commit(f"evil{signer}", signer)
        told = pull(host)
        assert told["code"] == 2
        assert f"commit {commit} of main is not signed by one of pull_signers" in told["reason"]
        assert word(host) == before
        host.run_expect([1], "grep -rq evil /var/lib/pull/checkout/inventories")
    repository.commit("signed", "right")
    assert pull(host)["code"] == 0
    assert word(host) == "signed on mol-pull"


def test_a_source_that_is_away_says_so(host: Any, repository: Repository) -> None:
    """Nothing runs, and the reason stands where people look."""
    assert repository
    host.run_expect([0], "mv /srv/fleet.git /srv/away.git")
    told = pull(host)
    host.run_expect([0], "mv /srv/away.git /srv/fleet.git")
    assert told["code"] == 2
    assert told["reason"].startswith("pull_source file:///srv/fleet.git does not give pull_revision main")


def test_ssh_with_a_key_and_a_known_host(host: Any, repository: Repository, play: Callable[..., Any]) -> None:
    """The key opens the repository and shows nowhere; another host key stops the run."""
    host.run_expect([0], "mkdir -p -m 700 /root/.ssh && cat /srv/keys/right.pub >> /root/.ssh/authorized_keys")
    secret = host.check_output("cat /srv/keys/right")
    known = host.check_output("ssh-keyscan -t ed25519 127.0.0.1 2>/dev/null")
    over = {**VARIABLES, "pull_source": "ssh://root@127.0.0.1/srv/fleet.git", "pull_ssh_key": secret}
    commit = repository.commit("ssh", "right")
    done = play("pull", **over, pull_ssh_known_hosts=known)
    assert done.changed() > 0
    assert secret.splitlines()[1] not in done.output
    told = pull(host)
    assert (told["code"], told["commit"]) == (0, commit), told
    assert host.file("/etc/pull/ssh-key").mode == 0o600
    assert host.file("/etc/pull").mode == 0o700
    other = known.rsplit(" ", 1)[0] + " " + repository.key("wrong").split()[1]
    play("pull", **over, pull_ssh_known_hosts=other).changed()
    told = pull(host)
    assert told["code"] == 2
    assert "Host key verification failed" in told["reason"]


def test_a_folder_is_a_source_too(host: Any, repository: Repository, play: Callable[..., Any]) -> None:
    """A mounted disk with the repository's files serves hosts that reach no git."""
    repository.commit("folder")
    play("pull", **{**VARIABLES, "pull_source": "/srv/work"}).changed()
    assert pull(host)["code"] == 0
    assert word(host) == "folder on mol-pull"


def test_what_can_not_work_is_refused(play: Callable[..., Any]) -> None:
    """Before anything changes, with the variable's name."""
    assert "pull_source is ftp://x" in play("pull", **{**VARIABLES, "pull_source": "ftp://x"}).message()
    assert "pull_ssh_known_hosts has 0 characters" in play("pull", **{**VARIABLES, "pull_source": "git@x:y"}).message()


def test_the_timer_spreads_a_fleet(host: Any) -> None:
    """It is enabled, differs from host to host, and starts one run at a time."""
    assert host.service("pull.timer").is_enabled
    assert host.check_output("systemctl show pull.timer -P RandomizedDelayUSec") == "1h"
    assert host.check_output("systemctl show pull.timer -P FixedRandomDelay") == "yes"
    assert host.check_output("systemctl show pull.service -P Type") == "oneshot"


def test_uninstall_leaves_what_was_made(host: Any, play: Callable[..., Any]) -> None:
    """Timer, secrets and environment go; what the runs made stays."""
    assert play("pull", "uninstall", **VARIABLES).changed() > 0
    assert not host.file("/etc/pull").exists
    assert not host.file("/opt/miniconda3/envs/ansible").exists
    assert host.file("/etc/pulled").exists
    assert play("pull", "uninstall", **VARIABLES).changed() == 0
