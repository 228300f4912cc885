"""The modules chat_probe and engine_info: what they find, and what they say when something is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import host_look
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.openai_api import ApiFault, OpenAI, probe
from ansible_collections.selfhost.lmdeploy.plugins.modules import engine_info
from fake_engine import FakeEngine

KEY = "k" * 32


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    """An engine that answers."""
    with FakeEngine(model="smol", key=KEY) as made:
        yield made


def ask(engine: FakeEngine, model: str = "smol", key: str = KEY, *, guarded: bool = True) -> Any:
    """Probe the engine."""
    return probe(OpenAI(f"http://127.0.0.1:{engine.port}/v1", key, 5.0), model, "?", 16, guarded=guarded)


def test_a_probe_brings_the_answer(engine: FakeEngine) -> None:
    found = ask(engine)
    assert found.answer == "The capital of France is Paris."
    assert found.models == ["smol"]


def test_a_probe_tells_what_is_wrong_and_never_the_key(engine: FakeEngine) -> None:
    with pytest.raises(ApiFault, match="has no 'big', only smol"):
        ask(engine, model="big")
    with pytest.raises(ApiFault, match="401 instead of 200"):
        ask(engine, key="x" * 32)
    engine.health_status = 503
    with pytest.raises(ApiFault, match="HTTP 503 instead of 200") as caught:
        ask(engine)
    assert KEY not in str(caught.value)


def test_a_gateway_has_no_health_of_its_own(engine: FakeEngine) -> None:
    engine.health_status = 404
    server = OpenAI(f"http://127.0.0.1:{engine.port}", KEY, 5.0)
    assert probe(server, "smol", "?", 16, guarded=True, tells_health=False).answer


def test_an_engine_that_lets_everybody_in_is_a_fault(engine: FakeEngine) -> None:
    engine.guarded = False
    with pytest.raises(ApiFault, match="answers 200 without a key instead of 401"):
        ask(engine)


def test_a_dead_port_and_a_bad_url_are_faults() -> None:
    with pytest.raises(ApiFault, match="refused"):
        OpenAI("http://127.0.0.1:9").models()
    with pytest.raises(ApiFault, match="begins with http"):
        OpenAI("127.0.0.1:9")


def test_a_card_without_a_driver_is_still_a_card(tmp_path: Path) -> None:
    assert host_look.count_pci_cards(tmp_path) == 0
    for name, vendor, kind in (("0", "0x8086", "0x030000"), ("1", "0x10de", "0x040300")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    assert host_look.count_pci_cards(tmp_path) == 0, "an Intel card and the sound of an NVIDIA one"
    (tmp_path / "1/class").write_text("0x030200\n")
    assert host_look.count_pci_cards(tmp_path) == 1


def test_the_cards_that_a_unit_has_are_read_from_its_instance_file(tmp_path: Path) -> None:
    (tmp_path / "api-server-a.json").write_text('{"environment": {"CUDA_VISIBLE_DEVICES": "2,3"}}')
    (tmp_path / "api-server-b.json").write_text('{"environment": {}}')
    (tmp_path / "api-server-c.json").write_text('{"environment": {"CUDA_VISIBLE_DEVICES": "GPU-1"}}')
    (tmp_path / "api-server-d.json").write_text("[]")
    (tmp_path / "api-server-e.json").write_text("{broken")
    assert host_look.dealt_cards(tmp_path) == {"api-server-a.service": [2, 3]}
    assert host_look.dealt_cards(tmp_path / "none") == {}


def test_only_the_roles_own_units_are_found(tmp_path: Path) -> None:
    (tmp_path / "api-server-a.service").write_text("# Made by selfhost.lmdeploy.api_server: ...\n[Unit]\n")
    (tmp_path / "api-server-b.service").write_text("[Unit]\nDescription=by somebody else\n")
    (tmp_path / "other.service").write_text("# Made by selfhost.lmdeploy.api_server\n")
    assert engine_info.own_units(tmp_path) == ["api-server-a"]


def test_wsl_is_known_by_its_kernel(tmp_path: Path) -> None:
    release = tmp_path / "osrelease"
    release.write_text("6.6.87.2-microsoft-standard-WSL2\n")
    assert engine_info.is_wsl(release)
    release.write_text("6.8.0-51-generic\n")
    assert not engine_info.is_wsl(release)
