# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""A certificate with its key that is good for one run."""

from __future__ import annotations

DOCUMENTATION = r"""
name: run_certificate
short_description: Return a new certificate with its key, for what hosts tell each other in one run
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Makes a key and a certificate that it signs itself, with the library that ansible-core brings, on the controller and
    in memory only. All hosts of a run get the same; who has it belongs to the run.
  - The result is a secret, so the task that uses it wants C(no_log).
options:
  _terms:
    description: Name that the certificate carries.
    type: list
    elements: str
    required: true
"""

EXAMPLES = r"""
- name: Make a secret for this run
  ansible.builtin.set_fact:
    certificate: "{{ lookup('selfhost.lmdeploy.run_certificate', 'model-share') }}"
  run_once: true
  no_log: true
"""

RETURN = r"""
_raw:
  description: Certificate and key, PEM.
  type: list
  elements: str
"""

import datetime as dt
from typing import Any

from ansible.errors import AnsibleLookupError
from ansible.plugins.lookup import LookupBase

try:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID
except ImportError as error:
    # ansible-core brings it; some distributions take it apart.
    MISSING = str(error)
else:
    MISSING = ""

# Clocks of hosts differ, and a large model takes its time.
BEFORE = dt.timedelta(days=1)
AFTER = dt.timedelta(days=7)


def run_certificate(name: str) -> str:
    """Return a new certificate and its key as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BEFORE)
        .not_valid_after(now + AFTER)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    secret = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return (certificate.public_bytes(encoding) + secret).decode()


class LookupModule(LookupBase):  # type: ignore[misc] # ansible-core carries no types
    """Ansible's way in."""

    def run(self, terms: list[str], variables: dict[str, Any] | None = None, **_options: Any) -> list[str]:
        """Return one certificate for each name."""
        if MISSING:
            raise AnsibleLookupError(f"{MISSING}: install the Python package cryptography on the controller")
        return [run_certificate(str(term)) for term in terms]
