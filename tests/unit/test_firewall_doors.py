"""The doors of a host are those that its inventory opens, and no other."""

from __future__ import annotations

from ansible_collections.selfhost.lmdeploy.plugins.filter.firewall_doors import firewall_doors


def test_what_listens_on_loopback_needs_no_door() -> None:
    assert firewall_doors({}, ["model_servers", "web_uis"]) == []
    assert (
        firewall_doors({"api_server_host": "::1", "open_webui_host": "localhost"}, ["model_servers", "web_uis"]) == []
    )


def test_a_gateway_has_its_tls_port() -> None:
    assert firewall_doors({}, ["gateways", "model_servers"]) == [{"port": 443, "networks": []}]
    assert firewall_doors({"gateway_port": "8443"}, ["gateways"]) == [{"port": 8443, "networks": []}]


def test_engines_are_open_for_their_networks_alone() -> None:
    instances = [{"name": "a", "port": 23334}, {"name": "b", "port": 23335, "host": "127.0.0.1"}]
    variables = {
        "api_server_host": "10.0.0.5",
        "api_server_allowed_networks": ["10.0.0.0/24"],
        "api_server_instances": instances,
    }
    assert firewall_doors(variables, ["model_servers"]) == [{"port": 23334, "networks": ["10.0.0.0/24"]}]


def test_an_interface_that_listens_for_others_is_open() -> None:
    assert firewall_doors({"open_webui_host": "0.0.0.0"}, ["web_uis"]) == [{"port": 8080, "networks": []}]


def test_a_twin_has_a_door_too() -> None:
    variables = {"api_server_host": "10.0.0.5", "api_server_twin_port_offset": 1000}
    assert [door["port"] for door in firewall_doors(variables, ["model_servers"])] == [23333, 24333]
