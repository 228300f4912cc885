"""Models from other hosts: who fetches and who takes, and sources that die, lie, stall, or know nobody."""

from __future__ import annotations

import importlib.util
import itertools
import ssl
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.filter.weights_plan import weights_plan
from ansible_collections.selfhost.lmdeploy.plugins.lookup.run_certificate import run_certificate
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import model_peers
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.model_peers import share_out
from test_model_snapshot import SHARDS, asked, have, hub  # noqa: F401  # a fixture

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location(
    "model_share_server", ROOT / "roles" / "model_weights" / "files" / "model_share_server.py"
)
assert SPEC
assert SPEC.loader
server_module = importlib.util.module_from_spec(SPEC)
sys.modules["model_share_server"] = server_module
SPEC.loader.exec_module(server_module)

IGNORED: list[str] = []


@pytest.fixture(scope="module")
def pem() -> str:
    """Return the certificate of this run."""
    return run_certificate("model-share")


@pytest.fixture
def share(pem: str, tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    """Return a function that serves the models folder of a host."""
    running = []

    def serve(name: str) -> Any:
        file = tmp_path / f"{name}.pem"
        file.write_text(pem)
        server = server_module.Share(tmp_path / name / ".store", "127.0.0.1", 0, file)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        running.append(server)
        return server

    yield serve
    for server in running:
        server.shutdown()
        server.server_close()


@dataclass(frozen=True)
class Given:
    """The hub, and what a host that has the model says of it."""

    hub: Any
    model: dict[str, Any]


@pytest.fixture
def given(request: pytest.FixtureRequest, tmp_path: Path) -> Given:
    """Have the model on the host 'a' and on the host 'b', and return what 'a' says of it."""
    hub_server = request.getfixturevalue("hub")
    model = have(tmp_path / "a", manifests=True)["models"][0]
    have(tmp_path / "b")
    hub_server.log.clear()
    return Given(hub_server, model)


def take(path: Path, pem: str, given: Given, servers: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Take the model from hosts."""
    peers = [{"name": name, "address": "127.0.0.1", "port": one.server_address[1]} for name, one in servers.items()]
    manifests = [given.model["manifest"]]
    return have(path, peers=peers, peer_manifests=manifests, peer_certificate=pem, **changes)


def same(one: Path, other: Path) -> bool:
    """Tell whether two hosts have the same model."""
    files = sorted(path.relative_to(one) for path in (one / "test--tiny").rglob("*") if path.is_file())
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


def wish(model: str = "a/b", revision: str = "") -> dict[str, Any]:
    """Return a model as it is wanted."""
    return {"id": model, "revision": revision, "allow_patterns": [], "ignore_patterns": IGNORED}


def known(model: str = "a/b", commit: str = "", revision: str = "") -> dict[str, Any]:
    """Return what a host says of a model, with the commit that it has."""
    entry: dict[str, Any] = {"id": model, "wish": wish(model, revision), "changed": not commit}
    if commit:
        patterns: dict[str, list[str]] = {"allow": [], "ignore": []}
        source = {"id": model, "commit": commit, "revisions": ["", "main"], "patterns": patterns}
        entry["manifest"] = {"source": source, "bytes": 1, "files": []}
    return entry


def result(*models: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the results of a host that was asked once."""
    return [{"models": list(models), "address": "192.0.2.1"}]


def test_one_host_fetches_and_each_model_another_one() -> None:
    plan = share_out({name: result(known("a/b"), known("c/d")) for name in ("x", "y", "z")})
    assert {name: [item["id"] for item in models] for name, models in plan["fetch"].items()} == {
        "x": ["a/b"],
        "y": ["c/d"],
    }
    assert plan["take"] == {}
    assert plan["share"] == []


def test_what_a_host_has_is_taken_from_there_at_the_commit_of_most() -> None:
    hosts = {"x": result(known(commit="1")), "y": result(known(commit="2")), "z": result(known(commit="2"))}
    plan = share_out({**hosts, "new": result(known())})
    assert plan["fetch"] == {}
    assert [item["source"]["commit"] for item in plan["take"]["new"]] == ["2"]
    assert plan["share"] == ["new", "y", "z"]


def test_another_revision_is_another_model() -> None:
    plan = share_out({"x": result(known(commit="1")), "y": result(known(revision="v2"))})
    assert [item["revision"] for item in plan["fetch"]["y"]] == ["v2"]
    assert plan["share"] == []


def test_nobody_shares_where_all_have_everything() -> None:
    assert share_out({name: result(known(commit="1")) for name in ("x", "y")}) == {"fetch": {}, "take": {}, "share": []}


def test_the_plan_takes_the_newest_word_and_leaves_out_who_said_nothing() -> None:
    seen, fetched = {"models": [known()], "address": "192.0.2.1"}, {"models": [known(commit="1")]}
    hosts = {"x": {"seen": seen, "fetched": fetched}, "y": {"seen": seen}, "silent": {"seen": {"skipped": True}}}
    plan = weights_plan(hosts, list(hosts), ["seen", "fetched"], 8377)
    assert list(plan["take"]) == ["y"]
    assert plan["peers"] == [{"name": name, "address": "192.0.2.1", "port": 8377} for name in ("x", "y")]


def test_a_model_comes_from_other_hosts_without_the_hub(
    given: Given,
    share: Any,
    pem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_peers, "PIECE_BYTES", 1 << 19)
    done = take(tmp_path / "c", pem, given, {"a": share("a"), "b": share("b")})
    assert done["changed"]
    assert same(tmp_path / "a", tmp_path / "c")
    assert " from a" in done["models"][0]["source"]
    assert " from b" in done["models"][0]["source"]
    assert given.hub.log == []
    assert not have(tmp_path / "c")["changed"]


def test_a_host_that_dies_in_the_middle_is_left_out(
    given: Given,
    share: Any,
    pem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_peers, "PIECE_BYTES", 1 << 19)
    monkeypatch.setattr(model_peers, "FIRST_PAUSE_SECONDS", 0.0)
    dying = share("a")
    answer, requests = server_module.Handler.do_GET, itertools.count()

    def die(handler: Any) -> None:
        if handler.server is dying and next(requests) > 1:
            handler.wfile.write(b"HTTP/1.1 206 Partial\r\nContent-Length: 999999\r\n\r\nhalf")
            handler.close_connection = True
        else:
            answer(handler)

    monkeypatch.setattr(server_module.Handler, "do_GET", die)
    done = take(tmp_path / "c", pem, given, {"a": dying, "b": share("b")})
    assert same(tmp_path / "a", tmp_path / "c")
    assert "a left out: " in done["models"][0]["source"]
    assert given.hub.log == []


ALWAYS_FIRST = [0.0, 0.0]


@pytest.mark.parametrize(
    ("pieces", "dice"),
    [
        pytest.param(1 << 19, [0.0, 1.0, 1.0, 0.0], id="takes turns with a good one"),
        pytest.param(64 << 20, ALWAYS_FIRST, id="is always asked first"),
    ],
)
def test_a_host_that_lies_is_found_and_left_out(
    given: Given,
    share: Any,
    pem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pieces: int,
    dice: list[float],
) -> None:
    monkeypatch.setattr(model_peers, "PIECE_BYTES", pieces)
    # Of two idle hosts the one with the lower throw is asked.
    monkeypatch.setattr("random.random", itertools.cycle(dice).__next__)
    for shard in (tmp_path / "a" / "test--tiny").glob("*.safetensors"):
        content = shard.read_bytes()
        # Not through the other host's file: these are no links.
        shard.write_bytes(bytes([content[0] ^ 1]) + content[1 : 1 << 20] + b"\0" + content[(1 << 20) + 1 :])
    done = take(tmp_path / "c", pem, given, {"a": share("a"), "b": share("b")}, workers=1)
    assert same(tmp_path / "b", tmp_path / "c")
    # In turns its wrong pieces may have come from the other one.
    if dice == ALWAYS_FIRST:
        assert "a left out: gave" in done["models"][0]["source"]
        assert "with a wrong checksum" in done["models"][0]["source"]
    assert given.hub.log == []


def test_only_liars_left_the_hub_brings_it(
    given: Given,
    share: Any,
    pem: str,
    tmp_path: Path,
) -> None:
    for host in ("a", "b"):
        (tmp_path / host / "test--tiny" / SHARDS[0]).write_bytes(b"\0" * (3 << 20))
    done = take(tmp_path / "c", pem, given, {"a": share("a"), "b": share("b")})
    assert "from the hub" in done["models"][0]["source"]
    # What was still to come when the last liar was found comes from the hub too.
    assert asked(given.hub, SHARDS[0])
    assert (tmp_path / "c" / "test--tiny" / SHARDS[1]).read_bytes() == (
        tmp_path / "a/test--tiny" / SHARDS[1]
    ).read_bytes()


def test_all_dead_the_hub_brings_it(
    given: Given,
    share: Any,
    pem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_peers, "FIRST_PAUSE_SECONDS", 0.0)
    dead = share("a")
    dead.shutdown()
    dead.server_close()
    done = take(tmp_path / "c", pem, given, {"a": dead})
    assert "from the hub, a left out: " in done["models"][0]["source"]
    assert same(tmp_path / "a", tmp_path / "c")
    assert asked(given.hub, SHARDS[0])


def test_strangers_get_nothing(given: Given, share: Any, pem: str, tmp_path: Path) -> None:
    """Neither without a certificate nor with another one, nor by plain HTTP; the right one opens."""
    server = share("a")
    commit = given.model["commit"]
    place = f"127.0.0.1:{server.server_address[1]}/test--tiny/{commit}/config.json"
    with pytest.raises(OSError, match=r"reset|closed|refused|EOF|disconnected|Remote end"):
        urllib.request.urlopen(f"http://{place}", timeout=5)
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE
    other = model_peers.context_of(run_certificate("model-share"), tmp_path)
    other.verify_mode = ssl.CERT_NONE
    for context in (bare, other):
        # The server hangs up; whether its reason arrives before that is chance.
        with pytest.raises(OSError, match=r"(?i)alert|certificate|EOF|reset"):
            urllib.request.urlopen(f"https://{place}", timeout=5, context=context)
    right = model_peers.context_of(pem, tmp_path)
    with urllib.request.urlopen(f"https://{place}", timeout=5, context=right) as answer:
        assert answer.read()


@pytest.mark.parametrize(
    "path",
    [
        "/test--tiny/../../a.pem",
        "/test--tiny/COMMIT/.complete.json",
        "/test--tiny/COMMIT/%2e%2e/%2e%2e/x",
        "/",
        "/x/y/z",
    ],
)
def test_nothing_but_files_of_models_is_given(given: Given, share: Any, path: str) -> None:
    assert share("a").find(path.replace("COMMIT", given.model["commit"])) is None


def test_a_link_leads_nowhere(given: Given, share: Any, tmp_path: Path) -> None:
    commit = given.model["commit"]
    entry = tmp_path / "a" / ".store" / "test--tiny" / commit
    (entry / "out").symlink_to("/etc/passwd")
    server = share("a")
    assert server.find(f"/test--tiny/{commit}/out") is None
    assert server.find(f"/test--tiny/{commit}/sub/tokenizer.json") == entry / "sub" / "tokenizer.json"
