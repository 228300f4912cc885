"""What a node of a cluster of Ray is started with, and that its watch knows when to begin anew."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

PATH = Path(__file__).parents[2] / "roles" / "ray" / "files" / "ray_node.py"
SPEC = importlib.util.spec_from_file_location("ray_node", PATH)
assert SPEC
assert SPEC.loader
ray_node: Any = importlib.util.module_from_spec(SPEC)
sys.modules["ray_node"] = ray_node
SPEC.loader.exec_module(ray_node)

NODE: dict[str, Any] = {
    "address": "10.0.0.2",
    "head": "10.0.0.1:23400",
    "is_head": False,
    "first_port": "23400",
    "cpus": None,
    "gpus": "",
    "object_store_gib": None,
}


def test_every_port_of_a_node_is_a_known_one() -> None:
    words = ray_node.arguments(NODE)
    ports = sorted(int(word.rsplit("=", 1)[1]) for word in words if "-port=" in word)
    assert ports == [23401, 23402, 23403, 23404, 23405, 23406, 23410, 23499]
    assert "--address=10.0.0.1:23400" in words
    assert "--head" not in words


def test_the_head_waits_for_others_and_has_no_dashboard() -> None:
    words = ray_node.arguments({**NODE, "address": "10.0.0.1", "is_head": True})
    assert {"--head", "--port=23400", "--include-dashboard=false"} <= set(words)
    assert not [word for word in words if word.startswith("--address")]


def test_only_what_is_given_is_told() -> None:
    assert not [word for word in ray_node.arguments(NODE) if word.startswith(("--num", "--object-store-memory"))]
    words = ray_node.arguments({**NODE, "cpus": "4", "gpus": 0, "object_store_gib": "0.5"})
    assert {"--num-cpus=4", "--num-gpus=0", f"--object-store-memory={1 << 29}"} <= set(words)


@pytest.mark.parametrize("nodes", [[], ["10.0.0.1"], RuntimeError("no token")])
def test_a_node_that_the_head_has_lost_begins_anew(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gone from the list, or a head that does not answer: after a while the child is ended, and said why."""
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(ray_node.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(ray_node.time, "sleep", lambda _seconds: None)
    told: list[str] = []
    monkeypatch.setattr(ray_node, "tell", lambda _address, *lines: told.extend(lines))
    ended: list[bool] = []
    child = SimpleNamespace(poll=lambda: None, terminate=lambda: ended.append(True))
    watch = ray_node.Watch(NODE, child, "")
    answers = iter([["10.0.0.1", "10.0.0.2"]])

    def living() -> list[str]:
        now = next(answers, nodes)
        if isinstance(now, Exception):
            raise now
        return list(now)

    monkeypatch.setattr(watch, "living", living)
    watch.run()
    assert told[0] == "READY=1"
    assert ended == [True]
