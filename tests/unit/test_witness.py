"""Whether a host is as a whole run left it: every piece of the roles that is damaged must be seen."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import witness

if TYPE_CHECKING:
    from collections.abc import Callable

CHECKOUT = Path(__file__).resolve().parents[2]
# Paths of the roles that nobody need look at, each with its reason.
UNWATCHED = {
    "/dev/dxg": "tells Windows, whose hosts are never left alone",
    "/dev/null": "no file of ours",
    "/opt/miniconda3": "told by preflight, since a variable names it",
    "/proc": "no file of ours",
    "/run/gateway": "made by the unit",
    "/usr/sbin": "what packages bring; dpkg's list is watched",
    "/var/backups/open-webui": "told by preflight, since a variable names it",
    "/var/cache": "what units fill by themselves",
    "/var/lib/api-server": "made by the unit",
    "/var/lib/models": "told by preflight, since a variable names it",
    "/var/lib/monitoring": "measurements",
    "/var/lib/open-webui": "told by preflight, since a variable names it",
    "/var/lib/prometheus": "measurements",
    "/var/lib/selfhost-wsl": "hosts of Windows are never left alone",
    "/var/lib/systemd/timers": "what systemd remembers",
}


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a piece of each kind, which stands for a host."""
    monkeypatch.setattr(witness, "PLACES", (str(tmp_path / "etc"),))
    monkeypatch.setattr(witness, "units", lambda: "Id=haproxy.service\nActiveState=active")
    texts = {
        "etc/gateway/haproxy.cfg": "listen",
        "etc/gateway/private/key": "secret",
        "etc/systemd/system/open-webui.service": "[Service]",
        "models/.store/one/weights.bin": "weights",
        "conda/.installer.json": "{}",
        "conda/bin/conda": "conda",
        "conda/bin/python": "python",
        "conda/conda-meta/history": "",
        "conda/releases/web/abc/release.json": "{}",
        "conda/releases/web/abc/bin/open-webui": "program",
        "conda/releases/web/abc/lib/python3.11/site-packages/aiohttp-3.dist-info/METADATA": "",
        "conda/releases/web/abc/lib/python3.11/site-packages/six.py": "",
        "data/webui.db": "chats",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "models/model").symlink_to(".store/one")
    (tmp_path / "conda/envs").mkdir()
    (tmp_path / "conda/envs/web").symlink_to("../releases/web/abc")
    return tmp_path


def look(host: Path) -> str:
    """Return what is seen of it."""
    return witness.look({"trees": [f"{host}/models"], "folders": [f"{host}/data"], "prefix": f"{host}/conda"})


def moved(path: Path, target: str) -> None:
    """Let a link lead elsewhere."""
    path.unlink()
    path.symlink_to(target)


