"""What the gateway's configuration is made of: grouping by model, names, and faults without keys."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.filter.gateway_engines import gateway_engines
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import gateway

KEY = "k" * 32


def engine(name: str, **changes: Any) -> dict[str, Any]:
    """Return an engine that is right."""
    return {"name": name, "address": "192.0.2.1", "port": 23333, "model": "m", "api_key": "secret-of-engine", **changes}


def variables(**changes: Any) -> dict[str, Any]:
    """Return variables that are right."""
    return {
        "name": "gw.example.org",
        "host": "0.0.0.0",
        "engines": [engine("a-1")],
        "web_uis": [{"name": "ui", "address": "127.0.0.1", "port": 8080}],
        "api_paths": ["/v1/chat/completions"],
        "api_keys": [{"name": "alice", "key": KEY}],
        "tls_certificate": "",
        "tls_key": "",
        "ca_certificate": "",
        "ca_key": "",
        "virtual_address": "",
        "virtual_gateways": [],
        "virtual_router": 51,
        "request_mib": 16,
        "engine_requests": 8,
        "connections": 100,
        "timeout_seconds": 10,
        "queue_seconds": 10,
        **changes,
    }


def test_engines_of_one_model_share_a_backend() -> None:
    engines = [engine("b-1", model="org/m"), engine("a-1", address="::1", requests=2), engine("c-1")]
    plan = gateway.plan(variables(engines=engines))
    assert [(m["name"], m["backend"], [e["name"] for e in m["engines"]]) for m in plan["models"]] == [
        ("m", "model_m", ["a-1", "c-1"]),
        ("org/m", "model_org-m", ["b-1"]),
    ]
    first, second = plan["models"][0]["engines"]
    assert (first["target"], first["requests"], second["requests"]) == ("[::1]", 2, 8)
    assert [model["id"] for model in json.loads(plan["models_json"])["data"]] == ["m", "org/m"]


def test_models_whose_names_look_alike_have_backends_of_their_own() -> None:
    plan = gateway.plan(variables(engines=[engine("a-1", model="o/m"), engine("b-1", model="o-m")]))
    assert len({model["backend"] for model in plan["models"]}) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engines": [engine("a b")]}, "gateway_engines[a b].name"),
        ({"engines": [engine("a", address="1.2.3.4\nbind *:1")]}, "gateway_engines[a].address"),
        ({"engines": [engine("a", model="m } bind")]}, "gateway_engines[a].model"),
        ({"engines": [engine("a", port=0)]}, "gateway_engines[a].port is 0"),
        ({"engines": [engine("a", api_key='x"y')]}, "gateway_engines[a].api_key"),
        ({"engines": [engine("a"), engine("a")]}, "the name a twice"),
        ({"api_keys": [{"name": "alice", "key": "short"}]}, "gateway_api_keys[alice].key has 5 characters"),
        ({"api_keys": [{"name": "a\nb", "key": KEY}]}, ".name is no name"),
        ({"api_keys": [{"name": "a", "key": KEY}, {"name": "b", "key": KEY}]}, "one key under two names"),
        ({"name": "gw example"}, "gateway_name is 'gw example'"),
        ({"host": "\u6a21\u578b"}, "gateway_host is"),
        ({"web_uis": [{"name": "ui", "address": "", "port": 1}]}, "gateway_web_uis"),
        ({"api_paths": ["/terminate"]}, "gateway_api_paths has '/terminate'"),
        ({"api_paths": ["/v1/../terminate"]}, "gateway_api_paths has '/v1/../terminate'"),
        ({"tls_certificate": "pem"}, "belong together"),
        ({"ca_certificate": "pem"}, "gateway_ca_certificate and gateway_ca_key belong together"),
        ({"virtual_address": "192.0.2.20", "host": "192.0.2.10"}, "gateway_host is 192.0.2.10"),
        ({"request_mib": 0}, "gateway_request_mib is 0"),
        ({"queue_seconds": 0}, "gateway_queue_seconds is 0"),
    ],
)
def test_a_fault_names_its_variable(changes: dict[str, Any], words: str) -> None:
    found = gateway.faults(variables(**changes))
    assert any(words in sentence for sentence in found), found
    assert "secret-of-engine" not in str(found)
    assert KEY not in str(found)


def test_what_is_right_has_no_fault() -> None:
    assert gateway.faults(variables()) == []


def test_all_faults_come_at_once() -> None:
    with pytest.raises(gateway.GatewayFault) as raised:
        gateway.plan(variables(name="", request_mib=0))
    assert len(str(raised.value).splitlines()) == 2


def test_engines_of_all_hosts_get_names_from_host_and_port() -> None:
    found = {
        "engines": [{"engine": "lmdeploy", "model": "m", "url": "http://[2001:db8::1]:1/v1"}],
        "connections": [{"url": "http://[2001:db8::1]:1/v1", "api_key": "k"}],
    }
    entry = {"name": "gpu-1-1", "address": "2001:db8::1", "port": 1, "model": "m", "api_key": "k"}
    assert gateway_engines([found, {"skipped": True}], ["gpu-1", "gpu-2"]) == [entry]


def test_a_host_with_room_has_a_second_entry_that_is_asked_last() -> None:
    found = {
        "engines": [{"engine": "lmdeploy", "model": "m", "url": "http://10.0.0.1:23333/v1"}],
        "connections": [{"url": "http://10.0.0.1:23333/v1", "api_key": "k"}],
    }
    engines = gateway_engines([found, found], ["gpu-1", "gpu-2"], [1000, 0])
    assert [(entry["name"], entry["port"], entry.get("reserve")) for entry in engines] == [
        ("gpu-1-23333", 23333, None),
        ("gpu-1-twin-24333", 24333, True),
        ("gpu-2-23333", 23333, None),
    ]
    assert gateway.faults(variables(engines=engines)) == []
