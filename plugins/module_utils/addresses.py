# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Addresses as people write them."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from urllib.parse import SplitResult


def split_address(url: str) -> SplitResult:
    """Return the parts of an address; those of an empty one where a bracket begins no IPv6 address."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")