def rewritten(path: Path) -> None:
    """Change a file's text, and hide that: same size, same times."""
    before, text = path.stat(), path.read_text()
    path.write_text(text[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


SITE = "conda/releases/web/abc/lib/python3.11/site-packages"
DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a file is gone": lambda host: (host / "etc/gateway/haproxy.cfg").unlink(),
    "a file is new": lambda host: (host / "etc/systemd/system/open-webui.service.d").mkdir(),
    "another text of the same size and time": lambda host: rewritten(host / "etc/gateway/haproxy.cfg"),
    "another mode": lambda host: (host / "etc/gateway/private/key").chmod(0o604),
    "another mode of a folder": lambda host: (host / "etc/gateway/private").chmod(0o701),
    "another mode of the data's folder": lambda host: (host / "data").chmod(0o701),
    "a part of a model is gone": lambda host: (host / "models/.store/one/weights.bin").unlink(),
    "another model": lambda host: moved(host / "models/model", ".store/two"),
    "another release": lambda host: moved(host / "conda/envs/web", "../releases/web/old"),
    "a program of an environment is gone": lambda host: (host / "conda/releases/web/abc/bin/open-webui").unlink(),
    "a package of an environment is gone": lambda host: (host / SITE / "aiohttp-3.dist-info").rename(host / "away"),
    "the mark of a release is gone": lambda host: (host / "conda/releases/web/abc/release.json").unlink(),
    "conda is gone": lambda host: (host / "conda/bin/conda").unlink(),
    "an installation was cut off": lambda host: (host / ".conda.installing").touch(),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_seen(host: Path, damage: str) -> None:
    before = look(host)
    assert before
    DAMAGE[damage](host)
    assert look(host) != before


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone gives files away")
def test_another_owner_is_seen(host: Path) -> None:
    before = look(host)
    os.chown(host / "etc/gateway/private/key", 12, 12)
    assert look(host) != before


def test_a_unit_that_stopped_is_seen(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = look(host)
    monkeypatch.setattr(witness, "units", lambda: "Id=haproxy.service\nActiveState=inactive")
    assert look(host) != before


def test_what_programs_write_as_they_run_is_no_damage(host: Path) -> None:
    before = look(host)
    (host / "data/webui.db").write_text("more chats")
    (host / SITE / "__pycache__").mkdir()
    (host / "conda/pkgs").mkdir()
    assert look(host) == before


def test_too_much_to_look_at_is_no_look(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witness, "LIMIT", 5)
    assert look(host) == ""


def test_a_host_without_systemds_answer_is_not_seen(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(subprocess, "run", lambda *_words, **_named: (_ for _ in ()).throw(OSError("none")))
    assert look(host) == ""


def test_the_note_is_roots_alone_and_survives_half_of_one(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    assert witness.read_note(path) == {}
    witness.write_note("a", "b", 1.0, path)
    assert witness.read_note(path) == {"seen": "b", "wanted": {"a": 1.0}}
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text('{"wanted":')
    assert witness.read_note(path) == {}


def test_a_host_of_two_names_is_as_both_want_it_until_it_looks_different(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    for number in range(witness.KEPT + 2):
        witness.write_note(f"w{number}", "s", float(number), path)
    assert [*witness.read_note(path)["wanted"]] == [f"w{number}" for number in range(2, witness.KEPT + 2)]
    witness.write_note("w2", "t", 99.0, path)
    assert witness.read_note(path) == {"seen": "t", "wanted": {"w2": 99.0}}


class Locked:
    """A secret whose password nobody has."""

    def __str__(self) -> str:
        raise RuntimeError("no vault secrets were found")


def test_a_secret_that_nobody_can_read_counts_as_one() -> None:
    assert witness.digest({"a": Locked()}) == witness.digest({"a": Locked()}) != witness.digest({"a": "b"})


OWN = {"seen": "b", "note": {"seen": "b", "wanted": {"a": 1000.0}}, "time": 2000.0}


@pytest.mark.parametrize(
    ("wanted", "changes", "hours", "settled"),
    [
        ("a", {}, 24, True),
        ("x", {}, 24, False),
        ("a", {"seen": "x"}, 24, False),
        ("a", {"seen": "", "note": {"seen": "", "wanted": {"a": 1000.0}}}, 24, False),
        ("a", {"note": {}}, 24, False),
        # A day has passed; the clock went back; nobody is to be left alone.
        ("a", {"time": 1000.0 + 24 * 3600}, 24, False),
        ("a", {"time": 999.0}, 24, False),
        ("a", {}, 0, False),
    ],
)
def test_who_is_left_alone(wanted: str, changes: dict[str, Any], hours: float, settled: bool) -> None:
    assert witness.is_settled(wanted, {**OWN, **changes}, hours) is settled


def test_every_place_of_a_role_is_looked_at() -> None:
    """A role that writes somewhere new is to say so in PLACES; else its damage would stay for a day."""
    known = [*witness.PLACES, *UNWATCHED]
    lost = {}
    for path in CHECKOUT.glob("roles/*/*/*.yml"):
        if path.parent.name not in ("tasks", "vars") or path.stem in ("uninstall", "restore", "rollback"):
            continue
        if path.parts[-3] == "pull":
            continue  # no play of site.yml runs it
        text = re.sub(r"^\s*#.*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for place in re.findall(r"(?<![\w}/.:*^)'~])/(?:dev|etc|opt|proc|run|srv|usr|var)/[\w./@-]+", text):
            if not any(f"{place}/".startswith(f"{one}/") for one in known):
                lost[place] = str(path.relative_to(CHECKOUT))
    assert lost == {}
