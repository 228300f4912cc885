"""The module model_snapshot against a hub on loopback that cuts, lies, is busy and refuses."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.action import model_snapshot as action
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import model_sources, model_store
from ansible_collections.selfhost.lmdeploy.plugins.modules import model_snapshot

SPEC = importlib.util.spec_from_file_location("hub", Path(__file__).parents[1] / "standins" / "hub" / "hub.py")
assert SPEC
assert SPEC.loader
hub_module = importlib.util.module_from_spec(SPEC)
# Its dataclasses look their module up by name.
sys.modules["hub"] = hub_module
SPEC.loader.exec_module(hub_module)

BIG = 3 << 20
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Serve the models on loopback; pauses between tries cost nothing."""
    server = hub_module.Hub(big_mib=3)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    for name in ("HF_HOME", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, str(tmp_path / "unused"))
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    yield server
    server.shutdown()
    server.server_close()


def have(path: Path, *, check: bool = False, **changes: Any) -> dict[str, Any]:
    """Run the module as Ansible would and return its result."""
    item = {"id": "test/tiny", "revision": "", "allow_patterns": [], "ignore_patterns": model_snapshot.DEFAULT_IGNORE}
    models = changes.pop("models", [changes.pop("model", {})])
    params = {
        "path": str(path),
        "models": [{**item, **model} for model in models],
        "hub": "huggingface",
        "token": "",
        "source_dir": "",
        "python": "",
        "attempts": 3,
        "workers": 2,
        "reserve_gib": 0,
        "fetch": True,
        "keep_snapshots": 2,
        "kept_by": [],
        "manifests": False,
        "address": "",
        "peer_manifests": [],
        "peers": [],
        "peer_certificate": "",
        **changes,
    }
    module: Any = SimpleNamespace(params=params, check_mode=check)
    try:
        return model_snapshot.run(module)
    finally:
        # A real module's process ends here, and its threads with it.
        for thread in threading.enumerate():
            if thread.name == "fetch":
                thread.join()


def asked(server: Any, name: str = "") -> list[dict[str, Any]]:
    """Return the requests whose path ends so."""
    return [entry for entry in server.log if entry["path"].split("?")[0].endswith(name)]


def test_a_model_is_fetched_linked_and_then_recognised_without_a_request(hub: Any, tmp_path: Path) -> None:
    models = tmp_path / "models"
    planned = have(models, check=True)
    assert planned["changed"]
    assert not hub.log
    assert not models.exists()
    result = have(models)
    commit = hub.repos["test/tiny"].refs["main"]
    assert result["models"][0] | {"bytes": 0} == {
        "id": "test/tiny",
        "path": str(models / "test--tiny"),
        "commit": commit,
        "bytes": 0,
        "changed": True,
        "source": "",
    }
    assert sorted(path.name for path in (models / "test--tiny").iterdir()) == sorted(
        [".complete.json", "README.md", "config.json", "model.safetensors.index.json", "sub", *SHARDS]
    )
    files = hub.repos["test/tiny"].commits[commit]
    assert all((models / "test--tiny" / shard).read_bytes() == files[shard] for shard in SHARDS)
    hub.log.clear()
    assert not have(models)["changed"]
    assert not hub.log


def test_a_cut_goes_on_where_it_ended_within_a_run(hub: Any, tmp_path: Path) -> None:
    hub.faults = [{"kind": "cut", "path": SHARDS[0], "after": (1 << 20) + 5}]
    have(tmp_path)
    ranges = [entry["range"] for entry in asked(hub, SHARDS[0])]
    assert ranges == [None, "bytes=1048576-", "bytes=2097152-"]


def test_a_cut_goes_on_where_it_ended_in_the_next_run(hub: Any, tmp_path: Path) -> None:
    hub.faults = [
        {"kind": "cut", "path": SHARDS[0], "after": 2 << 20, "times": 1},
        {"kind": "cut", "path": SHARDS[0], "after": 0},
    ]
    with pytest.raises(model_store.StoreError, match=r"could not be fetched in 3 tries.*run again"):
        have(tmp_path)
    assert not (tmp_path / "test--tiny").is_symlink()
    hub.faults, hub.log = [], []
    have(tmp_path)
    assert [entry["range"] for entry in asked(hub, SHARDS[0])] == [f"bytes={2 << 20}-"]


