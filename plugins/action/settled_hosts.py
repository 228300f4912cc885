# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""M(selfhost.lmdeploy.settled_hosts): reads what preflight told of every host, on the controller."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_settled import settle


class ActionModule(ActionBase):  # type: ignore[misc] # ansible-core carries no types
    """Find who is as wanted; see the module's documentation."""

    _supports_check_mode = True
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the hosts that are as wanted, and what is wanted of each, as a fact of all hosts of the play."""
        variables = task_vars or {}
        result: dict[str, Any] = super().run(tmp, variables)
        told = {}
        for host in variables["ansible_play_hosts"]:
            facts = variables["hostvars"][host].get("ansible_facts") or {}
            if "preflight_watched" in facts:
                told[str(host)] = facts["preflight_watched"]
        settled, wanted = settle(told)
        result.update(
            changed=False, hosts=settled, ansible_facts={"site_settled": {"hosts": settled, "wanted": wanted}}
        )
        return result
