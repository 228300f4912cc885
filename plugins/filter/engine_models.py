# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Which models the engines of a host need from a hub."""

from __future__ import annotations

DOCUMENTATION = r"""
name: engine_models
short_description: Return the models that the engines of a host need from a hub
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Takes the model of the plain variables and the list of instances, as the role C(api_server) has them, and returns
    the entries that the role C(model_weights) fetches, each once.
  - Models given by an absolute path or a plain file name are on disk already and left out.
positional: revision, instances
options:
  _input:
    description: Model of the single instance, which named instances without one take too; empty means none.
    type: str
    required: true
  revision:
    description: Revision of that model.
    type: str
    default: ""
  instances:
    description: Named instances; their keys C(model) and C(model_revision) count.
    type: list
    elements: dict
    default: []
"""

EXAMPLES = r"""
- name: Show what is to be fetched
  ansible.builtin.debug:
    msg: "{{ 'OpenGVLab/InternVL3-14B-Instruct' | selfhost.lmdeploy.engine_models('main') }}"
"""

RETURN = r"""
_value:
  description: Entries with C(id) and C(revision).
  type: list
  elements: dict
  sample: [{id: OpenGVLab/InternVL3-14B-Instruct, revision: main}]
"""

from typing import TYPE_CHECKING, Any

from ansible.errors import AnsibleFilterError

if TYPE_CHECKING:
    from collections.abc import Callable


def engine_models(
    model: str, revision: str = "", instances: list[dict[str, Any]] | None = None
) -> list[dict[str, str]]:
    """Return ``[{id, revision}]`` of the models that come from a hub; two revisions of one model are refused."""
    wanted: dict[str, str] = {}
    for instance in instances or [{}]:
        name = str(instance.get("model") or model)
        if name.startswith("/") or "/" not in name:
            continue
        # A revision belongs to a model: an instance with a model of its own doesn't take the plain one's.
        own = instance.get("model_revision") or ("" if instance.get("model") not in (None, model) else revision)
        if wanted.setdefault(name, str(own)) != str(own):
            raise AnsibleFilterError(
                f"api_server_instances want {name} at two revisions, '{wanted[name]}' and '{own}', but a host keeps "
                "one: use one revision, or give one of the models as the absolute path of a folder."
            )
    return [{"id": name, "revision": own} for name, own in wanted.items()]


class FilterModule:
    """Ansible's way in."""

    def filters(self) -> dict[str, Callable[..., list[dict[str, str]]]]:
        """Return the filter by its name."""
        return {"engine_models": engine_models}
