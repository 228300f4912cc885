# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""A small certificate authority and its one server certificate, made by the program openssl that every host has."""

from __future__ import annotations

import ipaddress
import os
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

DAY_SECONDS = 86400
# Browsers refuse server certificates of more than 398 days.
LONGEST_DAYS = 397
CA_DAYS = 3650
COMMAND_SECONDS = 60


class TlsFault(Exception):
    """A certificate or key that does not do; the text holds no key."""


def openssl(*arguments: str, data: str = "") -> str:
    """Run openssl and return what it printed; a failure raises with its last line."""
    done = subprocess.run(
        ["openssl", *arguments], input=data, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        message = f"openssl {arguments[0]}: {last}"
        raise TlsFault(message)
    return done.stdout


def alternative_names(names: list[str]) -> str:
    """Return names and addresses as a certificate's extension takes them."""
    kinds = []
    for name in names:
        try:
            kinds.append(f"IP:{ipaddress.ip_address(name)}")
        except ValueError:
            kinds.append(f"DNS:{name}")
    return ",".join(kinds)


@contextmanager
def private_folder() -> Iterator[Path]:
    """Have a folder that only we enter, for files that openssl wants by name."""
    with tempfile.TemporaryDirectory(prefix="gateway.") as name:
        yield Path(name)


def new_key() -> str:
    """Return a new private key (PEM)."""
    return openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")


def _written(path: Path, text: str) -> str:
    """Write a file that only we read, and return its name."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    return str(path)


def new_authority(name: str) -> tuple[str, str]:
    """Return key and certificate (PEM) of a new authority, which signs servers and no other authorities."""
    key = new_key()
    with private_folder() as folder:
        certificate = openssl(
            *("req", "-x509", "-new", "-sha256", "-key", _written(folder / "key", key)),
            *("-days", str(CA_DAYS), "-subj", f"/CN={name[:64]}"),
            *("-addext", "basicConstraints=critical,CA:TRUE,pathlen:0", "-addext", "keyUsage=critical,keyCertSign"),
        )
    return key, certificate


def sign(authority_key: str, authority: str, names: list[str]) -> tuple[str, str]:
    """Return key and certificate (PEM) of a server with these names."""
    key = new_key()
    lines = [
        "basicConstraints=critical,CA:FALSE",
        "keyUsage=critical,digitalSignature",
        "extendedKeyUsage=serverAuth",
        "subjectKeyIdentifier=hash",
        "authorityKeyIdentifier=keyid",
        f"subjectAltName={alternative_names(names)}",
    ]
    with private_folder() as folder:
        request = openssl(
            "req", "-new", "-sha256", "-key", _written(folder / "key", key), "-subj", f"/CN={names[0][:64]}"
        )
        certificate = openssl(
            *("x509", "-req", "-sha256", "-days", str(LONGEST_DAYS)),
            *(
                "-in",
                _written(folder / "request", request),
                "-extfile",
                _written(folder / "extensions", "\n".join(lines)),
            ),
            *("-CA", _written(folder / "ca", authority), "-CAkey", _written(folder / "ca-key", authority_key)),
            *("-set_serial", f"0x{os.urandom(16).hex()}"),
        )
    return key, certificate


def belongs(key: str, certificate: str) -> bool:
    """Tell whether a private key is that of the first certificate."""
    return openssl("pkey", "-pubout", data=key) == openssl("x509", "-noout", "-pubkey", data=certificate)


def lasts(certificate: str, days: int) -> bool:
    """Tell whether the first certificate is good for this many days more."""
    try:
        openssl("x509", "-noout", "-checkend", str(days * DAY_SECONDS), data=certificate)
    except TlsFault:
        return False
    return True


def names_of(certificate: str) -> set[str]:
    """Return the names and addresses in the first certificate."""
    shown = openssl("x509", "-noout", "-ext", "subjectAltName", data=certificate)
    found = set()
    for word in shown.replace("\n", ",").split(","):
        kind, _colon, value = word.strip().partition(":")
        if kind == "DNS":
            found.add(value)
        elif kind == "IP Address":
            found.add(str(ipaddress.ip_address(value)))
    return found


def is_signed(certificate: str, authority: str) -> bool:
    """Tell whether an authority signed the first certificate."""
    with private_folder() as folder:
        try:
            openssl("verify", "-CAfile", _written(folder / "ca", authority), _written(folder / "crt", certificate))
        except TlsFault:
            return False
    return True


def why_not(pem: str | None, authority: str | None, names: list[str], days: int) -> str:
    """Return why a server's PEM file (certificate and key) must be made anew, or nothing."""
    if authority is None or pem is None:
        return "there is none"
    try:
        if not is_signed(pem, authority):
            return "another authority signed it"
        if not lasts(pem, days):
            return f"it ends within {days} days"
        if names_of(pem) != {_normal(name) for name in names}:
            return "it has other names"
        return "" if belongs(pem, pem) else "its key is another's"
    except TlsFault as fault:
        return str(fault)


def _normal(name: str) -> str:
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name


def _judge_pair(prefix: str, certificate: str, key: str, fix: str) -> None:
    """Raise unless the variables ``prefix``_certificate and ``prefix``_key are texts that belong together."""
    try:
        fits = belongs(key, certificate)
    except TlsFault as fault:
        message = f"{prefix}_certificate or {prefix}_key is no PEM text: {fault}"
        raise TlsFault(message) from fault
    if not fits:
        message = f"{prefix}_key is not the key of {prefix}_certificate: {fix}"
        raise TlsFault(message)


def judge_authority(certificate: str, key: str) -> None:
    """Raise with what is wrong with an authority that a person gave."""
    _judge_pair("gateway_ca", certificate, key, "give the two that belong together")
    if not lasts(certificate, LONGEST_DAYS):
        message = f"gateway_ca_certificate ends within {LONGEST_DAYS} days, before what it signs: give a longer one"
        raise TlsFault(message)


def given(certificate: str, key: str) -> str:
    """Return the PEM file of a certificate and key that a person gave, or raise with what is wrong with them."""
    _judge_pair("gateway_tls", certificate, key, "the server's own certificate comes first")
    if not lasts(certificate, 0):
        message = "gateway_tls_certificate has ended: give a new one"
        raise TlsFault(message)
    return f"{certificate.strip()}\n{key.strip()}\n"
