"""The module conda_environment over a conda and a uv made for the test: what it keeps, says and removes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.conda_releases import release_id
from ansible_collections.selfhost.lmdeploy.plugins.modules import conda_environment
from ansible_collections.selfhost.lmdeploy.plugins.modules.conda_environment import BuildError, Environment

HASH = "--hash=sha256:" + "0" * 64
ONE, TWO = f"six==1.0 {HASH}\n", f"six==2.0 {HASH}\nidna==3.0 {HASH}\n"
CONDA = """#!/bin/sh
# create --prefix FOLDER ...
mkdir -p "$3/bin" "$3/conda-meta" "$3/lib/python3.11/site-packages/pip-26.3.dist-info"
echo made >"$3/conda-meta/history"
touch "$3/bin/python"
"""
UV = """#!/bin/sh
# pip install --quiet --python FOLDER/bin/python ... --requirement LOCK: all that a lock names appears
for last in "$@"; do :; done
cd "$(dirname "$5")/../lib/python3.11/site-packages"
sed -n 's/^\\([a-z]*\\)==\\([0-9.]*\\) .*/\\1-\\2.dist-info/p' "$last" | xargs -r mkdir
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Return a folder that looks like a conda installation with uv beside it."""
    for name, text in (("bin/conda", CONDA), ("opt/uv-1.0/bin/uv", UV)):
        program = tmp_path / "conda" / name
        program.parent.mkdir(parents=True)
        program.write_text(text, encoding="utf-8")
        program.chmod(0o755)
    return tmp_path / "conda"


def environment(base: Path, lock: str | None, *, check: bool = False, **changes: Any) -> Environment:
    """Return the environment app as a task with this lock would see it, after the controller sent the lock."""
    files = {"lock": lock, "uv_lock": f"uv==1.0 {HASH}\n"}
    paths = {name: base.parent / name for name in files}
    for name, text in files.items():
        paths[name].write_text(text or "", encoding="utf-8")
    params = {
        "cache_dir": None,
        "channels": ["file:///srv/channel"],
        "compiled": True,
        "conda_prefix": str(base),
        "installer": "uv",
        "keep_releases": 3,
        "kept_by": [],
        "lock": None if lock is None else str(paths["lock"]),
        "name": "app",
        "python_version": "3.11",
        "release": release_id(lock or "", "3.11"),
        "state": "present",
        "switched": True,
        "timeout_seconds": 60,
        "uv_lock": str(paths["uv_lock"]),
        **changes,
    }
    return Environment(SimpleNamespace(params=params, check_mode=check))


def folders(base: Path) -> list[str]:
    """Name the folders of all releases."""
    return sorted(path.name for path in (base / "releases/app").glob("*"))


def test_a_release_is_built_once_and_current(base: Path) -> None:
    first = environment(base, ONE).present()
    assert (first["changed"], first["built"]) == (True, True)
    assert first["packages"] == {"pip": "26.3", "six": "1.0"}
    assert Path(first["link"]).resolve() == Path(first["prefix"])
    assert (first["diff"]["before"], first["diff"]["after"]) == ("", "six==1.0\n")
    second = environment(base, None, release=first["release"]).present()
    assert (second["changed"], second["built"], second["prefix"]) == (False, False, first["prefix"])
    assert "diff" not in second


def test_a_host_without_the_release_asks_for_the_lock(base: Path) -> None:
    assert environment(base, None).present() == {"changed": False, "lock_needed": True}
    assert not (base / "releases").exists()


def test_check_mode_tells_and_does_nothing(base: Path) -> None:
    foretold = environment(base, ONE, check=True).present()
    assert (foretold["changed"], foretold["built"]) == (True, True)
    assert foretold["packages"] == {"six": "1.0"}
    assert not (base / "releases").exists()
    made = environment(base, ONE).present()
    assert made["prefix"] == foretold["prefix"]
    again = environment(base, TWO, check=True).present()
    assert (again["diff"]["before"], again["diff"]["after"]) == ("six==1.0\n", "idna==3.0\nsix==2.0\n")
    assert folders(base) == [made["release"]]


def test_another_lock_keeps_the_release_before(base: Path) -> None:
    one, two = environment(base, ONE).present(), environment(base, TWO).present()
    assert two["changed"]
    assert folders(base) == sorted([one["release"], two["release"]])
    back = environment(base, None, state="switched", release=one["release"]).switched()
    assert (back["changed"], back["prefix"]) == (True, one["prefix"])
    assert not environment(base, None, state="switched", release=one["release"]).switched()["changed"]
    only = environment(base, TWO, keep_releases=1).present()
    assert only["removed"] == [one["prefix"]]
    assert folders(base) == [two["release"]]


def test_a_release_that_a_link_leads_to_stays(base: Path, tmp_path: Path) -> None:
    one = environment(base, ONE).present()
    (tmp_path / "user").mkdir()
    (tmp_path / "user/environment").symlink_to(one["prefix"])
    links = [str(tmp_path / "*/environment")]
    assert environment(base, TWO, keep_releases=1, kept_by=links).present()["removed"] == []
    assert one["release"] in folders(base)


def test_a_release_can_be_built_beside(base: Path) -> None:
    one = environment(base, ONE).present()
    two = environment(base, TWO, switched=False).present()
    assert (two["changed"], two["built"]) == (True, True)
    assert Path(one["link"]).resolve() == Path(one["prefix"])
    assert not environment(base, TWO, switched=False).present()["changed"]


def test_a_damaged_release_is_replaced_by_its_neighbour(base: Path) -> None:
    one = environment(base, ONE).present()
    (Path(one["prefix"]) / "lib/python3.11/site-packages/six-1.0.dist-info").rmdir()
    mended = environment(base, ONE).present()
    assert mended["prefix"] == f"{one['prefix']}-2"
    assert mended["removed"] == [one["prefix"]]
    assert not environment(base, ONE).present()["changed"]


@pytest.mark.parametrize(
    ("program", "text", "words"),
    [
        ("bin/conda", 'mkdir -p "$3"; echo "no package python=3.11"; exit 1', "no package python=3.11"),
        ("opt/uv-1.0/bin/uv", "echo hash mismatch >&2; exit 2", "failed (2):\nhash mismatch"),
        ("opt/uv-1.0/bin/uv", "true", "is not its lock: six is missing"),
        (
            "opt/uv-1.0/bin/uv",
            'mkdir -p "${5%/bin/python}/lib/python3.11/site-packages/six-0.9.dist-info"',
            "six is 0.9",
        ),
        ("opt/uv-1.0/bin/uv", "sleep 60", "did not end within 1 s"),
    ],
)
def test_a_failed_build_leaves_no_trace(base: Path, program: str, text: str, words: str) -> None:
    kept = environment(base, TWO).present()
    (base / program).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    limit = 1 if "sleep" in text else 60
    with pytest.raises(BuildError) as caught:
        environment(base, ONE, timeout_seconds=limit).present()
    assert words in str(caught.value)
    assert folders(base) == [kept["release"]]
    assert Path(kept["link"]).resolve() == Path(kept["prefix"])


def test_credentials_are_not_repeated(base: Path) -> None:
    (base / "bin/conda").write_text('#!/bin/sh\necho "401 for $6"\nexit 1\n', encoding="utf-8")
    channels = ["https://me:secret@conda.example.org/t/token-1/channel"]
    with pytest.raises(BuildError) as caught:
        environment(base, ONE, channels=channels).present()
    assert "conda.example.org" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "token-1" not in str(caught.value)


def test_conda_must_be_there(base: Path) -> None:
    (base / "bin/conda").unlink()
    with pytest.raises(BuildError, match="install Miniconda first"):
        environment(base, ONE).present()


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_what_people_made_is_refused(base: Path, tmp_path: Path, kind: str) -> None:
    (base / "envs").mkdir()
    if kind == "folder":
        (base / "envs/app").mkdir()
    else:
        (base / "envs/app").symlink_to(tmp_path)
    with pytest.raises(BuildError, match="move it away"):
        environment(base, ONE).present()


def test_switching_to_nothing_names_what_there_is(base: Path) -> None:
    one = environment(base, ONE).present()
    with pytest.raises(BuildError, match=f"no whole release {'0' * 12}. Releases there: {one['release']}"):
        environment(base, None, state="switched", release="0" * 12).switched()


def test_absent_removes_all_of_it_and_nothing_else(base: Path) -> None:
    environment(base, ONE).present()
    environment(base, TWO).present()
    assert environment(base, None, check=True).absent()["changed"]
    assert len(folders(base)) == 2
    removed = environment(base, None).absent()
    assert (removed["changed"], len(removed["removed"])) == (True, 2)
    assert not (base / "releases/app").exists()
    assert not (base / "envs/app").is_symlink()
    assert (base / "bin/conda").exists()
    assert not environment(base, None).absent()["changed"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "../app"}, "can't name an environment"),
        ({"name": "base"}, "can't name an environment"),
        ({"python_version": "3"}, "is no version"),
        ({"keep_releases": 0}, "at least 1"),
        ({"release": "../x"}, "is no id"),
    ],
)
def test_parameters_that_leave_the_folder_are_refused(base: Path, changes: dict[str, Any], words: str) -> None:
    params = environment(base, ONE).module.params
    conda_environment.check_parameters(params)
    with pytest.raises(BuildError, match=words):
        conda_environment.check_parameters({**params, **changes})


def test_pip_takes_the_same_lock(base: Path) -> None:
    made = environment(base, ONE, installer="pip", compiled=False)
    command = [str(word) for word in made.install_command(base / "x", Path("/lock"))]
    assert command[:4] == [f"{base}/x/bin/python", "-m", "pip", "install"]
    assert command[-4:] == ["--no-deps", "--require-hashes", "--requirement", "/lock"]
    assert "--no-compile" in command
    assert sys.executable not in command


def test_a_run_that_waited_for_another_finds_the_work_done(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, waiting = environment(base, ONE), environment(base, ONE)
    waits = waiting.locked

    def locked() -> Any:
        other.present()
        return waits()

    monkeypatch.setattr(waiting, "locked", locked)
    found = waiting.present()
    assert (found["changed"], found["built"]) == (False, False)
    assert len(folders(base)) == 1
