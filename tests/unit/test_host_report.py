"""A report for strangers: it tells what is, and no secret, wherever that stands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import host_report
from ansible_collections.selfhost.lmdeploy.plugins.modules import host_report as module

KEY = "Zq9-key-of-the-engine-0123456789"
FOUND: dict[str, Any] = {
    "about": {"system": "Debian 12", "runs in": ""},
    "services": [
        {"unit": "api-server.service", "program": "lmdeploy", "version": "0.18.0", "model": "", "libraries": {}}
    ],
    "sections": {"GPUs": "NVIDIA H100", "Failed units": ""},
    "journals": {"api-server.service": f"ready\ngot key {KEY} from a client\n```\n"},
}


def test_a_report_tells_what_is_there_and_leaves_out_what_is_empty() -> None:
    text = host_report.render("gpu-1", FOUND)
    assert (
        "## gpu-1\n\n* system: Debian 12\n\n### api-server.service\n\n* program: lmdeploy\n* version: 0.18.0\n" in text
    )
    assert "### GPUs\n\n```\nNVIDIA H100\n```" in text
    assert "Failed units" not in text
    # A fence in a journal does not end the block.
    assert "\n````\nready\n" in text


def test_a_known_secret_is_taken_out_wherever_it_stands() -> None:
    secrets = host_report.secrets_of({"/etc/api-server/api-key": f"{KEY}\nolder-key-0123456789\n"})
    text = host_report.render("gpu-1", FOUND, secrets)
    assert KEY not in text
    assert "got key (hidden) from a client" in text


def test_of_an_environment_only_what_is_secret_is_hidden() -> None:
    content = f'DATA_DIR="/var/lib/open-webui/data"\nOPENAI_API_KEYS="{KEY};other-key-98765"\n'
    content += 'WEBUI_ADMIN_PASSWORD="a b c d e f"\n'
    secrets = host_report.secrets_of({"/etc/open-webui/open-webui.env": content})
    text = host_report.hidden(f"/var/lib/open-webui/data other-key-98765 {KEY} a b c d e f", secrets)
    assert text == "/var/lib/open-webui/data (hidden) (hidden) (hidden)"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Authorization: Bearer abc.def-123456", "Authorization: Bearer (hidden)"),
        ("api_key=abcdef123456 port=1", "api_key=(hidden) port=1"),
        ('{"password": "correct horse"}', '{"password": "(hidden) horse"}'),
        ("http://user:pass@proxy:3128/", "http://(hidden)@proxy:3128/"),
        ("token hf_abcdefghijklmnopqrstuv used", "token (hidden) used"),
        ("88.1 tokens/s, keys are read", "88.1 tokens/s, keys are read"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str, wanted: str) -> None:
    assert host_report.hidden(text, []) == wanted


def test_every_file_with_secrets_is_read(tmp_path: Path) -> None:
    for number, name in enumerate(
        ["api-server/api-key", "open-webui/admin-password", "open-webui/secret-key", "gateway/private/api-key",
         "gateway/keys.map", "monitoring/keys/gpu-1.key"]
    ):  # fmt: skip
        path = tmp_path / "etc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"secret-number-{number}\n")
    assert sorted(module.secrets(tmp_path)) == [f"secret-number-{number}" for number in range(6)]


def test_a_program_that_is_not_there_is_no_fault() -> None:
    assert module.said(["no-such-program"]) == ""
    assert module.said([sys.executable, "-c", "print('x')"]) == "x"