@pytest.mark.parametrize("name", [SHARDS[1], "config.json"])
def test_wrong_bytes_are_refused_and_nothing_is_linked(hub: Any, tmp_path: Path, name: str) -> None:
    hub.faults = [{"kind": "wrong", "path": name}]
    with pytest.raises(model_store.StoreError, match=f"{name} has the checksum .* its source states"):
        have(tmp_path)
    assert not (tmp_path / "test--tiny").exists()
    assert not list(tmp_path.rglob(name))
    hub.faults = []
    assert have(tmp_path)["changed"]


def test_a_busy_hub_is_asked_again_as_late_as_it_wants(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    hub.faults = [{"kind": "status", "path": "", "status": 429, "retry_after": 7, "times": 2}]
    have(tmp_path)
    assert waits == [7.0, 7.0]


def test_a_broken_hub_ends_with_its_answer_and_the_ways_out(hub: Any, tmp_path: Path) -> None:
    hub.faults = [{"kind": "status", "path": "*", "status": 503}]
    with pytest.raises(model_store.StoreError, match=r"3 tries: http://127.*503.*mirrors_hf_endpoint.*source_dir"):
        have(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"revision": "nope"}}, "has no revision 'nope'"),
        ({"model": {"id": "test/none"}}, "has no model 'test/none'"),
        ({"model": {"id": "test/gated"}}, "behind a licence.*model_weights_token"),
        ({"model": {"id": "tiny"}}, "id is 'tiny'"),
        ({"models": [{"id": "test/tiny"}, {"id": "test/tiny", "revision": "v1"}]}, "test/tiny is listed twice"),
        ({"model": {"allow_patterns": ["*.zip"]}}, "leave none"),
        ({"model": {"ignore_patterns": [SHARDS[0]]}}, f"incomplete: its index names {SHARDS[0]}"),
        ({"reserve_gib": 1 << 30}, "No room for test/tiny: .* are to be fetched"),
        ({"source_dir": "/does/not/exist"}, "has no folder /does/not/exist/test--tiny"),
    ],
)
def test_a_permanent_fault_says_its_way_out_at_once(hub: Any, tmp_path: Path, changes: Any, says: str) -> None:
    with pytest.raises(model_store.StoreError, match=says):
        have(tmp_path, **changes)
    assert not list(tmp_path.glob("test--*"))


def test_a_token_opens_a_model_behind_a_licence(hub: Any, tmp_path: Path) -> None:
    assert have(tmp_path, model={"id": "test/gated"}, token=hub_module.TOKEN)["changed"]


def test_another_revision_shares_what_is_the_same_and_the_way_back_needs_no_hub(hub: Any, tmp_path: Path) -> None:
    have(tmp_path)
    new = (tmp_path / "test--tiny").resolve()
    hub.log.clear()
    old_commit = hub.repos["test/tiny"].refs["v1"]
    assert have(tmp_path, model={"revision": "v1"})["models"][0]["commit"] == old_commit
    assert not asked(hub, SHARDS[0])
    assert (tmp_path / "test--tiny" / SHARDS[0]).samefile(new / SHARDS[0])
    hub.log.clear()
    assert have(tmp_path, model={"revision": new.name})["changed"]
    assert not hub.log
    assert (tmp_path / "test--tiny").resolve() == new


@pytest.mark.parametrize(("keep", "left"), [(1, 1), (2, 2), (3, 3)])
def test_old_snapshots_and_leftovers_go_but_never_the_current_one(
    hub: Any, tmp_path: Path, keep: int, left: int
) -> None:
    models: list[dict[str, Any]] = [{"revision": "v1"}, {"ignore_patterns": []}, {"revision": "main"}]
    for model in models:
        have(tmp_path, model=model, keep_snapshots=keep)
        (tmp_path / ".store" / "test--tiny" / "cut.partial").mkdir()
    have(tmp_path, model={"revision": "v1", "ignore_patterns": []}, keep_snapshots=keep)
    places = list((tmp_path / ".store" / "test--tiny").iterdir())
    assert len(places) == left
    assert (tmp_path / "test--tiny").resolve() in places


