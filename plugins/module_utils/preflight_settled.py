# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Which hosts are as a whole run left them and are wanted as they were then. Pure, no Ansible; see witness.py."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_host import models
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.witness import digest, is_settled

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_desired import Desired
    from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_survey import Survey

# Facts may be kept from an earlier run, and count in this one alone. Made in Ansible's own process, so that those that
# it makes for hosts have it too.
RUN = secrets.token_hex(8)
# Variables that a run has whatever the inventory says, or that say nothing about what a host is to be. Of its name, the
# roles write what the values of their variables make of it, and those count.
OF_THE_RUN = frozenset(
    {
        "environment",
        "groups",
        "hostvars",
        "inventory_dir",
        "inventory_file",
        "inventory_hostname",
        "inventory_hostname_short",
        "omit",
        "play_hosts",
        "playbook_dir",
        "role_name",
        "role_names",
        "role_path",
        "role_uuid",
        "vars",
    }
)
OF_THE_RUN_BEGIN = ("__", "ansible_", "discovered_", "molecule_", "parent_role", "preflight_")


def watched(desired: Desired) -> dict[str, Any]:
    """Return what is looked at on the host beside the places that the roles always use."""
    trees = [desired.model_path(model) for _variable, model in models(desired)]
    trees += [desired.text(name) for name in ("model_weights_dir", "mirrors_bundle_dir")]
    folders = [desired.text(name) for name in ("open_webui_data_dir", "open_webui_static_dir", "backup_dir")]
    return {
        "trees": sorted({tree for tree in trees if tree.startswith("/")}),
        "folders": sorted({folder for folder in folders if folder.startswith("/")}),
        "prefix": desired.text("miniconda_prefix") if "miniconda" in desired.roles else "",
    }


def always_looked_at(desired: Desired, survey: Survey) -> str:
    """Return why the roles look for themselves in every run, '' where they need not."""
    if survey["wsl"]["is_wsl"]:
        return "Windows has files of its own"
    if desired.items("api_server_nodes"):
        return "hosts that serve one model together agree with each other"
    if desired.text("open_webui_database") == "postgresql":
        return "accounts and chats lie in PostgreSQL"
    if desired.text("api_server_verified") == "always":
        return "api_server_verified wants every engine asked in every run"
    return ""


def hardware(survey: Survey) -> list[Any]:
    """Return what the roles go by of a host that its files don't tell."""
    gpu = survey["gpu"]
    cards = [{name: value for name, value in card.items() if name != "used_mib"} for card in gpu["cards"]]
    system = [survey[name] for name in ("os_id", "os_version", "architecture", "libc_version")]
    return [*system, cards, gpu["links"], gpu["lost"], gpu["pci_devices"], gpu["numa_nodes"], gpu["error"]]


def of_the_inventory(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return a host's variables without those of the run."""
    return {
        name: value
        for name, value in variables.items()
        if name == "ansible_host" or not (name in OF_THE_RUN or name.startswith(OF_THE_RUN_BEGIN))
    }


def texts(value: Any) -> Iterator[str]:
    """Yield every text in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from texts(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from texts(entry)


def with_others(own: Mapping[str, Any], others: Iterable[tuple[str, Mapping[str, Any] | None]]) -> str:
    """Return what is wanted of a host, '' where that can't be known in this run.

    A host that is told something by others (their addresses, their keys) is wanted by what they are, too.
    """
    if not own.get("wanted") or not own.get("seen"):
        return ""
    told = [(name, other and (other.get("wanted"), other.get("seen"))) for name, other in others]
    if not all(found and all(found) for _name, found in told):
        return ""
    return digest(own["wanted"], sorted(told)) if told else str(own["wanted"])


def settle(told: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], dict[str, str]]:
    """Return who is as wanted, and what is wanted of each host, from what preflight told about each in this run."""
    hosts = {name: own for name, own in told.items() if own.get("run") == RUN}
    wanted = {
        name: with_others(own, [(other, hosts.get(other)) for other in own.get("others") or [] if other != name])
        for name, own in hosts.items()
    }
    settled = [
        name for name, own in hosts.items() if wanted[name] and is_settled(wanted[name], dict(own), own["hours"])
    ]
    return settled, wanted
