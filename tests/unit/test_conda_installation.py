"""The module conda_installation: what counts as whole, what is repaired, and what is never touched."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import settled
from ansible_collections.selfhost.lmdeploy.plugins.modules import conda_installation, trust_store
from ansible_collections.selfhost.lmdeploy.plugins.modules.conda_installation import Installation, InstallError

# -b [-u] -p PREFIX
INSTALLER = """#!/bin/sh
for prefix in "$@"; do :; done
[ "$2" = -u ] || [ ! -e "$prefix" ] || exit 1
mkdir -p "$prefix/bin" "$prefix/conda-meta"
printf '#!/bin/sh\\necho conda 26.7.1\\n' >"$prefix/bin/conda"
chmod +x "$prefix/bin/conda"
touch "$prefix/bin/python" "$prefix/conda-meta/history"
"""


@pytest.fixture(autouse=True)
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the lock of the test out of the machine's folder."""
    monkeypatch.setattr(conda_installation, "LOCK", tmp_path / "lock")


def installation(folder: Path, text: str = INSTALLER, *, check: bool = False, **changes: Any) -> Installation:
    """Return the installation as a task with this installer would see it."""
    installer = folder / "installer.sh"
    installer.write_text(text, encoding="utf-8")
    params = {
        "prefix": str(folder / "conda"),
        "profile": str(folder / "profile.sh"),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "timeout_seconds": 30,
        "url": installer.as_uri(),
        **changes,
    }
    return Installation(SimpleNamespace(params=params, check_mode=check, tmpdir=str(folder)))


def test_the_first_run_installs_and_the_second_finds_it(tmp_path: Path) -> None:
    foretold = installation(tmp_path, check=True).present()
    assert foretold["changed"]
    assert not (tmp_path / "conda").exists()
    made = installation(tmp_path).present()
    assert made["diff"]["before"] == ""
    assert made["diff"] == foretold["diff"]
    assert str(tmp_path / "conda") in (tmp_path / "profile.sh").read_text(encoding="utf-8")
    assert installation(tmp_path).present() == {"changed": False, "prefix": str(tmp_path / "conda")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conda", "installer.sh", "lock", "profile.sh"]


def test_another_installer_updates_in_place(tmp_path: Path) -> None:
    installation(tmp_path).present()
    (tmp_path / "conda/envs/mine").mkdir(parents=True)
    assert installation(tmp_path, INSTALLER + "# newer\n").present()["changed"]
    assert (tmp_path / "conda/envs/mine").exists()


@pytest.mark.parametrize("lost", ["bin/conda", "bin/python", "conda-meta/history"])
def test_a_lost_part_is_repaired(tmp_path: Path, lost: str) -> None:
    installation(tmp_path).present()
    (tmp_path / "conda" / lost).unlink()
    assert installation(tmp_path).present()["changed"]
    assert (tmp_path / "conda" / lost).exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            'for prefix in "$@"; do :; done; mkdir "$prefix"; echo disk full; exit 1',
            "The installer failed (1):\ndisk full",
        ),
        ('for prefix in "$@"; do :; done; mkdir "$prefix"', "bin/conda does not work"),
        ("sleep 30", "did not end within 1 s"),
    ],
)
def test_a_failed_first_installation_leaves_nothing(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InstallError) as caught:
        installation(tmp_path, f"#!/bin/sh\n{text}\n", timeout_seconds=1).present()
    assert words in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["installer.sh", "lock"]


def test_a_wrong_sha256_runs_nothing(tmp_path: Path) -> None:
    with pytest.raises(InstallError, match=f"wanted is {'0' * 64}. The file was removed and nothing was installed"):
        installation(tmp_path, sha256="0" * 64).present()
    assert not (tmp_path / "conda").exists()


def test_an_address_with_a_password_is_named_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conda_installation, "TRIES", 1)
    with pytest.raises(InstallError) as caught:
        installation(tmp_path, url="https://me:secret@127.0.0.1:9/x.sh").present()
    assert "127.0.0.1:9/x.sh can't be fetched" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_run_that_was_cut_off_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "conda").mkdir()
    (tmp_path / "conda/half").touch()
    (tmp_path / ".conda.installing").write_text("first", encoding="ascii")
    assert installation(tmp_path).present()["changed"]
    assert not (tmp_path / "conda/half").exists()
    assert not (tmp_path / ".conda.installing").exists()


def test_an_update_that_was_cut_off_keeps_what_people_made(tmp_path: Path) -> None:
    installation(tmp_path).present()
    (tmp_path / "conda/mine").touch()
    (tmp_path / ".conda.installing").write_text("", encoding="ascii")
    assert installation(tmp_path).present()["changed"]
    assert (tmp_path / "conda/mine").exists()


def test_an_installation_made_by_hand_stays(tmp_path: Path) -> None:
    installation(tmp_path).present()
    (tmp_path / "conda/.installer.json").unlink()
    assert not installation(tmp_path, sha256="0" * 64).present()["changed"]
    assert installation(tmp_path).absent()["kept"] == [str(tmp_path / "conda")]
    # The installer that people run leaves this folder while it works.
    (tmp_path / "conda/install_tmp").mkdir()
    assert installation(tmp_path).present()["changed"]


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "conda").mkdir()
    (tmp_path / "conda/thesis").touch()
    with pytest.raises(InstallError, match="holds thesis and no conda"):
        installation(tmp_path, check=True).present()


def test_a_profile_that_is_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    own = tmp_path / "conda.sh"
    own.write_text("conda's own", encoding="utf-8")
    (tmp_path / "profile.sh").symlink_to(own)
    assert installation(tmp_path).present()["changed"]
    assert not (tmp_path / "profile.sh").is_symlink()
    assert own.read_text(encoding="utf-8") == "conda's own"


def test_absent_keeps_environments(tmp_path: Path) -> None:
    installation(tmp_path).present()
    for name in ("envs/mine", "releases/app/0123456789ab"):
        (tmp_path / "conda" / name).mkdir(parents=True)
        assert installation(tmp_path).absent()["kept"] == [str(tmp_path / "conda" / name)]
        (tmp_path / "conda" / name).rmdir()
    assert installation(tmp_path, check=True).absent()["changed"]
    assert installation(tmp_path).absent()["changed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["installer.sh", "lock"]
    assert not installation(tmp_path).absent()["changed"]


def test_certificates_are_found_in_any_text() -> None:
    pem = "-----BEGIN CERTIFICATE-----\nQUJD\n-----END CERTIFICATE-----\n"
    found = settled.split_certificates(f"# Company CA\r\n{pem}text\n{pem.replace(chr(10), chr(13) + chr(10))}")
    assert found == [pem, pem]
    assert settled.split_certificates("none") == []
    assert settled.is_trusted(found, f"others\n{pem}")
    assert not settled.is_trusted(found, "others")
    assert trust_store.fingerprints([pem]) == f"SHA-256 {hashlib.sha256(b'ABC').hexdigest()}\n"
