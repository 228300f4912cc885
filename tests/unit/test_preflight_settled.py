"""Who is wanted as before: what counts of the inventory, of the host's cards, and of other hosts."""

from __future__ import annotations

from typing import Any

import preflight_hosts as hosts
import pytest
from ansible_collections.selfhost.lmdeploy.plugins.filter.hosts_to_do import hosts_to_do
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import preflight_settled as settled


def told(wanted: str = "w", seen: str = "s", others: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    """Return what preflight tells of a host that has no note yet."""
    own = {"wanted": wanted, "seen": seen, "note": {}, "time": 2000.0, "others": list(others), "hours": 24}
    return {**own, "run": settled.RUN, **changes}


def noted(fleet: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the fleet after a whole run that found nothing to change: every host has its note."""
    _settled, wanted = settled.settle(fleet)
    return {
        name: {**own, "note": {"seen": own["seen"], "wanted": {wanted[name]: 1000.0}}} for name, own in fleet.items()
    }


FLEET = {"gpu1": told("w1"), "gpu2": told("w2"), "gate": told("w3", others=("gpu1", "gpu2", "gate"))}


def test_without_a_note_nobody_is_left_alone() -> None:
    assert settled.settle(FLEET)[0] == []


def test_with_it_all_are() -> None:
    assert settled.settle(noted(FLEET))[0] == ["gpu1", "gpu2", "gate"]


@pytest.mark.parametrize("change", [{"wanted": "other"}, {"seen": "other"}])
def test_a_gateway_is_looked_at_when_an_engine_is_another(change: dict[str, str]) -> None:
    fleet = noted(FLEET)
    fleet["gpu1"].update(change)
    assert settled.settle(fleet)[0] == ["gpu2"]


def test_a_gateway_alone_in_a_run_does_not_know() -> None:
    found, wanted = settled.settle({"gate": noted(FLEET)["gate"]})
    assert (found, wanted["gate"]) == ([], "")


def test_facts_of_an_earlier_run_tell_nothing() -> None:
    fleet = noted(FLEET)
    fleet["gpu1"]["run"] = "earlier"
    assert settled.settle(fleet)[0] == ["gpu2"]


def test_a_host_more_or_less_counts_for_the_gateway() -> None:
    fleet = noted(FLEET)
    fleet["gate"]["others"] = ["gpu1", "gate"]
    assert settled.settle(fleet)[0] == ["gpu1", "gpu2"]


@pytest.mark.parametrize("lost", ["wanted", "seen"])
def test_who_is_always_looked_at_has_no_peace_for_his_gateway_either(lost: str) -> None:
    fleet = noted({**FLEET, "gpu1": {**told("w1"), lost: ""}})
    assert settled.settle(fleet)[0] == ["gpu2"]


def test_variables_of_the_run_do_not_count() -> None:
    run = {
        "ansible_check_mode": True,
        "omit": "x9",
        "playbook_dir": "/a",
        "preflight_roles": [],
        "__x": 1,
        "groups": {},
    }
    own = {"ansible_host": "10.0.0.1", "api_server_port": 1, "mine": 2}
    assert settled.of_the_inventory({**run, **own}) == own


def test_texts_are_found_wherever_they_are() -> None:
    assert [*settled.texts({"a": ["x", {"b": "y"}], "c": 1, "d": "z"})] == ["x", "y", "z"]


def test_conda_models_and_folders_are_watched() -> None:
    found = settled.watched(hosts.wish(model_weights_dir="/srv/models", miniconda_prefix="/opt/conda"))
    assert "/srv/models" in found["trees"]
    assert found["prefix"] == "/opt/conda"


@pytest.mark.parametrize(
    "values",
    [{"api_server_nodes": ["10.0.0.1"]}, {"open_webui_database": "postgresql"}, {"api_server_verified": "always"}],
)
def test_where_files_do_not_tell_the_roles_always_look(values: dict[str, Any]) -> None:
    assert settled.always_looked_at(hosts.wish(**values), hosts.host())
    assert not settled.always_looked_at(hosts.wish(), hosts.host())


def test_a_lost_card_counts_and_its_used_memory_does_not() -> None:
    def with_card(**changes: Any) -> list[Any]:
        gpu = hosts.machine("h100")
        return settled.hardware(hosts.host(gpu={**gpu, "cards": [{**card, **changes} for card in gpu["cards"]]}))

    assert with_card() == with_card(used_mib=77)
    assert with_card() != with_card(fault="GPU is lost")


def test_plays_have_whoever_is_left() -> None:
    groups = {"a": ["x", "y"], "b": ["y", "z"]}
    site = {"ansible_facts": {"site_settled": {"hosts": ["y"], "wanted": {}}}}
    assert hosts_to_do(["a", "b", "c"], groups, {}) == ["x", "y", "z"]
    # A host outside of the run's limit knows nothing.
    assert hosts_to_do(["a", "b"], groups, {"x": {}, "y": site, "z": site}) == ["x", "z"]
    site["ansible_facts"]["site_settled"]["hosts"] = ["x", "y"]
    assert hosts_to_do(["a"], groups, {"x": site, "y": site}) == ["all:!all"]
    assert hosts_to_do(["c"], groups, {}) == ["all:!all"]
