"""What people notice of conda on a host: it answers, nobody's files changed, and no fault leaves half of it behind."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

PREFIX = "/opt/miniconda3"


@pytest.fixture
def visitor(host: Any) -> str:
    """Have an ordinary person on the host."""
    host.run_expect([0, 9], "useradd --create-home --shell /bin/bash visitor")
    return "visitor"


@pytest.fixture
def bad_installer(host: Any) -> dict[str, str]:
    """Have an installer on the host that breaks off halfway."""
    text = (
        '#!/bin/sh\nfor last in "$@"; do :; done\nmkdir -p "$last/conda-meta"\necho "no space left for pkgs"\nexit 3\n'
    )
    host.run_expect([0], "printf %s " + "'" + text.replace("'", "'\\''") + "' > /root/bad.sh")
    return {
        "miniconda_installer_url": "file:///root/bad.sh",
        "miniconda_installer_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def test_conda_answers(host: Any) -> None:
    """The installation works and is the pinned one."""
    assert host.check_output(f"{PREFIX}/bin/conda --version").startswith("conda 26.")
    assert host.check_output(f"{PREFIX}/bin/python --version").startswith("Python 3.11.")
    assert host.file(PREFIX).mode == 0o755


def test_people_have_conda_at_login(host: Any, visitor: str) -> None:
    """A person who logs in can call and activate conda, and nobody's own shell files were touched."""
    assert host.check_output(f"su - {visitor} -c 'conda --version'").startswith("conda 26.")
    inside = host.check_output(f"su - {visitor} -c 'conda activate base && command -v python'")
    assert inside == f"{PREFIX}/bin/python"
    touched = host.run("grep -l conda /root/.bashrc /root/.profile /home/*/.bashrc /etc/skel/.bashrc /etc/bash.bashrc")
    assert touched.stdout == ""


def test_nothing_is_left_over(host: Any) -> None:
    """The installer is gone, and no terms of service were accepted on the way."""
    assert host.check_output("find /tmp /root /opt /var/tmp -name '*iniconda*.sh' -o -name '*.installing'") == ""
    assert not host.file(f"{PREFIX}/conda-meta/tos").exists
    assert host.check_output("find / -xdev -type d -path '*conda/tos'") == ""


def test_a_wrong_sha256_installs_nothing(host: Any, play: Callable[..., Any]) -> None:
    """The message names what was wanted and what came; the file and the prefix are not there."""
    wrong = play("miniconda", miniconda_prefix="/opt/wrong", miniconda_installer_sha256="0" * 64).message()
    assert "0" * 64 in wrong
    assert "The file was removed and nothing was installed" in wrong
    assert not host.file("/opt/wrong").exists
    test_nothing_is_left_over(host)


def test_an_unknown_installer_is_refused_at_once(play: Callable[..., Any]) -> None:
    """Without a known SHA-256 the variable to set is named."""
    sha256 = "{{ __miniconda_sha256[miniconda_installer] | default('') }}"
    name = "Miniconda3-py311_1.2.3-4-Linux-x86_64.sh"
    message = play("miniconda", miniconda_installer=name, miniconda_installer_sha256=sha256).message()
    assert "miniconda_installer_sha256 is ''" in message
    assert name in message


def test_a_failing_installer_leaves_nothing(host: Any, play: Callable[..., Any], bad_installer: dict[str, str]) -> None:
    """Its last words are in the message, and what it had begun is gone."""
    message = play("miniconda", miniconda_prefix="/opt/bad", **bad_installer).message()
    assert "The installer failed (3)" in message
    assert "no space left for pkgs" in message
    assert not host.file("/opt/bad").exists
    assert not host.file("/opt/.bad.installing").exists


def test_a_missing_installer_is_named(play: Callable[..., Any]) -> None:
    """An address without a file ends in one message with that address."""
    message = play("miniconda", miniconda_prefix="/opt/none", miniconda_installer_url="file:///nowhere.sh").message()
    assert "file:///nowhere.sh can't be fetched" in message


def test_a_damaged_installation_is_repaired(host: Any, play: Callable[..., Any]) -> None:
    """conda comes back, and what people keep in the installation stays."""
    host.run_expect([0], f"mkdir -p {PREFIX}/envs/mine && touch {PREFIX}/envs/mine/kept && rm {PREFIX}/bin/conda")
    assert play("miniconda").changed() == 1
    assert host.check_output(f"{PREFIX}/bin/conda --version").startswith("conda 26.")
    assert host.file(f"{PREFIX}/envs/mine/kept").exists
    host.run_expect([0], f"rm -r {PREFIX}/envs/mine")


def test_an_interrupted_installation_is_made_again(host: Any, play: Callable[..., Any]) -> None:
    """A first run that was cut off left half a prefix: it is replaced, not built upon."""
    host.run_expect([0], "mkdir -p /opt/cut/conda-meta && touch /opt/cut/half && printf first > /opt/.cut.installing")
    assert play("miniconda", miniconda_prefix="/opt/cut").changed() == 1
    assert host.check_output("/opt/cut/bin/conda --version").startswith("conda 26.")
    assert not host.file("/opt/cut/half").exists
    assert not host.file("/opt/.cut.installing").exists


def test_an_installation_made_by_hand_stays(host: Any, play: Callable[..., Any]) -> None:
    """One that works and that no role made is used as it is, and not removed."""
    host.run_expect([0], "test -e /opt/hand || cp -a /opt/miniconda3 /opt/hand; rm -f /opt/hand/.installer.json")
    host.run_expect([0], "sed -i 's|/opt/miniconda3|/opt/hand|' /opt/hand/bin/conda /opt/hand/etc/profile.d/conda.sh")
    # The profile file alone changes: it leads there now.
    assert play("miniconda", miniconda_prefix="/opt/hand").changed() == 1
    assert play("miniconda", "uninstall", miniconda_prefix="/opt/hand").changed() == 0
    assert host.file("/opt/hand/bin/conda").exists
    assert play("miniconda").changed() == 1


def test_a_foreign_folder_is_not_touched(host: Any, play: Callable[..., Any]) -> None:
    """A prefix with somebody's files in it is refused, and the files stay."""
    host.run_expect([0], "mkdir -p /opt/foreign && echo precious > /opt/foreign/thesis")
    message = play("miniconda", miniconda_prefix="/opt/foreign").message()
    assert "/opt/foreign holds thesis and no conda" in message
    assert host.file("/opt/foreign/thesis").content_string == "precious\n"


def test_terms_are_accepted_when_asked(host: Any, play: Callable[..., Any]) -> None:
    """Only the variable accepts the terms, and it does so once."""
    assert play("miniconda", miniconda_accept_terms=True).changed() == 1
    assert host.file(f"{PREFIX}/conda-meta/tos").is_directory
    assert play("miniconda", miniconda_accept_terms=True).changed() == 0
    host.run_expect([0], f"rm -r {PREFIX}/conda-meta/tos")


def test_uninstall_keeps_environments_and_removes_the_rest(host: Any, play: Callable[..., Any]) -> None:
    """With an environment inside conda stays and says why; without one it goes, the profile file with it."""
    host.run_expect([0], f"mkdir -p {PREFIX}/envs/mine")
    kept = play("miniconda", "uninstall")
    assert kept.changed() == 0
    assert f"{PREFIX}/envs/mine" in kept.output
    host.run_expect([0], f"rmdir {PREFIX}/envs/mine")
    assert play("miniconda", "uninstall").changed() == 1
    assert not host.file(PREFIX).exists
    assert not host.file("/etc/profile.d/conda.sh").exists
