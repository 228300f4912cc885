"""The models store: an entry counts when it is whole, a link changes in one step, only our own things go."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import model_store
from hypothesis import given
from hypothesis import strategies as st


def entry(directory: Path, name: str = "a--b/c1") -> Path:
    """Make a complete entry with one file of four bytes."""
    place = directory / model_store.STORE / name
    place.mkdir(parents=True)
    (place / "w").write_bytes(b"1234")
    model_store.write_marker(place, {"files": [{"path": "w", "size": 4, "sha256": "x"}]})
    return place


def whole(place: Path) -> bool:
    """Tell whether an entry has its marker and all its files."""
    marker = model_store.read_marker(place)
    return marker is not None and model_store.is_complete(place, marker)


def test_an_entry_counts_only_with_marker_and_every_byte(tmp_path: Path) -> None:
    place = entry(tmp_path)
    assert whole(place)
    (place / "w").write_bytes(b"123")
    assert not whole(place)
    (place / "w").unlink()
    assert not whole(place)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2}', "{"])
def test_a_marker_that_is_no_marker_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / model_store.MARKER).write_text(text)
    assert model_store.read_marker(tmp_path) is None


def test_a_link_is_relative_switched_once_and_then_left_alone(tmp_path: Path) -> None:
    first, second, link = entry(tmp_path, "a--b/c1"), entry(tmp_path, "a--b/c2"), tmp_path / "a--b"
    assert model_store.switch_link(link, first)
    assert str(link.readlink()) == ".store/a--b/c1"
    assert not model_store.switch_link(link, first)
    assert model_store.switch_link(link, second)
    assert link.resolve() == second


def test_what_a_person_put_there_is_never_replaced(tmp_path: Path) -> None:
    place = entry(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "elsewhere").symlink_to("/usr")
    for name in ("folder", "elsewhere"):
        with pytest.raises(model_store.StoreError, match=f"{name} is.*move it away"):
            model_store.switch_link(tmp_path / name, place)
    assert (tmp_path / "folder").is_dir()


def test_removal_takes_the_store_and_its_links_and_nothing_else(tmp_path: Path) -> None:
    models = tmp_path / "models"
    model_store.switch_link(models / "a--b", entry(models))
    (models / "own.gguf").write_text("mine")
    doomed = model_store.remove_store(models, dry=True)
    assert (models / "a--b" / "w").exists()
    assert model_store.remove_store(models) == doomed == [str(models / ".store"), str(models / "a--b")]
    assert [path.name for path in models.iterdir()] == ["own.gguf"]
    (models / "own.gguf").unlink()
    entry(models)
    assert model_store.remove_store(models)[-1] == str(models)
    assert not models.exists()
    assert model_store.remove_store(models) == []


def test_too_little_disk_is_said_with_figures(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert model_store.disk_fault(tmp_path / "not" / "yet", 0, 0) is None
    fault = model_store.disk_fault(tmp_path / "not" / "yet", free + 5_000_000_000, 2_000_000_000)
    assert fault is not None
    assert "2.0 GB are kept free" in fault
    assert "model_weights_dir" in fault
    assert str(tmp_path) in fault


@given(st.integers(min_value=0, max_value=10**16))
def test_sizes_for_people_keep_the_number(count: int) -> None:
    number, unit = model_store.human(count).split()
    factor = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}[unit]
    assert abs(float(number) * factor - count) <= 0.05 * factor + 1
    assert float(number) <= 1000 or unit == "TB"


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=5)))
def test_equal_content_has_an_equal_name(identity: dict[str, str]) -> None:
    assert model_store.digest(identity) == model_store.digest(dict(reversed(identity.items())))
    assert model_store.digest({**identity, "more": "x!"}) != model_store.digest(identity)
