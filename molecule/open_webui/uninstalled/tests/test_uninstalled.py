"""After the removal: what was installed is gone, accounts and chats and the secrets that belong to them are there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from testinfra.host import Host


@pytest.mark.parametrize(
    "path",
    [
        "/etc/systemd/system/open-webui.service",
        "/opt/miniconda3/envs/open-webui",
        "/opt/miniconda3/releases/open-webui",
        "/usr/local/lib/open-webui",
        "/var/cache/open-webui",
    ],
)
def test_what_was_installed_is_gone(host: Host, path: str) -> None:
    assert not host.file(path).exists


def test_nothing_runs_and_systemd_knows_no_unit(host: Host) -> None:
    assert host.run("pgrep -u open-webui").rc == 1
    assert host.check_output("systemctl show open-webui.service --property=LoadState --value") == "not-found"


@pytest.mark.parametrize(
    "path", ["/var/lib/open-webui/data/webui.db", "/etc/open-webui/secret-key", "/etc/open-webui/admin-password"]
)
def test_what_people_made_is_there(host: Host, path: str) -> None:
    assert host.file(path).exists
