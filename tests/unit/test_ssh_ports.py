"""The module ssh_ports: no way in is missed."""

from __future__ import annotations

from pathlib import Path

from ansible_collections.selfhost.lmdeploy.plugins.modules.ssh_ports import connection_port, listening_ports

SOCKETS = """\
LISTEN 0      128    0.0.0.0:22   0.0.0.0:*    users:(("sshd",pid=44,fd=3))
LISTEN 0      128       [::]:2222    [::]:*    users:(("sshd",pid=44,fd=4))
LISTEN 0      5      127.0.0.1:8080 0.0.0.0:*  users:(("python",pid=7,fd=3))
"""


def process(proc: Path, pid: int, parent: int, environ: bytes = b"") -> None:
    """Add a process."""
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "environ").write_bytes(environ)
    (proc / str(pid) / "stat").write_text(f"{pid} (a ) name) S {parent} 1 1", encoding="utf-8")


def test_sshd_is_found_wherever_it_listens() -> None:
    assert listening_ports(SOCKETS, "") == {22, 2222}


def test_systemd_listens_for_it() -> None:
    assert listening_ports("", "[::]:22 (Stream)\n0.0.0.0:2200 (Stream)\n") == {22, 2200}
    assert listening_ports("", "/run/ssh.socket (Stream)\n") == set()


def test_the_connection_is_found_above_sudo(tmp_path: Path) -> None:
    process(tmp_path, 10, 1, b"")
    process(tmp_path, 11, 10, b"A=1\0SSH_CONNECTION=10.0.0.1 5000 10.0.0.2 2022\0")
    process(tmp_path, 12, 11, b"SUDO_USER=someone\0")
    assert connection_port(tmp_path, 12) == 2022
    assert connection_port(tmp_path, 10) is None
