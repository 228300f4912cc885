"""What the role llama_cpp leaves: an environment that is its lock, and a llama.cpp that works."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
PYTHON = "/opt/miniconda3/envs/llama-cpp/bin/python"


def test_the_environment_is_the_lock_and_nothing_else(host: Any) -> None:
    (lock,) = (ROOT / "roles/llama_cpp/files/locks").glob("xllamacpp-*.txt")
    locked = set(re.findall(r"^([a-z0-9-]+==[^ ]+)", lock.read_text(), re.MULTILINE))
    code = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()), sep=chr(10))"
    installed = set(host.check_output(f'{PYTHON} -c "{code}"').lower().splitlines())
    extra = {name for name in installed - locked if not re.match(r"(pip|setuptools|wheel)==", name)}
    assert locked <= installed
    assert extra == set()


def test_llama_cpp_runs_on_this_cpu(host: Any) -> None:
    info = host.check_output(f"{PYTHON} -c 'import xllamacpp; print(xllamacpp.get_system_info())'")
    assert "CPU" in info


def test_check_mode_tells_of_a_removal_and_removes_nothing(host: Any, play: Callable[..., Any]) -> None:
    assert play("llama_cpp", "uninstall", check=True).changed() == 1
    assert host.file(PYTHON).exists
