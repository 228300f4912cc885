"""What people notice of an environment: it is its lock, a failed build changes nothing, a running one stays."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

LOCKS = Path(__file__).resolve().parents[1] / "locks"
FIRST, SECOND = str(LOCKS / "first.txt"), str(LOCKS / "second.txt")
PREFIX = "/opt/miniconda3"
LINK = f"{PREFIX}/envs/sample"
HOME = f"{PREFIX}/releases/sample"


def locked(lock: str) -> dict[str, str]:
    """Read the versions of a lock."""
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", Path(lock).read_text(encoding="utf-8"), re.MULTILINE))


def installed(host: Any, prefix: str = LINK) -> dict[str, str]:
    """Ask the environment's own Python what is installed, apart from pip."""
    code = "import importlib.metadata as m, json; print(json.dumps([[d.name, d.version] for d in m.distributions()]))"
    found = json.loads(host.check_output(f"{prefix}/bin/python -c '{code}'"))
    return {name.lower().replace("_", "-"): version for name, version in found if name != "pip"}


def current(host: Any) -> str:
    """Return the folder that is current."""
    return str(host.check_output(f"readlink -e {LINK}"))


def identity(folder: str) -> str:
    """Return the id of the release in a folder, which may have a number after it."""
    return Path(folder).name.split("-")[0]


def releases(host: Any) -> set[str]:
    """Return the folders of all releases."""
    return set(host.check_output(f"find {HOME} -mindepth 1 -maxdepth 1").split())


@pytest.fixture
def env(play: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs the role for the scenario's environment."""

    def run(lock: str = FIRST, entry: str = "main", *, check: bool = False, **variables: object) -> Any:
        return play(
            "conda_env", entry, check=check, **{"conda_env_name": "sample", "conda_env_lock": lock, **variables}
        )

    return run


@pytest.fixture
def visitor(host: Any) -> str:
    """Have an ordinary person on the host."""
    host.run_expect([0, 9], "useradd --create-home --shell /bin/bash visitor")
    return "visitor"


def test_a_person_activates_it(host: Any, visitor: str) -> None:
    """By name, in a login shell, with Python 3.11 and the programs of its packages."""
    asked = "conda activate sample && python --version && echo $CONDA_PREFIX && command -v json-playground"
    answer = host.check_output(f"su - {visitor} -c '{asked}'").splitlines()
    assert answer[0].startswith("Python 3.11.")
    assert answer[1:] == [LINK, f"{LINK}/bin/json-playground"]
    assert LINK in host.check_output(f"su - {visitor} -c 'conda env list'")


def test_a_person_cannot_change_it(host: Any, visitor: str) -> None:
    """It belongs to root, and nothing in it may be written by others."""
    assert host.run(f"su - {visitor} -c 'touch {LINK}/lib/python3.11/site-packages/mine'").rc != 0
    assert host.check_output(f"find {HOME}/ -perm -o=w ! -type l") == ""
    assert host.check_output(f"find {HOME}/ ! -user root") == ""


def test_it_is_its_lock(host: Any) -> None:
    """Every package has the version that the lock says, compiled for services that can't write here."""
    assert installed(host) == locked(FIRST)
    assert host.file(f"{LINK}/lib/python3.11/site-packages/__pycache__/six.cpython-311.pyc").exists


def test_building_leaves_nothing_behind(host: Any) -> None:
    """Neither the tools' temporary files nor the lock's way to the host."""
    assert (
        host.check_output("find /tmp /var/tmp /root/.ansible/tmp -mindepth 1 -name 'uv-*' -o -name 'ansible-tmp*'")
        == ""
    )
    assert host.check_output(f"ls -A {PREFIX}/releases").split() == [".lock", "sample"]


def test_the_tools_are_pinned(host: Any) -> None:
    """The uv beside conda is the one of the role's own lock."""
    uv = locked(str(LOCKS.parents[2] / "roles/conda_env/files/locks/uv.txt"))["uv"]
    assert host.check_output(f"{PREFIX}/opt/uv-{uv}/bin/uv --version").split()[1] == uv


def test_another_lock_switches_and_keeps_the_old(host: Any, env: Callable[..., Any]) -> None:
    """Check mode only tells; the switch is one link, and the way back needs no download."""
    before = current(host)
    foretold = env(SECOND, check=True)
    assert foretold.changed() == 1
    assert current(host) == before
    assert env(SECOND).changed() == 1
    after = current(host)
    assert after != before
    assert installed(host) == locked(SECOND)
    assert installed(host, before) == locked(FIRST)
    assert env(SECOND, "switch", conda_env_release=identity(before)).changed() == 1
    assert current(host) == before


def test_a_damaged_release_is_replaced(host: Any, env: Callable[..., Any]) -> None:
    """A package is gone: the next run brings it back, in a folder of its own, and removes the damaged one."""
    before = current(host)
    host.run_expect([0], f"rm {before}/lib/python3.11/site-packages/six.py")
    assert env(FIRST).changed() == 1
    assert host.check_output(f"{LINK}/bin/python -c 'import six; print(six.__version__)'") == locked(FIRST)["six"]
    assert current(host) != before
    assert not host.file(before).exists


def test_an_interrupted_build_is_made_again(host: Any, env: Callable[..., Any]) -> None:
    """Without its marker a release is rubbish, however far it got."""
    second = next(iter(releases(host) - {current(host)}))
    host.run_expect([0], f"rm {second}/release.json {second}/bin/python3.11 && touch {second}/half")
    assert env(SECOND).changed() == 1
    assert installed(host) == locked(SECOND)
    assert not host.file(f"{LINK}/half").exists


@pytest.mark.parametrize(
    ("pattern", "text", "words"),
    [
        (r"six==1\.16\.0", "six==99.0.0", "six==99.0.0"),
        (r"(?s)(six==1\.16\.0 \\\n\s+--hash=sha256:).*", r"\g<1>" + "0" * 64, "0" * 64),
        (r"six==1\.16\.0", "six>=1.16.0", "six>=1.16.0 is not pinned to one version with =="),
    ],
    ids=["no such version", "wrong hash", "not pinned"],
)
def test_a_bad_lock_changes_nothing(
    host: Any, env: Callable[..., Any], tmp_path: Path, pattern: str, text: str, words: str
) -> None:
    """The message says what is wrong with it; the current release stays, and nothing half-built."""
    before = current(host), releases(host)
    lock = tmp_path / "bad.txt"
    lock.write_text(re.sub(pattern, text, Path(FIRST).read_text(encoding="utf-8")), encoding="utf-8")
    assert words in env(str(lock)).message()
    assert (current(host), releases(host)) == before


def test_pip_installs_the_same(host: Any, play: Callable[..., Any]) -> None:
    """The slower installer gives what the lock says too."""
    variables = {"conda_env_name": "bypip", "conda_env_lock": SECOND, "conda_env_installer": "pip"}
    assert play("conda_env", **variables).changed() == 1
    assert installed(host, f"{PREFIX}/envs/bypip") == locked(SECOND)
    assert play("conda_env", "uninstall", **variables).changed() == 1


def test_python_alone(host: Any, play: Callable[..., Any]) -> None:
    """Without a lock the environment is Python and pip."""
    assert play("conda_env", conda_env_name="plain").changed() == 1
    assert installed(host, f"{PREFIX}/envs/plain") == {}
    assert play("conda_env", "uninstall", conda_env_name="plain").changed() == 1


def test_two_runs_at_once_build_once(host: Any, play: Callable[..., Any]) -> None:
    """The second waits for the first and finds the work done."""
    variables = {"conda_env_name": "twice", "conda_env_lock": SECOND}
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(play, "conda_env", **variables) for _ in range(2)]
        assert sorted(run.result().changed() for run in runs) == [0, 1]
    assert len(host.check_output(f"ls {PREFIX}/releases/twice").split()) == 1
    assert installed(host, f"{PREFIX}/envs/twice") == locked(SECOND)
    play("conda_env", "uninstall", **variables).changed()


