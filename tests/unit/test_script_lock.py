"""The script lock: every lock in the checkout matches its input, and a changed input is noticed."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import conda_releases

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def lock() -> Any:
    """Load the script, which has no file name ending."""
    loader = importlib.machinery.SourceFileLoader("script_lock", str(ROOT / "script/lock"))
    spec = importlib.util.spec_from_loader("script_lock", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_every_lock_is_the_one_of_its_input(lock: Any) -> None:
    assert len(lock.inputs()) >= 5
    assert [str(source) for source in lock.inputs() if not lock.is_current(source)] == []


def test_every_lock_can_be_installed_and_names_no_address(lock: Any) -> None:
    for source in lock.inputs():
        text = source.with_suffix(".txt").read_text(encoding="utf-8")
        assert conda_releases.parse_lock(text), source
        assert conda_releases.lock_python(text) == "3.11"
        assert "://" not in text
        assert str(ROOT) not in text


@pytest.mark.parametrize("ending", [".in", ".toml"])
def test_a_changed_input_makes_the_lock_stale(lock: Any, tmp_path: Path, ending: str) -> None:
    original = ROOT / "roles/open_webui/files/locks"
    for path in original.glob("open-webui-*-slim.*"):
        shutil.copy(path, tmp_path)
    source = next(tmp_path.glob("*.in"))
    assert lock.is_current(source)
    changed = source.with_suffix(ending)
    changed.write_text(changed.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    assert not lock.is_current(source)


def test_options_stand_in_the_first_line(lock: Any, tmp_path: Path) -> None:
    source = tmp_path / "app.in"
    source.write_text("# uv: --no-deps --prerelease 'if necessary'\nsix\n", encoding="utf-8")
    assert lock.options_of(source) == ["--no-deps", "--prerelease", "if necessary"]
    source.write_text("six\n# uv: --no-deps\n", encoding="utf-8")
    assert lock.options_of(source) == []
