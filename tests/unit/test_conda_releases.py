"""Locks, ids, versions, markers and what may be removed: the rules that releases of environments follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import conda_releases as rules
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

HASH = "--hash=sha256:" + "0" * 64
LOCK = f"""# Made by script/lock from app.in.
# python: 3.11
--extra-index-url https://mirror.example.org/simple
six==1.17.0 \\
    {HASH} \\
    {HASH}
    # via app
Typing_Extensions==4.15.0 {HASH}  # a comment
uvicorn[standard]==0.54.0 ; sys_platform != "win32" {HASH}
local @ https://example.org/local-1.0.tar.gz {HASH}
"""

numbers = st.integers(min_value=0, max_value=3000)
releases = st.lists(numbers, min_size=1, max_size=4)
versions = st.builds(
    lambda epoch, release, pre, post, dev, local: (
        f"{epoch}!" * bool(epoch) + ".".join(map(str, release)) + pre + post + dev + local
    ),
    st.integers(min_value=0, max_value=2),
    releases,
    st.one_of(st.just(""), st.builds("{}{}".format, st.sampled_from(["a", "b", "rc"]), numbers)),
    st.one_of(st.just(""), st.builds(".post{}".format, numbers)),
    st.one_of(st.just(""), st.builds(".dev{}".format, numbers)),
    st.sampled_from(["", "+cpu", "+cu128", "+git1.abc"]),
)


def make_release(home: Path, name: str, created: str = "2026-01-01", **changes: Any) -> Path:
    """Make a release as the module leaves it."""
    folder = home / name
    site = folder / "lib/python3.11/site-packages"
    for path in (site, folder / "bin", folder / "conda-meta"):
        path.mkdir(parents=True, exist_ok=True)
    (folder / "bin/python").write_text("", encoding="utf-8")
    (folder / "conda-meta/history").write_text("", encoding="utf-8")
    (site / "six.py").write_text("", encoding="utf-8")
    marker = {
        "created": created,
        "entries": ["six.py"],
        "format": rules.FORMAT,
        "id": name.split("-")[0],
        "locked": ["six"],
        "packages": {"six": "1.17.0"},
        "programs": ["python"],
        "site_packages": "lib/python3.11/site-packages",
    }
    (folder / rules.MARKER).write_text(json.dumps({**marker, **changes}), encoding="utf-8")
    return folder


def test_a_lock_is_read() -> None:
    """Continued lines, comments, extras, markers and addresses are understood; names are spelled one way."""
    assert rules.parse_lock(LOCK) == [
        rules.Requirement("six", "1.17.0", conditional=False),
        rules.Requirement("typing-extensions", "4.15.0", conditional=False),
        rules.Requirement("uvicorn", "0.54.0", conditional=True),
        rules.Requirement("local", None, conditional=False),
    ]
    assert rules.lock_python(LOCK) == "3.11"
    assert rules.lock_python("six==1.0") is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"six>=1.0 {HASH}", "line 2: six>=1.0 is not pinned to one version with =="),
        (f"six==1.* {HASH}", "line 2: six==1.* is not pinned"),
        (f"six==1.0,<2 {HASH}", "line 2: six==1.0,<2 is not pinned"),
        ("six==1.0", "line 2: six has no --hash"),
        ("-r other.txt", "line 2: -r points to something that is not in the lock"),
        ("-e .", "line 2: -e points"),
        ("six==1.0 \\", "line 2: six has no --hash"),
    ],
)
def test_what_is_no_lock_is_refused_with_its_line(line: str, words: str) -> None:
    """Each fault is named with its line."""
    with pytest.raises(rules.LockError, match="line 2") as caught:
        rules.parse_lock(f"# first\n{line}\n")
    assert words in str(caught.value)


def test_many_faults_are_counted() -> None:
    """Five are shown, the rest is a number."""
    with pytest.raises(rules.LockError, match="and 4 more"):
        rules.parse_lock("".join(f"p{number}\n" for number in range(9)))


@given(st.lists(st.sampled_from(["# note", "", "   ", "    # via app"])))
def test_an_id_does_not_depend_on_comments(lines: list[str]) -> None:
    """Comments and empty lines may change without a new build; a version may not, nor the Python."""
    plain = f"six==1.17.0 {HASH}\n"
    assert rules.release_id("\n".join(lines) + "\n" + plain, "3.11") == rules.release_id(plain, "3.11")
    assert rules.release_id(plain, "3.12") != rules.release_id(plain, "3.11")
    assert rules.release_id(plain.replace("1.17.0", "1.16.0"), "3.11") != rules.release_id(plain, "3.11")


@given(versions)
def test_a_version_and_its_normal_form_are_equal(version: str) -> None:
    """Indexes and wheels spell versions in their own ways."""
    assert rules.canonical_version(version) == rules.canonical_version(str(Version(version)))


@given(versions, versions)
def test_versions_compare_as_packaging_says(one: str, other: str) -> None:
    """No two different versions are taken for one."""
    assert (rules.canonical_version(one) == rules.canonical_version(other)) == (Version(one) == Version(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2024.07", "2024.7"),
        ("1.0", "1.0.0"),
        ("1.0a", "1.0a0"),
        ("1.0-alpha.1", "1.0a1"),
        ("V1.0.RC-2", "1.0rc2"),
        ("1.0+CPU", "1.0+cpu"),
    ],
)
def test_spellings_of_one_version(one: str, other: str) -> None:
    """What a wheel's name and a lock may disagree about."""
    assert rules.canonical_version(one) == rules.canonical_version(other)


