"""The filter local_url: a host reaches its own service wherever that listens."""

from __future__ import annotations

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.filter import local_url


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8080"),
        ("0.0.0.0", "http://127.0.0.1:8080"),
        ("::", "http://[::1]:8080"),
        ("fd00::7", "http://[fd00::7]:8080"),
        ("10.0.0.7", "http://10.0.0.7:8080"),
        ("ui.example.org", "http://ui.example.org:8080"),
    ],
)
def test_the_probe_goes_where_the_server_listens(host: str, url: str) -> None:
    assert local_url.FilterModule().filters()["local_url"](host, 8080) == url
