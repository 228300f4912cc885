# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""From the mirrors of an inventory to the environment that pip, uv, conda, requests and the model hubs understand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ansible.module_utils.parsing.convert_bool import boolean
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.addresses import split_address

if TYPE_CHECKING:
    from collections.abc import Mapping

# The host's trust store, where update-ca-certificates puts every CA. Python's own tools bring their own store
# and have to be told of this one.
TRUST_STORE = "/etc/ssl/certs/ca-certificates.crt"
TRUST_VARIABLES = (
    "CONDA_SSL_VERIFY",
    "CURL_CA_BUNDLE",
    "PIP_CERT",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_FILE",
)
ADDRESSES = {
    "pip_index_url": ("PIP_INDEX_URL", "UV_DEFAULT_INDEX"),
    "hf_endpoint": ("HF_ENDPOINT",),
    "http_proxy": ("HTTP_PROXY", "http_proxy"),
    "https_proxy": ("HTTPS_PROXY", "https_proxy"),
}
SCHEMES = {"pip_index_url": ("http", "https", "file")}


def faults(settings: Mapping[str, Any]) -> list[str]:
    """Say which addresses nothing could be fetched from."""
    found: list[str] = []
    for name in ADDRESSES:
        value = settings.get(name) or ""
        schemes = SCHEMES.get(name, ("http", "https"))
        address = split_address(value)
        is_whole = address.scheme in schemes and bool(address.path if address.scheme == "file" else address.hostname)
        if value and not is_whole:
            found.append(f"mirrors_{name} is {value!r}: write it as {schemes[-1]}://...")
    return found


def fetch_environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment for downloads.

    Settings are the variables of the role mirrors without their prefix: pip_index_url, hf_endpoint, modelscope_enabled,
    ca_file, http_proxy, https_proxy, no_proxy, offline. Raises ValueError that names every bad address.
    """
    found = faults(settings)
    if found:
        raise ValueError("; ".join(found))
    environment: dict[str, str] = {}
    for name, variables in ADDRESSES.items():
        value = str(settings.get(name) or "").rstrip("/")
        environment.update(dict.fromkeys(variables, value) if value else {})
    if settings.get("no_proxy"):
        environment.update(dict.fromkeys(("NO_PROXY", "no_proxy"), str(settings["no_proxy"])))
    if settings.get("ca_file"):
        environment.update(dict.fromkeys(TRUST_VARIABLES, TRUST_STORE))
    # On the command line, false is a word: -e mirrors_offline=false.
    if boolean(settings.get("modelscope_enabled"), strict=False):
        environment["LMDEPLOY_USE_MODELSCOPE"] = "True"
    # An endpoint of one's own is a hub that answers without the internet.
    if boolean(settings.get("offline"), strict=False) and not settings.get("hf_endpoint"):
        environment.update(dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"))
    return environment