def test_a_release_in_use_is_kept(host: Any, env: Callable[..., Any]) -> None:
    """A service runs on from the old release although only one is to be kept; without it the old one goes."""
    env(FIRST)
    old = current(host)
    host.run_expect([0], f"systemd-run --unit sample-user {old}/bin/python -c 'import time; time.sleep(600)'")
    try:
        assert env(SECOND, conda_env_keep_releases=1).changed() == 1
        assert host.file(f"{old}/release.json").exists
        assert "stop their services first" in env(SECOND, "uninstall").message()
    finally:
        host.run_expect([0], "systemctl stop sample-user.service")
    assert env(SECOND, "switch", conda_env_release=identity(old)).changed() == 1
    assert env(SECOND, conda_env_keep_releases=1).changed() == 1
    assert releases(host) == {current(host)}


def test_an_environment_made_by_hand_is_not_touched(host: Any, play: Callable[..., Any]) -> None:
    """A name that somebody uses already is refused."""
    host.run_expect([0], f"mkdir -p {PREFIX}/envs/hand && touch {PREFIX}/envs/hand/mine")
    message = play("conda_env", conda_env_name="hand").message()
    assert f"{PREFIX}/envs/hand is a folder that was made by hand" in message
    assert host.file(f"{PREFIX}/envs/hand/mine").exists


def test_uninstall_leaves_conda(host: Any, env: Callable[..., Any]) -> None:
    """All releases go, and the link; conda and uv stay for others."""
    assert env(FIRST, "uninstall").changed() == 1
    assert not host.file(HOME).exists
    assert not host.file(LINK).exists
    assert host.file(f"{PREFIX}/bin/conda").exists
    assert env(FIRST, "uninstall").changed() == 0
