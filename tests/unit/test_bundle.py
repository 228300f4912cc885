"""The layout of a bundle: an index that pip and uv read, a channel's index, and a manifest that finds what is wrong."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import bundle

ROOT = Path(__file__).parents[2]


def test_every_package_that_a_role_wants_is_in_the_bundle() -> None:
    wanted: set[str] = set()
    for path in ROOT.glob("roles/*/tasks/*.yml"):
        # A host that pulls its playbooks has a network.
        if path.parts[-3] == "pull":
            continue
        for task in yaml.safe_load(path.read_text()):
            module = task.get("selfhost.lmdeploy.system_packages") or {}
            wanted |= set(
                re.findall(r"[a-z][a-z0-9_.+-]+", re.sub(r"{{|}}|\bif\b.*\belse\b", " ", str(module.get("names", ""))))
            )
    play = yaml.safe_load((ROOT / "playbooks/bundle.yml").read_text())[0]
    carried = " ".join(str(entry["names"]) for entry in play["vars"]["__bundle_packages"])
    missing = {name for name in wanted if not re.search(rf"(?<![a-z0-9-]){re.escape(name)}(?![a-z0-9-])", carried)}
    assert {"haproxy", "prometheus", "lmdeploy_system_packages", "postgresql-client"} <= wanted
    assert missing == set()


def test_projects_are_named_as_the_index_names_them() -> None:
    assert bundle.project_name("Foo_Bar.baz-1.0-py3-none-any.whl") == "foo-bar-baz"
    assert bundle.project_name("zope.interface-5.tar.gz") == "zope-interface"


def test_the_index_leads_to_each_file_with_its_hash() -> None:
    pages = bundle.index_pages({"a_b-1-py3-none-any.whl": "00", "a_b-2+cu1-py3-none-any.whl": "11"})
    assert set(pages) == {"simple/index.html", "simple/a-b/index.html"}
    assert 'href="../../wheels/a_b-1-py3-none-any.whl#sha256=00"' in pages["simple/a-b/index.html"]
    assert "a_b-2%2Bcu1-py3-none-any.whl#sha256=11" in pages["simple/a-b/index.html"]


def test_a_channel_has_both_kinds_of_packages() -> None:
    common = {"version": "1", "build": "0", "build_number": 0, "depends": [], "md5": "m", "sha256": "s", "size": 1}
    records = [
        {**common, "name": "python", "subdir": "linux-64", "fn": "python-1-0.conda", "url": "https://x/y", "files": []},
        {**common, "name": "pip", "subdir": "noarch", "fn": "pip-1-0.tar.bz2", "noarch": "python"},
    ]
    indexes = {path: json.loads(text) for path, text in bundle.channel_indexes(records).items()}
    entry = indexes["conda/linux-64/repodata.json"]["packages.conda"]["python-1-0.conda"]
    assert "files" not in entry
    assert "url" not in entry
    assert indexes["conda/noarch/repodata.json"]["packages"]["pip-1-0.tar.bz2"]["noarch"] == "python"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a bundle of two files."""
    entries = {}
    for name in ("wheels/a", "models/b"):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(name)
        entries[name] = {"sha256": hashlib.sha256(name.encode()).hexdigest(), "size": len(name)}
    (tmp_path / bundle.WORK).mkdir()
    (tmp_path / bundle.WORK / "x").write_text("")
    (tmp_path / bundle.MANIFEST).write_text(json.dumps({"format": bundle.FORMAT, "files": entries}))
    return tmp_path


def test_a_whole_bundle_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundle.files_of(folder) == ["models/b", "wheels/a"]
    manifest = bundle.read_manifest(folder)
    faults, stamps = bundle.verify(folder, manifest, {})
    assert faults == []
    monkeypatch.setattr(bundle, "sha256_of", lambda _path: pytest.fail("read again"))
    assert bundle.verify(folder, manifest, json.loads(json.dumps(stamps))) == ([], stamps)


def test_what_is_wrong_is_named(folder: Path) -> None:
    manifest = bundle.read_manifest(folder)
    stamps = bundle.verify(folder, manifest, {})[1]
    (folder / "wheels/a").write_text("wheels/x")
    (folder / "models/b").unlink()
    faults, _ = bundle.verify(folder, manifest, stamps)
    assert "wheels/a is damaged" in faults[0]
    assert "models/b is missing" in faults[1]
    (folder / "wheels/a").write_text("longer than before")
    assert "18 bytes, 8 are wanted" in bundle.verify(folder, manifest, {})[0][0]


@pytest.mark.parametrize(
    ("text", "words"), [(None, "mirrors_bundle_dir is"), ("{", "is damaged"), ('{"format": 9}', "make the bundle anew")]
)
def test_a_folder_without_a_manifest_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / bundle.MANIFEST).write_text(text)
    with pytest.raises(bundle.BundleError, match=words):
        bundle.read_manifest(tmp_path)
