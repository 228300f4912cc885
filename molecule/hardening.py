"""What an account on the host could still do through a unit, as systemd judges it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from testinfra.host import Host


def exposure(host: Host, unit: str) -> float:
    """Return the exposure of a unit, 0 (none) to 10."""
    text = host.run(f"systemd-analyze security --no-pager {unit}").stdout
    found = re.search(r"exposure level for \S+: ([\d.]+)", text)
    assert found, text
    return float(found[1])
