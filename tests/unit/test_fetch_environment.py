"""From mirrors to the environment of downloads, and the addresses that are refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.selfhost.lmdeploy.plugins.filter.fetch_environment import FilterModule

fetch_environment = FilterModule().filters()["fetch_environment"]


def test_nothing_given_adds_nothing() -> None:
    """The official places need no environment."""
    empty = {"pip_index_url": "", "ca_file": "", "offline": False, "http_proxy": None, "modelscope_enabled": False}
    assert fetch_environment(empty) == {}
    assert fetch_environment({}) == {}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"pip_index_url": "https://pypi.example.org/simple/"},
            {"PIP_INDEX_URL": "https://pypi.example.org/simple", "UV_DEFAULT_INDEX": "https://pypi.example.org/simple"},
        ),
        ({"pip_index_url": "file:///srv/index"}, {"PIP_INDEX_URL": "file:///srv/index"}),
        ({"hf_endpoint": "http://hub.example.org:8090"}, {"HF_ENDPOINT": "http://hub.example.org:8090"}),
        (
            {"https_proxy": "http://user:secret@proxy.example.org:3128", "no_proxy": "localhost,.example.org"},
            {
                "HTTPS_PROXY": "http://user:secret@proxy.example.org:3128",
                "https_proxy": "http://user:secret@proxy.example.org:3128",
                "NO_PROXY": "localhost,.example.org",
                "no_proxy": "localhost,.example.org",
            },
        ),
        ({"ca_file": "/home/me/ca.pem"}, {"SSL_CERT_FILE": "/etc/ssl/certs/ca-certificates.crt"}),
        ({"modelscope_enabled": True}, {"LMDEPLOY_USE_MODELSCOPE": "True"}),
        ({"offline": True}, {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}),
    ],
)
def test_each_setting_reaches_its_tools(settings: dict[str, Any], expected: dict[str, str]) -> None:
    """Every tool reads its own variable."""
    assert expected.items() <= fetch_environment(settings).items()


def test_the_host_trusts_not_the_controllers_file() -> None:
    """The path on the controller means nothing on the host."""
    assert "/home/me/ca.pem" not in fetch_environment({"ca_file": "/home/me/ca.pem"}).values()


def test_a_hub_of_ones_own_is_asked_although_offline() -> None:
    """Offline means without the internet."""
    environment = fetch_environment({"offline": True, "hf_endpoint": "http://hub.example.org"})
    assert "HF_HUB_OFFLINE" not in environment


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pip_index_url", "pypi.example.org/simple"),
        ("pip_index_url", "ftp://pypi.example.org"),
        ("pip_index_url", "file://"),
        ("hf_endpoint", "file:///srv/hub"),
        ("hf_endpoint", "https://"),
        ("hf_endpoint", "https://[hub"),
        ("http_proxy", "proxy.example.org:3128"),
    ],
)
def test_an_address_that_nothing_can_be_fetched_from_is_named(name: str, value: str) -> None:
    """The message holds the variable and its value."""
    with pytest.raises(AnsibleFilterError, match=re.escape(f"mirrors_{name} is '{value}'")):
        fetch_environment({name: value})


def test_all_bad_addresses_are_named_at_once() -> None:
    """Two faults, one message."""
    with pytest.raises(AnsibleFilterError, match=r"mirrors_pip_index_url.*mirrors_https_proxy"):
        fetch_environment({"pip_index_url": "x", "https_proxy": "y"})
