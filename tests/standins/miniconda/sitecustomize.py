"""Send the stand-in's CPython to site-packages.

Debian's interpreter has its own `site` module frozen in, which looks in dist-packages; a plain CPython,
as conda's packages have it, looks in site-packages.
"""

from __future__ import annotations

import site
import sys
from collections.abc import Iterable
from pathlib import Path


def getsitepackages(prefixes: Iterable[str] | None = None) -> list[str]:
    """Name the folders of installed packages as an unpatched `site` does."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return [str(Path(prefix, "lib", version, "site-packages")) for prefix in dict.fromkeys(prefixes or site.PREFIXES)]


site.getsitepackages = getsitepackages
site.addsitepackages(site.removeduppaths())
