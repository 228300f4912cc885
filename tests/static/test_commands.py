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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds the built archive and, as the only collection there, what it installs."""
    folder = tmp_path_factory.mktemp("collections")
    run("ansible-galaxy", "collection", "build", "--output-path", str(folder))
    (archive,) = folder.glob("selfhost-lmdeploy-*.tar.gz")
    install = ("ansible-galaxy", "collection", "install", "--offline", "--collections-path", str(folder), str(archive))
    run(*install, folder=folder, environment=_outside(folder))
    return folder


def _outside(folder: Path) -> dict[str, str]:
    """Return an environment away from the checkout and its settings, so that nothing of it is found by chance."""
    return {"ANSIBLE_COLLECTIONS_PATH": str(folder), "ANSIBLE_CONFIG": str(folder / "none.cfg")}


def test_archive_holds_nothing_of_tests_and_labs(installed: Path) -> None:
    """Users install what they run, and nothing beside it."""
    (archive,) = installed.glob("selfhost-lmdeploy-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = tar.getnames()
    foreign = (".", "tests", "molecule", "script", "requirements/", "inventories/lab", "ansible.cfg", "artifacts")
    assert not [name for name in names if name.startswith(foreign)]


@pytest.mark.parametrize("name", [Path(n).stem for n in TREE.match("playbooks/*.yml")])
def test_playbook_runs_by_its_full_name_outside_the_checkout(name: str, installed: Path, tmp_path: Path) -> None:
    """Every playbook finds its roles, tasks, plugins and files in an installed collection, from any folder."""
    inventory = tmp_path / "hosts.yml"
    inventory.write_text((ROOT / "inventories/single-gpu/hosts.yml").read_text(encoding="utf-8"), encoding="utf-8")
    command = ("ansible-playbook", "--list-tasks", "-i", str(inventory), f"selfhost.lmdeploy.{name}")
    done = run(*command, folder=tmp_path, environment=_outside(installed))
    assert "TAGS:" in done.stdout
    assert "WARNING" not in done.stdout + done.stderr, done.stderr
    # What the playbook itself names by a path must be in the archive too, or be asked for first.
    text = TREE.text(f"playbooks/{name}.yml")
    for path in re.findall(r"(?:playbook_dir \}\}|__\w+_root ~ '|__\w+_root \}\})/(?:\.\./)*([\w./-]+)", text):
        there = (installed / "ansible_collections/selfhost/lmdeploy" / path.rstrip("/")).exists()
        assert there or f"/{path}') is file" in text or path.startswith("artifacts/"), path


@pytest.mark.parametrize("name", ["bench", "doctor", "drift", "preflight", "site", "smoke", "status", "uninstall"])
def test_groups_that_an_inventory_lacks_are_no_news(name: str, tmp_path: Path) -> None:
    """One host with an engine is a whole inventory for what concerns every host."""
    inventory = tmp_path / "hosts.yml"
    inventory.write_text("model_servers: {hosts: {localhost: {ansible_connection: local}}}", encoding="utf-8")
    done = run("ansible-playbook", "--list-hosts", "-i", str(inventory), f"playbooks/{name}.yml")
    assert "WARNING" not in done.stdout + done.stderr, done.stderr


def test_execution_environment_is_understood(installed: Path, tmp_path: Path) -> None:
    """ansible-builder makes the context of the container from the definition and the archive of this version."""
    (archive,) = installed.glob("selfhost-lmdeploy-*.tar.gz")
    (tmp_path / archive.name).write_bytes(archive.read_bytes())
    (tmp_path / "execution-environment.yml").write_text(TREE.text("execution-environment.yml"), encoding="utf-8")
    run("ansible-builder", "create", folder=tmp_path)
    wanted = yaml.safe_load((tmp_path / "context/_build/requirements.yml").read_text(encoding="utf-8"))["collections"]
    assert wanted == [{"name": f"/build/collection/{archive.name}", "type": "file"}]
    assert (tmp_path / "context/_build/collection" / archive.name).is_file()


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
