"""The module engine_connections: which address a web host gets, and what an unfinished host means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.modules.engine_connections import learn, only_computes


def left(folder: Path, **instances: tuple[str, int]) -> Path:
    """Leave a folder as the role does: a key, and a file for each instance."""
    (folder / "api-key").write_text("secret\n", encoding="utf-8")
    for name, (host, port) in instances.items():
        (folder / f"{name}.json").write_text(
            json.dumps({"host": host, "port": port, "engine": "llama_cpp", "model_name": name}), encoding="utf-8"
        )
    return folder


@pytest.mark.parametrize(
    ("listening", "address", "wanted"),
    [
        ("127.0.0.1", "", "http://127.0.0.1:9/v1"),
        ("127.0.0.1", "192.0.2.1", "http://192.0.2.1:9/v1"),
        ("localhost", "gpu-1", "http://gpu-1:9/v1"),
        ("::1", "2001:db8::1", "http://[2001:db8::1]:9/v1"),
        ("192.0.2.9", "192.0.2.1", "http://192.0.2.9:9/v1"),
        ("192.0.2.9", "", "http://192.0.2.9:9/v1"),
    ],
)
def test_an_engine_is_reached_where_it_listens(tmp_path: Path, listening: str, address: str, wanted: str) -> None:
    found = learn(left(tmp_path, a=(listening, 9)), address)
    assert found["connections"] == [{"url": wanted, "api_key": "secret"}]
    assert found["engines"] == [{"engine": "llama_cpp", "model": "a", "url": wanted}]


def test_each_instance_is_a_connection_in_the_order_of_names(tmp_path: Path) -> None:
    found = learn(left(tmp_path, b=("127.0.0.1", 2), a=("127.0.0.1", 1)), "gpu-1")
    assert [c["url"] for c in found["connections"]] == ["http://gpu-1:1/v1", "http://gpu-1:2/v1"]


def test_a_host_without_a_key_has_no_engine(tmp_path: Path) -> None:
    assert learn(tmp_path / "missing", "") == {"connections": [], "engines": []}


@pytest.mark.parametrize(
    ("rank", "node", "computes"), [(1, None, True), (0, None, False), (None, False, True), (None, True, False)]
)
def test_a_further_host_of_a_model_is_not_asked(
    tmp_path: Path, rank: int | None, node: bool | None, computes: bool
) -> None:
    """It has an engine of a higher rank, or a node of Ray that is not the head, and no connection."""
    folder, settings = left(tmp_path), tmp_path / "node" / "node.json"
    settings.parent.mkdir()
    if rank is not None:
        about = {"host": "127.0.0.1", "port": 1, "engine": "lmdeploy", "model_name": "a", "rank": rank}
        (folder / "api-server.json").write_text(json.dumps(about), encoding="utf-8")
    if node is not None:
        settings.write_text(json.dumps({"is_head": node}), encoding="utf-8")
    assert only_computes(folder, settings) is computes
    assert bool(learn(folder, "")["connections"]) is (rank == 0)
