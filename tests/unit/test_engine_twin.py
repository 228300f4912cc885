"""A twin of an engine: the release that runs, on another port, in the same sandbox, and gone when it is told to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.engine_releases import TOKEN, ReleaseFault, Releases
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.engine_twin import Twin, moved, port_of
from fake_engine import FakeEngine
from test_engine_releases import FakeManager

KEY = "k" * 32
UNIT = f"""\
# Made by selfhost.lmdeploy.api_server: x
# Release {TOKEN}
[Unit]
Description=Model engine

[Service]
Type=notify
User=api-server
ExecStart=/x/{TOKEN}/launcher.py
RuntimeDirectory=api-server
RuntimeDirectoryMode=0700
LoadCredential=instance.json:/etc/api-server/releases/api-server/{TOKEN}/instance.json
LoadCredential=api-key:/etc/api-server/api-key
Restart=on-failure
RestartSec=2
ProtectSystem=strict

[Install]
WantedBy=multi-user.target
"""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/m", "--server-port", "23333", "--tp", "2"], ["/m", "--server-port", "24333", "--tp", "2"]),
        (["--server-port=23333"], ["--server-port=24333"]),
        (["model.path=/m/23333", "port=23333", "n_ctx=23333"], ["model.path=/m/23333", "port=24333", "n_ctx=23333"]),
    ],
)
def test_only_name_and_port_are_others(arguments: list[str], expected: list[str]) -> None:
    settings = {"name": "api-server", "port": 23333, "arguments": arguments, "model_name": "m"}
    found = moved(settings, "api-server-twin", 24333)
    assert found == {"name": "api-server-twin", "port": 24333, "arguments": expected, "model_name": "m"}


def host(tmp_path: Path, port: int, expected: str = "paris") -> tuple[Releases, FakeManager, str]:
    """Return a host whose engine serves a release."""
    config, units = tmp_path / "etc", tmp_path / "units"
    units.mkdir()
    config.mkdir()
    (config / "api-key").write_text(f"{KEY}\n")
    engine = Releases("api-server", config, units)
    manager = FakeManager(engine.unit_file)
    engine.manager = manager
    settings = {
        "host": "127.0.0.1",
        "port": port,
        "model_name": "m",
        "name": "api-server",
        "arguments": [f"port={port}"],
    }
    about = {"environment": "/env", "model_path": "/m", "gate": {"expected": expected}}
    release = engine.build(UNIT, settings, "launch", about)
    engine.activate(release)
    manager.active = "active"
    return engine, manager, release


def test_a_twin_is_the_release_in_the_same_sandbox(tmp_path: Path) -> None:
    with FakeEngine(model="m", key=KEY) as fake:
        engine, _manager, _release = host(tmp_path, 1)
        twin = Twin(engine, tmp_path / "run")
        assert twin.have(fake.port, 90)["answer"]
    unit = twin.unit_file.read_text()
    for line in ("User=api-server", "ProtectSystem=strict", "RuntimeDirectory=api-server-twin", "RuntimeMaxSec=90"):
        assert f"\n{line}\n" in unit
    assert f"LoadCredential=instance.json:{twin.settings_file}" in unit
    assert "LoadCredential=api-key:/etc/api-server/api-key" in unit
    assert "Restart=no" in unit
    assert "[Install]" not in unit, "it must not come back with a boot"
    assert json.loads(twin.settings_file.read_text())["arguments"] == [f"port={fake.port}"]
    assert twin.settings_file.stat().st_mode & 0o777 == 0o600
    assert port_of(engine) == 1, "the engine itself stays where it is"
    assert twin.end()
    assert not twin.unit_file.exists()
    assert not twin.settings_file.exists()
    assert not twin.end()


def test_a_twin_that_gives_a_wrong_answer_goes_and_names_the_way_out(tmp_path: Path) -> None:
    with FakeEngine(model="m", key=KEY) as fake:
        engine, _manager, release = host(tmp_path, 1, expected="london")
        twin = Twin(engine, tmp_path / "run")
        with pytest.raises(
            ReleaseFault, match=r"api-server-twin.service does not serve(.|\n)*api_server_twin_port_offset"
        ):
            twin.have(fake.port, 90)
    assert not twin.exists()
    assert engine.running() == release


def test_an_engine_that_does_not_serve_has_no_twin(tmp_path: Path) -> None:
    engine, manager, release = host(tmp_path, 1)
    twin = Twin(engine, tmp_path / "run")
    assert twin.release() == release
    manager.active = "failed"
    assert twin.release() == ""
    (engine.folder(release) / "launcher.py").write_text("half")
    manager.active = "active"
    assert twin.release() == ""
