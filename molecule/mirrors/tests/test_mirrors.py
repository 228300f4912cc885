"""What people notice of the mirrors: a server with the company's certificate is believed, or is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = "/root/company"
TRUSTED = "python3 -c \"import urllib.request; urllib.request.urlopen('https://localhost:8443/', timeout=10)\""
# A server is certified by an authority of its own; the authority's key is gone at once.
MAKE = f"""set -e; mkdir -p {FOLDER}; cd {FOLDER}
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj '/CN=Company CA' -keyout ca.key -out ca.crt 2>/dev/null
openssl req -newkey rsa:2048 -nodes -subj '/CN=localhost' -keyout server.key -out server.csr 2>/dev/null
printf 'subjectAltName=DNS:localhost' > names
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.crt
rm ca.key"""
SERVE = f"""import http.server, ssl
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("{FOLDER}/server.crt", "{FOLDER}/server.key")
server = http.server.HTTPServer(("127.0.0.1", 8443), http.server.SimpleHTTPRequestHandler)
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


@pytest.fixture
def company(host: Any, tmp_path: Path) -> Iterator[str]:
    """Run a server that only the company's authority vouches for; return the authority's certificate here."""
    if not host.file(f"{FOLDER}/server.crt").exists:
        host.run_expect([0], MAKE)
        host.run_expect([0], f"cat > {FOLDER}/serve.py <<'E'\n{SERVE}E")
    host.run("systemctl stop company.service")
    host.run_expect([0], f"systemd-run --collect --unit company --working-directory /srv python3 {FOLDER}/serve.py")
    host.run_expect([0], "timeout 20 sh -c 'until ss -ltn | grep -q 127.0.0.1:8443; do sleep 0.2; done'")
    certificate = tmp_path / "company.pem"
    certificate.write_text(f"# Two lines of text\n{host.file(f'{FOLDER}/ca.crt').content_string}")
    yield str(certificate)
    host.run("systemctl stop company.service")


def test_a_company_server_is_trusted_while_the_variable_says_so(
    host: Any, play: Callable[..., Any], company: str
) -> None:
    """Refused before, believed after, nothing to do a second time, and refused again without the variable."""
    own = host.file("/etc/ssl/certs/ca-certificates.crt").content_string
    assert "certificate verify failed" in host.run(TRUSTED).stderr
    assert play("mirrors", check=True, mirrors_ca_file=company).changed() == 1
    assert host.run(TRUSTED).rc == 1
    assert play("mirrors", mirrors_ca_file=company).changed() == 1
    assert host.run(TRUSTED).rc == 0
    assert play("mirrors", mirrors_ca_file=company).changed() == 0
    assert play("mirrors", mirrors_ca_file="").changed() == 1
    assert "certificate verify failed" in host.run(TRUSTED).stderr
    # What the machine's own inventory names comes back, and nothing else is different.
    play("mirrors")
    assert host.file("/etc/ssl/certs/ca-certificates.crt").content_string == own


def test_a_cut_off_run_is_mended(host: Any, play: Callable[..., Any], company: str) -> None:
    """The certificate lay in its place but the bundle was not made: the next run makes it."""
    assert play("mirrors", mirrors_ca_file=company).changed() == 1
    host.run_expect(
        [0], "head -n 1 /etc/ssl/certs/ca-certificates.crt > /root/b && cp /root/b /etc/ssl/certs/ca-certificates.crt"
    )
    assert play("mirrors", mirrors_ca_file=company).changed() == 1
    assert host.run(TRUSTED).rc == 0


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("mirrors_ca_file", "/nowhere/ca.pem", "/nowhere/ca.pem"),
        ("mirrors_pip_index_url", "pypi.example.org/simple", "mirrors_pip_index_url is 'pypi.example.org/simple'"),
    ],
)
def test_a_bad_value_is_named(play: Callable[..., Any], variable: str, value: str, words: str) -> None:
    """The message holds the variable and its value."""
    assert words in play("mirrors", **{variable: value}).message()


def test_a_private_key_is_not_carried_to_hosts(play: Callable[..., Any], tmp_path: Path) -> None:
    """A file that holds a key as well is refused."""
    both = tmp_path / "both.pem"
    both.write_text("-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n-----BEGIN PRIVATE KEY-----\n")
    assert "hold a private key" in play("mirrors", mirrors_ca_file=str(both)).message()


def test_uninstall_takes_the_trust_back(host: Any, play: Callable[..., Any], company: str) -> None:
    """Afterwards the server is a stranger again."""
    play("mirrors", mirrors_ca_file=company)
    assert play("mirrors", "uninstall").changed() == 1
    assert "certificate verify failed" in host.run(TRUSTED).stderr
    assert play("mirrors", "uninstall").changed() == 0
