"""How LMDeploy loads what a request names: an address, data, a file: URL, or any path that exists."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlparse


def load_from_url(url: str, media_io: Any, allowed_media_domains: Any = None) -> Any:
    """Return what is there."""
    url_spec = urlparse(url)
    if url_spec.scheme.startswith("http"):
        return f"fetched {url}"
    if url_spec.scheme == "data":
        return url_spec.path
    if url_spec.scheme == "file" or os.path.exists(url):  # noqa: PTH110  # as the original
        return Path(url_spec.path).read_bytes()
    raise ValueError("The URL must be either a HTTP, data or file URL.")