def test_a_snapshot_that_a_link_leads_into_stays(hub: Any, tmp_path: Path) -> None:
    have(tmp_path)
    first = (tmp_path / "test--tiny").resolve()
    (tmp_path / "user").mkdir()
    (tmp_path / "user/model").symlink_to(first / SHARDS[0])
    have(tmp_path, model={"ignore_patterns": []}, keep_snapshots=1, kept_by=[str(tmp_path / "user/model")])
    assert (tmp_path / "test--tiny").resolve() != first
    assert first.is_dir()


def test_other_patterns_are_another_snapshot(hub: Any, tmp_path: Path) -> None:
    have(tmp_path)
    have(tmp_path, model={"ignore_patterns": []})
    assert (tmp_path / "test--tiny" / "pytorch_model.bin").exists()
    assert not have(tmp_path, model={"ignore_patterns": []})["changed"]


def test_a_damaged_snapshot_is_fetched_again(hub: Any, tmp_path: Path) -> None:
    have(tmp_path)
    (tmp_path / "test--tiny" / SHARDS[1]).write_bytes(b"short")
    assert have(tmp_path)["changed"]
    assert (tmp_path / "test--tiny" / SHARDS[1]).stat().st_size == BIG


def test_a_folder_is_copied_with_the_sums_it_came_with(hub: Any, tmp_path: Path) -> None:
    have(tmp_path / "first")
    hub.log.clear()
    result = have(tmp_path / "second", source_dir=str(tmp_path / "first"))
    assert not hub.log
    assert result["models"][0]["commit"] == hub.repos["test/tiny"].refs["main"]
    with pytest.raises(model_store.StoreError, match=r"holds test/tiny at commit .* wants the revision 'v1'"):
        have(tmp_path / "third", source_dir=str(tmp_path / "first"), model={"revision": "v1"})
    (tmp_path / "first" / "test--tiny" / SHARDS[0]).write_bytes(b"\0" * BIG)
    with pytest.raises(model_store.StoreError, match=f"{SHARDS[0]} has the checksum"):
        have(tmp_path / "fourth", source_dir=str(tmp_path / "first"))
    (tmp_path / "first" / "test--tiny" / SHARDS[0]).unlink()
    with pytest.raises(model_store.StoreError, match=f"is incomplete: its own list names {SHARDS[0]}"):
        have(tmp_path / "fifth", source_dir=str(tmp_path / "first"))


def test_a_plain_folder_is_copied_too(tmp_path: Path) -> None:
    source = tmp_path / "usb" / "test" / "tiny"
    source.mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / ".cache").mkdir()
    (source / ".cache" / "notes").write_text("x")
    have(tmp_path / "models", source_dir=str(tmp_path / "usb"))
    assert [path.name for path in sorted((tmp_path / "models" / "test--tiny").iterdir())] == [
        ".complete.json",
        "config.json",
    ]
    assert not have(tmp_path / "models", source_dir=str(tmp_path / "usb"))["changed"]


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", ".complete.json"])
def test_a_file_that_would_land_elsewhere_is_refused(path: str) -> None:
    with pytest.raises(model_store.StoreError, match="refused"):
        model_sources.selected([model_sources.Remote(path, 1)], [], [])


@pytest.mark.parametrize(
    ("value", "seconds"), [("3", 3.0), ("9999", 300.0), ("-1", None), ("soon", None), (None, None)]
)
def test_only_a_sane_wait_is_waited(value: str | None, seconds: float | None) -> None:
    assert model_sources.retry_after(value) == seconds


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        ({"done": 0, "rate": 0.0}, "m: 0 B of 4.0 GB, waiting for data"),
        ({"done": 10**9, "rate": 1e8}, "m: 1.0 GB of 4.0 GB, 100.0 MB/s, 30 s left"),
        ({"done": 10**9, "rate": 1e7}, "m: 1.0 GB of 4.0 GB, 10.0 MB/s, 5 min left"),
        ({"done": 4 * 10**9, "rate": 1e7}, "m: 4.0 GB of 4.0 GB, checking"),
        ({"done": 5, "rate": 1.0, "note": "try 1 of 5 failed"}, "m: 5 B of 4.0 GB, try 1 of 5 failed"),
    ],
)
def test_a_line_tells_bytes_rate_and_time_left(progress: dict[str, Any], text: str) -> None:
    assert action.line(json.loads(json.dumps({"model": "m", "total": 4 * 10**9, **progress}))) == text
