# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Where models come from: a Hugging Face hub (or a mirror of it), ModelScope, or a folder.

Each source answers two questions: which files a revision has, and give me this one. Whoever asks does the rest
(patterns, retries, checks), so that a wrong byte or a cut is treated alike wherever it came from.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from ansible_collections.selfhost.lmdeploy.plugins.module_utils.model_store import (
    CHUNK_BYTES,
    MARKER,
    StoreError,
    digest,
    read_marker,
)

RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)
LONGEST_WAIT_SECONDS = 300.0
# Folders that clients of the hubs keep their own notes in.
NOTES = (".cache", ".git", ".msc", ".mv")


class TryAgain(Exception):
    """A fault that may pass: a cut, a busy or a broken hub."""

    def __init__(self, message: str, wait_seconds: float | None = None) -> None:
        """Keep how long the hub asks to wait, where it says so; ``progressed`` is set where bytes arrived."""
        super().__init__(message)
        self.wait_seconds = wait_seconds
        self.progressed = False


@dataclass(frozen=True)
class Remote:
    """A file of a model: its size in bytes, and the checksums that its source states."""

    path: str
    size: int
    sha256: str | None = None
    git_oid: str | None = None


class Source(Protocol):
    """What every source can do."""

    def resolve(self) -> tuple[str, list[Remote]]:
        """Return the commit that the revision stands for, and its files."""

    def fetch(self, commit: str, remote: Remote, work: Path) -> None:
        """Bring one file to ``work / remote.path``, going on where an earlier try ended."""


def selected(files: list[Remote], allow: list[str], ignore: list[str]) -> list[Remote]:
    """Return the files that a pattern allows and none ignores; a pattern that ends in a slash means a whole folder."""

    def matches(path: str, patterns: list[str]) -> bool:
        return any(fnmatch.fnmatchcase(path, f"{glob}*" if glob.endswith("/") else glob) for glob in patterns)

    chosen = [file for file in files if (not allow or matches(file.path, allow)) and not matches(file.path, ignore)]
    for file in chosen:
        parts = PurePosixPath(file.path)
        if parts.is_absolute() or ".." in parts.parts or file.path == MARKER:
            raise StoreError(f"The model has a file '{file.path}', which would land outside its folder: refused.")
    return chosen


def checked(path: Path, remote: Remote) -> dict[str, Any]:
    """Compare a file with what its source states and return its entry for the marker; a wrong file is removed."""
    size = path.stat().st_size if path.is_file() else -1
    if size != remote.size:
        path.unlink(missing_ok=True)
        raise TryAgain(f"{remote.path} arrived with {max(size, 0)} bytes instead of {remote.size}")
    sha256, git = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as handle:
        while piece := handle.read(CHUNK_BYTES):
            sha256.update(piece)
            if remote.sha256 is None:
                git.update(piece)
    stated, got = (remote.sha256, sha256) if remote.sha256 else (remote.git_oid, git)
    if stated and got.hexdigest() != stated:
        path.unlink()
        raise StoreError(
            f"{remote.path} has the checksum {got.hexdigest()}, but its source states {stated}. The file was removed "
            "and nothing was linked. A mirror or a proxy on the way changes files: fetch from another one "
            "(mirrors_hf_endpoint), or copy the model from a folder (model_weights_source_dir)."
        )
    return {"path": remote.path, "size": size, "sha256": sha256.hexdigest()}


def missing_shards(folder: Path) -> list[str]:
    """Return the weight files that an index in ``folder`` names but that are not there."""
    missing = set()
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            missing.add(f"{index.name} (unreadable)")
            continue
        missing |= {name for name in names if not (folder / str(name)).is_file()}
    return sorted(missing)


def part_of(remote: Remote, work: Path) -> Path:
    """Return the file that holds what has arrived of ``remote``, made empty where there is none."""
    part = work / ".cache" / f"{digest({'path': remote.path, 'sha256': remote.sha256, 'size': remote.size})}.part"
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    if part.stat().st_size > remote.size:
        part.write_bytes(b"")
    return part


def finish(part: Path, remote: Remote, work: Path) -> None:
    """Move a fetched file to its place in ``work``."""
    target = work / remote.path
    target.parent.mkdir(parents=True, exist_ok=True)
    part.replace(target)


