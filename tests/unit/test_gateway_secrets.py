"""The module gateway_secrets: certificates that openssl finds good, keys as digests, and no change twice."""

from __future__ import annotations

import grp
import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import gateway_tls as tls
from ansible_collections.selfhost.lmdeploy.plugins.modules import gateway_secrets

GROUP = grp.getgrgid(os.getgid()).gr_name
NAMES = ["gw.example.org", "192.0.2.10", "2001:db8::1"]


def have(folder: Path, *, dry: bool = False, **changes: Any) -> dict[str, Any]:
    """Run the module's work in a folder."""
    params = {
        "dir": str(folder / "gateway"),
        "group": GROUP,
        "names": NAMES,
        "certificate": "",
        "private_key": "",
        "ca_certificate": "",
        "ca_key": "",
        "api_keys": [],
        "renewed_days": 30,
        **changes,
    }
    return gateway_secrets.converge(params, dry=dry)


def left(folder: Path, name: str) -> str:
    """Return a file of the gateway's folder."""
    return (folder / "gateway" / name).read_text(encoding="utf-8")


def test_a_client_that_trusts_the_authority_trusts_every_name(tmp_path: Path) -> None:
    assert have(tmp_path, dry=True)["changed"]
    assert not (tmp_path / "gateway").exists()
    assert have(tmp_path)["changed"]
    for option, name in (("-verify_hostname", "gw.example.org"), ("-verify_ip", "2001:db8::1")):
        verify = ["openssl", "verify", "-purpose", "sslserver", "-CAfile", str(tmp_path / "gateway/ca.crt")]
        subprocess.run([*verify, option, name, str(tmp_path / "gateway/gateway.pem")], check=True, capture_output=True)
    assert have(tmp_path) == {"changed": False, "changes": [], "written": []}


def test_only_root_reads_what_the_service_need_not(tmp_path: Path) -> None:
    have(tmp_path)
    modes = {name: (tmp_path / "gateway" / name).stat().st_mode & 0o777 for name in (*gateway_secrets.MODES, "private")}
    assert modes == {
        "ca.crt": 0o644,
        "gateway.pem": 0o640,
        "keys.map": 0o640,
        "private/ca.key": 0o600,
        "private/api-key": 0o600,
        "private": 0o700,
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"names": ["other.example.org"]}, "it has other names"), ({"renewed_days": 398}, "it ends within 398 days")],
)
def test_a_certificate_is_renewed_and_its_authority_stays(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    have(tmp_path)
    authority, certificate = left(tmp_path, "ca.crt"), left(tmp_path, "gateway.pem")
    assert have(tmp_path, **changes)["changes"] == [f"certificate: {reason}"]
    assert left(tmp_path, "ca.crt") == authority
    assert left(tmp_path, "gateway.pem") != certificate


def test_a_damaged_certificate_is_made_anew(tmp_path: Path) -> None:
    have(tmp_path)
    (tmp_path / "gateway/gateway.pem").write_text("damaged", encoding="utf-8")
    assert have(tmp_path)["changed"]
    assert not have(tmp_path)["changed"]


def test_a_given_certificate_is_taken_and_a_wrong_key_refused(tmp_path: Path) -> None:
    authority_key, authority = tls.new_authority("test")
    key, certificate = tls.sign(authority_key, authority, NAMES)
    have(tmp_path, certificate=certificate + authority, private_key=key)
    assert left(tmp_path, "gateway.pem") == certificate + authority + key
    assert not (tmp_path / "gateway/ca.crt").exists()
    with pytest.raises(tls.TlsFault, match="is not the key of"):
        have(tmp_path, certificate=certificate, private_key=authority_key)
    with pytest.raises(tls.TlsFault, match="no PEM text"):
        have(tmp_path, certificate="nonsense", private_key=key)
    assert left(tmp_path, "gateway.pem") == certificate + authority + key


def test_gateways_of_one_authority_are_trusted_by_the_same_clients(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    have(first)
    shared: dict[str, Any] = {
        "ca_certificate": left(first, "ca.crt").strip(),
        "ca_key": left(first, "private/ca.key").strip(),
    }
    assert have(second, **shared)["changes"][0].startswith("authority: another one is given")
    assert (left(second, "ca.crt"), left(second, "private/ca.key")) == (
        left(first, "ca.crt"),
        left(first, "private/ca.key"),
    )
    assert left(second, "gateway.pem") != left(first, "gateway.pem")
    assert tls.is_signed(left(second, "gateway.pem"), left(first, "ca.crt"))
    assert not have(second, **shared)["changed"]
    # Where the first is gone, the second goes on with it.
    assert not have(second)["changed"]
    with pytest.raises(tls.TlsFault, match="is not the key of gateway_ca_certificate"):
        have(second, ca_certificate=tls.new_authority("other")[1], ca_key=shared["ca_key"])


def test_a_generated_key_stays_and_its_digest_is_known(tmp_path: Path) -> None:
    have(tmp_path)
    key = left(tmp_path, "private/api-key").strip()
    assert len(key) == 48
    assert left(tmp_path, "keys.map") == f"{hashlib.sha256(key.encode()).hexdigest().upper()} default\n"
    have(tmp_path)
    assert left(tmp_path, "private/api-key").strip() == key


def test_two_keys_are_good_at_once(tmp_path: Path) -> None:
    have(tmp_path)
    keys = [{"name": "new", "key": "n" * 32}, {"name": "old", "key": "o" * 32}]
    assert have(tmp_path, api_keys=keys)["changes"] == ["keys: new, old"]
    assert [line.split()[1] for line in left(tmp_path, "keys.map").splitlines()] == ["new", "old"]
    assert "nnnn" not in left(tmp_path, "keys.map")
    assert left(tmp_path, "private/api-key") == "n" * 32 + "\n"


def test_check_mode_takes_a_missing_group_for_a_change_and_a_real_run_refuses_it(tmp_path: Path) -> None:
    assert have(tmp_path, dry=True, group="no-such-group")["changed"]
    with pytest.raises(OSError, match="there is no group no-such-group"):
        have(tmp_path, group="no-such-group")
