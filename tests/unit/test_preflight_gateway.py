"""What preflight says of a gateway: ports, engines that it can't reach, and the role's own rules; and of backups."""

from __future__ import annotations

from typing import Any

import preflight_hosts as hosts
import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_desired import Desired, Peer

GATEWAY: dict[str, Any] = {
    "gateway_ca_certificate": "",
    "gateway_ca_key": "",
    "gateway_virtual_address": "",
    "gateway_virtual_gateways": [],
    "gateway_virtual_router": 51,
    "gateway_name": "gw.example.org",
    "gateway_host": "0.0.0.0",
    "gateway_port": 443,
    "gateway_local_port": 8444,
    "gateway_metrics_port": 8405,
    "gateway_engines": [],
    "gateway_web_uis": [],
    "gateway_api_paths": ["/v1/chat/completions"],
    "gateway_api_keys": [],
    "gateway_tls_certificate": "",
    "gateway_tls_key": "",
    "gateway_request_mib": 16,
    "gateway_engine_requests": 64,
    "gateway_connections": 1000,
    "gateway_timeout_seconds": 900,
    "gateway_queue_seconds": 120,
}


def gateway(**changes: Any) -> Desired:
    """Return a host that is a gateway and has a web interface."""
    peers = changes.pop("peers", (Peer("gpu1", ("10.0.0.2",)),))
    values = {**GATEWAY, **changes}
    return hosts.wish(_roles=frozenset({"gateway"}), _peers=peers, _locks={}, **values)


def test_a_gateway_takes_a_low_port() -> None:
    assert hosts.checks(gateway()) == set()


def test_its_ports_are_its_own() -> None:
    found = hosts.the("port_clash", gateway(gateway_metrics_port=8444))
    assert found.variable == "gateway_metrics_port"
    assert "gateway_local_port" in found.message
    assert hosts.the("port_range", gateway(gateway_port=70000)).variable == "gateway_port"


def test_an_engine_on_loopback_is_out_of_its_reach() -> None:
    found = hosts.the("loopback", gateway(peers=(Peer("gpu1", ("127.0.0.1",)),)))
    assert found.variable == "api_server_host of gpu1"
    assert "The gateway on box" in found.message
    assert "gateway_engines" in found.fix


def test_the_roles_own_rules_are_told_before_anything_changes() -> None:
    found = hosts.the("role_rule", gateway(gateway_api_keys=[{"name": "ann", "key": "too-short-a-key"}]))
    assert "gateway_api_keys[ann].key has 15 characters" in found.message
    assert "too-short-a-key" not in str(found)


BACKUP: dict[str, Any] = {
    "backup_dir": "/var/backups/open-webui",
    "backup_keep": 7,
    "backup_recipient": "",
    "backup_schedule": "*-*-* 03:15:00",
}


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("backup_dir", "/", "folder of its own"),
        ("backup_keep", 0, "one archive or more"),
        ("backup_recipient", "ssh-ed25519", "public key of age"),
        ("backup_schedule", "7", "oncalendar"),
        ("backup_schedule", "a b", "oncalendar"),
        ("backup_schedule", "", "oncalendar"),
    ],
)
def test_what_the_role_backup_would_refuse_is_told_beforehand(variable: str, value: Any, words: str) -> None:
    given = {**BACKUP, variable: value}
    found = hosts.the("role_rule", hosts.wish(_roles=frozenset({"backup"}), **given))
    assert found.variable == variable
    assert words in f"{found.message} {found.fix}".lower()


def test_a_schedule_can_not_bring_a_setting_of_its_own() -> None:
    found = hosts.the("hostile_text", hosts.wish(backup_schedule="daily\nUnit=other.service"))
    assert found.variable == "backup_schedule"


@pytest.mark.parametrize(
    "schedule",
    [
        "daily",
        "Mon..Fri 03:15",
        "Sat,Sun",
        "*-*-* 03:15:00 Europe/Berlin",
        "*-*-1 04:00 UTC",
        "*:0/15",
        "Sun *-*-* 2:00",
    ],
)
def test_a_schedule_that_systemd_takes_is_none_of_its_faults(schedule: str) -> None:
    assert hosts.checks(hosts.wish(_roles=frozenset({"backup"}), **{**BACKUP, "backup_schedule": schedule})) == set()


def test_a_name_that_no_file_system_takes_is_refused() -> None:
    assert hosts.the("path", hosts.wish(backup_copy_to="/mnt/" + "a" * 300)).variable == "backup_copy_to"


def test_an_address_that_no_gateway_can_share_is_told_before_anything_changes() -> None:
    found = hosts.the("role_rule", gateway(gateway_virtual_address="10.0.0.20", gateway_host="10.0.0.1"))
    assert found.variable == "gateway_host"
    assert "gateway_virtual_address 10.0.0.20 is not answered" in found.message
