"""The rules about Linux on Windows: a wsl.conf changes in single keys, and a kernel is told by its name."""

from __future__ import annotations

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.wsl import is_wsl, with_settings

WANTED = {"boot": {"systemd": "true"}}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "[boot]\nsystemd=true\n"),
        ("[boot]\nsystemd=true\n", None),
        ("[Boot]\n  systemd = TRUE # by hand\n", None),
        ("[boot]\nsystemd=false\ncommand=x\n", "[boot]\nsystemd=true\ncommand=x\n"),
        # WSL takes the last of two.
        ("[boot]\nsystemd=true\nsystemd=false\n", "[boot]\nsystemd=true\nsystemd=true\n"),
        (
            "# a\n\n[boot]\ncommand=x\n\n[user]\ndefault=me",
            "# a\n\n[boot]\ncommand=x\nsystemd=true\n\n[user]\ndefault=me\n",
        ),
        ("[boot]\n[user]\nsystemd=false\n", "[boot]\nsystemd=true\n[user]\nsystemd=false\n"),
        ("[user]\ndefault=me\n", "[user]\ndefault=me\n\n[boot]\nsystemd=true\n"),
        ("[boot]\n#systemd=true\n", "[boot]\n#systemd=true\nsystemd=true\n"),
    ],
)
def test_one_key_is_set_and_the_rest_stays(before: str, after: str | None) -> None:
    assert with_settings(before, WANTED) == (before if after is None else after)
    assert with_settings(with_settings(before, WANTED), WANTED) == (before if after is None else after)


def test_several_sections_are_set() -> None:
    wanted = {"boot": {"systemd": "true", "command": "x"}, "user": {"default": "me"}}
    assert with_settings("", wanted) == "[boot]\nsystemd=true\ncommand=x\n\n[user]\ndefault=me\n"


def test_the_kernel_tells() -> None:
    assert is_wsl("Linux version 6.6.87.2-microsoft-standard-WSL2 (root@439a258ad544)")
    assert is_wsl("Linux version 4.4.0-19041-Microsoft")
    assert not is_wsl("Linux version 6.8.0-45-generic (buildd@lcy02)")