class HuggingFace:
    """The Hugging Face hub, or what HF_ENDPOINT names, through its own client.

    The client resolves, signs in, follows redirects and knows the hub's errors. The bytes are written here, because it
    throws a cut file away: a cut of a large file would begin it anew.
    """

    def __init__(self, model: str, revision: str, token: str, scratch: Path) -> None:
        """Load the client; its notes and caches stay on the models' disk."""
        for name, value in {
            "HF_HOME": str(scratch),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }.items():
            os.environ[name] = value
        import huggingface_hub
        from huggingface_hub import errors, utils

        self.client, self.errors = huggingface_hub, errors
        self.utils: Any = utils
        self.model, self.revision, self.token = model, revision, token or None
        self.endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"

    def resolve(self) -> tuple[str, list[Remote]]:
        """Ask the hub for the commit and its files with their checksums."""
        try:
            info = self.client.HfApi(endpoint=self.endpoint, token=self.token).model_info(
                self.model, revision=self.revision or None, files_metadata=True
            )
        except Exception as error:
            raise self.explained(error) from error
        files = [
            Remote(
                item.rfilename,
                (item.lfs.size if item.lfs else item.size) or 0,
                item.lfs.sha256 if item.lfs else None,
                item.blob_id,
            )
            for item in info.siblings or []
        ]
        return str(info.sha), files

    def fetch(self, commit: str, remote: Remote, work: Path) -> None:
        """Fetch one file into ``work``, or the rest of it."""
        part = part_of(remote, work)
        before = part.stat().st_size
        try:
            if before < remote.size:
                url = self.client.hf_hub_url(self.model, remote.path, revision=commit, endpoint=self.endpoint)
                self.download(url, part, before)
        except Exception as error:
            fault = self.explained(error)
            if isinstance(fault, TryAgain):
                fault.progressed = part.stat().st_size > before
            raise fault from error
        finish(part, remote, work)

    def download(self, url: str, part: Path, begin: int) -> None:
        """Append what is missing of ``url`` to ``part``."""
        headers = {**self.utils.build_hf_headers(token=self.token), "Accept-Encoding": "identity"}
        if begin:
            headers["Range"] = f"bytes={begin}-"
        with self.utils.get_session().stream(
            "GET", url, headers=headers, follow_redirects=True, timeout=60
        ) as response:
            if response.status_code >= 400:
                response.read()
            self.utils.hf_raise_for_status(response)
            with part.open("ab" if response.status_code == 206 else "wb") as sink:
                for piece in response.iter_bytes(CHUNK_BYTES):
                    sink.write(piece)

    def explained(self, error: Exception) -> Exception:
        """Turn what the client says into a fault with its way out, or into one that may pass."""
        known = self.errors
        if isinstance(error, known.GatedRepoError):
            return StoreError(
                f"{self.model} is behind a licence at {self.endpoint}: accept it on the model's page, make an access "
                "token of that account and set model_weights_token (keep it in a vault)."
            )
        if isinstance(error, known.RevisionNotFoundError):
            return StoreError(
                f"{self.model} has no revision '{self.revision}' at {self.endpoint}. Set the model's revision to a "
                "commit, branch or tag that its page shows, or leave it empty for the default branch."
            )
        if isinstance(error, known.RepositoryNotFoundError):
            return StoreError(
                f"{self.endpoint} has no model '{self.model}', or it is private. Correct the model's id, or set "
                "model_weights_token."
            )
        if isinstance(error, known.OfflineModeIsEnabled):
            return StoreError(
                f"HF_HUB_OFFLINE forbids to fetch {self.model}: copy it from a folder (model_weights_source_dir)."
            )
        response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
        status = getattr(response, "status_code", None)
        said = " ".join(str(error.__cause__ or error).split())[:300]
        if status is not None and status not in RETRIED_STATUS:
            return StoreError(f"{self.endpoint} answered {status} for {self.model}: {said}")
        wait = retry_after(response.headers.get("Retry-After")) if response is not None else None
        return TryAgain(f"{self.endpoint}: {status or type(error.__cause__ or error).__name__}: {said}", wait)


