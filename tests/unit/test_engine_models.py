"""The filter engine_models: which models a host's engines need from a hub."""

from __future__ import annotations

from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.selfhost.lmdeploy.plugins.filter.engine_models import engine_models


@pytest.mark.parametrize(
    ("model", "revision", "instances", "wanted"),
    [
        ("org/a", "v1", [], [{"id": "org/a", "revision": "v1"}]),
        ("", "", [], []),
        ("/srv/a", "v1", [], []),
        ("a.gguf", "", [], []),
        ("org/a", "v1", [{"name": "x"}, {"name": "y", "model": "/srv/b"}], [{"id": "org/a", "revision": "v1"}]),
        (
            "org/a",
            "v1",
            [{"name": "x", "model": "org/b"}, {"name": "y", "model": "org/c", "model_revision": "v3"}],
            [{"id": "org/b", "revision": ""}, {"id": "org/c", "revision": "v3"}],
        ),
    ],
)
def test_each_model_from_a_hub_once(
    model: str, revision: str, instances: list[dict[str, Any]], wanted: list[dict[str, str]]
) -> None:
    assert engine_models(model, revision, instances) == wanted


def test_two_revisions_of_one_model_are_refused() -> None:
    instances = [{"name": "x", "model_revision": "v1"}, {"name": "y", "model_revision": "v2"}]
    with pytest.raises(AnsibleFilterError, match=r"org/a at two revisions, 'v1' and 'v2'"):
        engine_models("org/a", "", instances)