def test_deviations_are_named() -> None:
    """Missing packages and other versions; a conditional package may be missing, but not be another one."""
    wanted = rules.parse_lock(LOCK)
    entries = ["six-1.17.0.dist-info", "typing_extensions-4.14.0.dist-info", "local-1.0.dist-info", "six.py", "x.egg"]
    installed = rules.installed_versions(entries)
    assert installed == {"six": ["1.17.0"], "typing-extensions": ["4.14.0"], "local": ["1.0"]}
    assert rules.deviations(wanted, installed) == ["typing-extensions is 4.14.0, the lock says 4.15.0"]
    assert rules.deviations(wanted, {})[0] == "six is missing"
    assert "uvicorn" not in " ".join(rules.deviations(wanted, {}))
    twice = {**installed, "typing-extensions": ["4.14.0", "4.15.0"], "uvicorn": ["1"]}
    assert len(rules.deviations(wanted, twice)) == 2


@pytest.mark.parametrize(
    "path", ["bin/python", "lib/python3.11/site-packages/six.py", "conda-meta/history", "release.json"]
)
def test_a_release_that_lost_something_is_not_whole(tmp_path: Path, path: str) -> None:
    """Interpreter, package, conda's history or marker: without one of them it is not used."""
    folder = make_release(tmp_path, "0123456789ab")
    found = rules.complete_release(tmp_path, "0123456789ab")
    assert found is not None
    assert found[0] == folder
    (folder / path).unlink()
    assert rules.complete_release(tmp_path, "0123456789ab") is None


def test_a_dangling_interpreter_is_damage(tmp_path: Path) -> None:
    """Its name is still in the folder, but it leads nowhere."""
    folder = make_release(tmp_path, "0123456789ab")
    (folder / "bin/python").unlink()
    (folder / "bin/python").symlink_to("python3.11")
    marker = rules.read_marker(folder)
    assert marker is not None
    assert rules.damage(folder, marker) == f"{folder}/bin/python can't be started"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 0}'])
def test_a_marker_that_says_nothing_is_none(tmp_path: Path, text: str) -> None:
    """A cut-off or foreign file does not make a release whole."""
    (tmp_path / rules.MARKER).write_text(text, encoding="utf-8")
    assert rules.read_marker(tmp_path) is None


def test_a_build_never_enters_a_release_that_counts(tmp_path: Path) -> None:
    """A damaged release keeps its folder, and so does one in use; rubbish gives its folder away."""
    assert rules.folder_for(tmp_path, "0123456789ab", []) == tmp_path / "0123456789ab"
    folder = make_release(tmp_path, "0123456789ab")
    assert rules.folder_for(tmp_path, "0123456789ab", []) == tmp_path / "0123456789ab-2"
    (folder / rules.MARKER).unlink()
    assert rules.folder_for(tmp_path, "0123456789ab", []) == folder
    assert rules.folder_for(tmp_path, "0123456789ab", {folder}) == tmp_path / "0123456789ab-2"
    replaced = make_release(tmp_path, "0123456789ab-2")
    assert rules.complete_release(tmp_path, "0123456789ab") == (replaced, rules.read_marker(replaced))


def test_what_may_go(tmp_path: Path) -> None:
    """The newest stay, the current one is one of them; rubbish goes; what is in use stays."""
    names = ["a" * 12, "b" * 12, "c" * 12, "d" * 12]
    folders = [make_release(tmp_path, name, created=f"2026-01-0{day}") for day, name in enumerate(names, 1)]
    rubbish = tmp_path / ("e" * 12)
    rubbish.mkdir()
    assert rules.surplus(tmp_path, folders[0], set(), 3) == [folders[1], rubbish]
    assert rules.surplus(tmp_path, folders[3], set(), 1) == [*folders[:3], rubbish]
    assert rules.surplus(tmp_path, folders[3], {folders[0], rubbish}, 1) == folders[1:3]
    assert rules.surplus(tmp_path / "none", folders[0], set(), 1) == []


def test_processes_that_use_a_release_are_found(tmp_path: Path) -> None:
    """By what they run and by where they stand; a process of another folder that begins alike does not count."""
    home, proc = tmp_path / "app", tmp_path / "proc"
    links = {
        "1": ("exe", home / "a/bin/python3.11"),
        "2": ("cwd", home / "a"),
        "3": ("exe", tmp_path / "app2/b/bin/python"),
        "4": ("exe", home / "b/bin/python (deleted)"),
    }
    for number, (name, target) in links.items():
        (proc / number).mkdir(parents=True)
        (proc / number / name).symlink_to(target)
    (proc / "self").mkdir()
    assert rules.folders_in_use(home, proc) == {home / "a": [1, 2], home / "b": [4]}


def test_packages_are_shown_like_a_lock() -> None:
    """Sorted, one a line."""
    assert rules.package_lines({"b": "2", "a": "1"}) == "a==1\nb==2\n"