class ModelScope:
    """ModelScope, or what MODELSCOPE_ENDPOINT names, through its own client.

    Its listing tells no commit but a sha256 for every file: the snapshot is named after that content.
    """

    def __init__(self, model: str, revision: str, token: str, scratch: Path) -> None:
        """Load the client; its notes and caches stay on the models' disk."""
        os.environ["MODELSCOPE_CACHE"] = os.environ["MODELSCOPE_HOME"] = str(scratch)
        import modelscope_hub
        from modelscope_hub import errors

        self.api, self.errors = modelscope_hub.HubApi(token=token or None), errors
        self.model, self.revision = model, revision

    def resolve(self) -> tuple[str, list[Remote]]:
        """Ask ModelScope for the files and name the snapshot after them."""
        try:
            listed = self.api.list_repo_files(self.model, "model", revision=self.revision or None)
        except Exception as error:
            raise self.explained(error) from error
        files = [Remote(item.path, item.size, item.sha256) for item in listed if not item.is_dir]
        return f"content-{digest({file.path: file.sha256 for file in files})}", files

    def fetch(self, commit: str, remote: Remote, work: Path) -> None:
        """Let the client fetch one file into ``work``."""
        try:
            self.api.download_file(
                self.model, "model", remote.path, revision=self.revision or None, local_dir=str(work)
            )
        except Exception as error:
            raise self.explained(error) from error

    def explained(self, error: Exception) -> Exception:
        """Turn what the client says into a fault with its way out, or into one that may pass."""
        said = " ".join(str(error).split())[:300]
        if isinstance(error, self.errors.NotExistError):
            return StoreError(
                f"ModelScope has no model '{self.model}' at revision '{self.revision or 'master'}': correct id and "
                f"revision. It said: {said}"
            )
        if isinstance(error, (self.errors.AuthenticationError, self.errors.PermissionDeniedError)):
            return StoreError(f"ModelScope does not give {self.model} away: set model_weights_token. It said: {said}")
        if isinstance(error, (self.errors.InvalidParameter, TypeError)):
            return StoreError(f"ModelScope refuses the request for {self.model}: {said}")
        return TryAgain(f"ModelScope: {type(error).__name__}: {said}")


class Folder:
    """A folder on the host that holds the model, brought there by other means."""

    def __init__(self, model: str, revision: str, folder: Path) -> None:
        """Find the model's own folder below ``folder``, as ORG--NAME or ORG/NAME."""
        places = [folder / model.replace("/", "--"), folder / model]
        found = next((place for place in places if place.is_dir()), None)
        if found is None:
            raise StoreError(
                f"model_weights_source_dir has no folder {places[0]} for the model {model}: put the model's files "
                "there, or leave model_weights_source_dir empty to ask the hub."
            )
        self.place, self.model, self.revision = found, model, revision
        self.marker = read_marker(self.place) or {"source": {}, "files": []}

    def resolve(self) -> tuple[str, list[Remote]]:
        """List the folder; a snapshot of another host tells its commit and checksums, other folders have none."""
        source = self.marker["source"]
        known = [source.get("commit"), *source.get("revisions", [])]
        if source and self.revision and self.revision not in known:
            raise StoreError(
                f"{self.place} holds {self.model} at commit {source.get('commit')}, but the inventory wants the "
                f"revision '{self.revision}': bring the wanted one, or set the model's revision to that commit."
            )
        sums = {item["path"]: item["sha256"] for item in self.marker["files"]}
        files = []
        for path in sorted(self.place.rglob("*")):
            name = path.relative_to(self.place)
            if path.is_file() and name.parts[0] not in NOTES and name.name != MARKER:
                files.append(Remote(name.as_posix(), path.stat().st_size, sums.get(name.as_posix())))
        lost = sorted(set(sums) - {file.path for file in files})
        if lost:
            raise StoreError(f"{self.place} is incomplete: its own list names {', '.join(lost)}. Copy the model again.")
        times = {file.path: [file.size, (self.place / file.path).stat().st_mtime_ns] for file in files}
        return source.get("commit") or f"folder-{digest(times)}", files

    def fetch(self, commit: str, remote: Remote, work: Path) -> None:
        """Copy one file into ``work``."""
        part = part_of(remote, work)
        shutil.copyfile(self.place / remote.path, part)
        finish(part, remote, work)


def retry_after(value: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for; a date or nonsense counts as not said."""
    try:
        seconds = float(value) if value else -1.0
    except ValueError:
        return None
    return min(seconds, LONGEST_WAIT_SECONDS) if seconds >= 0 else None
