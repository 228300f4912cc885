"""What only the tools can say: playbooks parse, settings are current, the collection builds, checks are collected."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from tree import Tree

ROOT = Path(__file__).parents[2]
TREE = Tree.of_checkout(ROOT)
BIN = Path(sys.executable).parent
PLUGIN_KINDS = {"callback": "callback", "filter": "filter", "lookup": "lookup", "modules": "module", "test": "test"}


def run(
    *command: str, expected: int | None = 0, folder: Path = ROOT, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a tool of this environment; its output is the message where the exit status is another than expected."""
    everything = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "NO_COLOR": "1", **(environment or {})}
    done = subprocess.run(command, cwd=folder, env=everything, capture_output=True, text=True, check=False)
    assert expected is None or done.returncode == expected, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done


def test_playbooks_parse_without_warning() -> None:
    """Every playbook is understood with the inventory of one GPU host, without a warning or deprecation."""
    playbooks = sorted({name for name, _ in TREE.plays() if not name.startswith("molecule/")})
    assert {"site.yml", "playbooks/site.yml", "playbooks/smoke.yml"} <= set(playbooks)
    done = run("ansible-playbook", "--syntax-check", "-i", "inventories/single-gpu", *playbooks)
    assert "WARNING" not in done.stdout + done.stderr, done.stderr


def test_settings_are_current() -> None:
    """ansible.cfg holds no option that this version of Ansible has deprecated."""
    done = run("ansible-config", "dump", "--only-changed")
    assert "[DEPRECATION" not in done.stdout + done.stderr, done.stderr


def test_built_collection_runs_outside_the_checkout(tmp_path: Path) -> None:
    """The archive holds nothing of tests or labs, and its playbooks and roles are found by their full names."""
    run("ansible-galaxy", "collection", "build", "--output-path", str(tmp_path))
    (archive,) = tmp_path.glob("selfhost-lmdeploy-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = tar.getnames()
    foreign = (".", "tests", "molecule", "script", "requirements/", "inventories/lab", "ansible.cfg", "artifacts")
    assert not [name for name in names if name.startswith(foreign)]
    # Away from the checkout and its settings, so that nothing of it is found by chance.
    outside = {"ANSIBLE_COLLECTIONS_PATH": str(tmp_path), "ANSIBLE_CONFIG": str(tmp_path / "none.cfg")}
    install = (
        "ansible-galaxy",
        "collection",
        "install",
        "--offline",
        "--collections-path",
        str(tmp_path),
        str(archive),
    )
    run(*install, folder=tmp_path, environment=outside)
    inventory = str(ROOT / "inventories/single-gpu")
    run(
        "ansible-playbook",
        "--syntax-check",
        "-i",
        inventory,
        "selfhost.lmdeploy.site",
        folder=tmp_path,
        environment=outside,
    )


@pytest.mark.parametrize("kind", sorted(PLUGIN_KINDS))
def test_plugins_are_documented(kind: str) -> None:
    """ansible-doc reads every plugin of this kind; modules and filters show an example and what comes back."""
    plugins = [Path(n).stem for n in TREE.match(f"plugins/{kind}/*.py") if Path(n).stem != "__init__"]
    if not plugins:
        pytest.skip("no plugin of this kind")
    names = [f"selfhost.lmdeploy.{name}" for name in plugins]
    pages = json.loads(run("ansible-doc", "--json", "--type", PLUGIN_KINDS[kind], *names).stdout)
    for name in names:
        assert pages[name]["doc"]["short_description"], name
        if kind in ("modules", "filter"):
            assert pages[name]["examples"], f"{name} has no example"
            assert pages[name]["return"], f"{name} does not say what it returns"


def test_every_scenario_has_checks_that_pytest_finds() -> None:
    """Each molecule scenario's checks are collected, none by a wrong name or an import that fails."""
    scenarios = {n.split("/")[1] for n in TREE.match("molecule/*/molecule.yml")} - {"default"}
    done = run(
        str(BIN / "pytest"),
        "--collect-only",
        "-q",
        "--import-mode=importlib",
        "-c",
        "/dev/null",
        "molecule",
        expected=None,
    )
    found = set(re.findall(r"^(?:molecule/)?([^/\s]+)/tests/", done.stdout, re.MULTILINE))
    assert found == scenarios, done.stdout + done.stderr


def test_role_pages_are_generated() -> None:
    """The pages of the roles are what their specs say."""
    run("script/docs", "--check")


def test_changelog_fragments_are_valid() -> None:
    """Fragments can be folded into the change log at any time."""
    run("antsibull-changelog", "lint")


def test_supported_versions_agree() -> None:
    """The floor of ansible-core is one number, wherever it stands."""
    runtime = yaml.safe_load(TREE.text("meta/runtime.yml"))["requires_ansible"]
    floor = re.fullmatch(r">=(\d+\.\d+)\.0", runtime)
    assert floor, runtime
    assert f"ansible-core {floor[1]}" in TREE.text("README.md")
