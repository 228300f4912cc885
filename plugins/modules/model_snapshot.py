#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Have models at a pinned commit on local disk."""

from __future__ import annotations

DOCUMENTATION = r"""
module: model_snapshot
short_description: Have models at a pinned commit on local disk
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Fetches each model of the list from a hub, a mirror or a folder, at a revision that is resolved to a commit once and
    stays there. C(PATH/ORG--NAME) is a link to the snapshot, and only ever points to a complete one.
  - A complete model is recognised by its marker and its files' sizes, without a request to the hub.
  - A cut download goes on where it ended, in the next try as in the next run. Every file is compared with the checksum
    that the hub states (SHA-256 of large files, git object of small ones); a wrong file is removed, nothing is linked.
  - Files that an earlier snapshot of the model holds with the same SHA-256 are shared, not fetched again.
  - Models that other hosts of the fleet have can be taken from them, see O(peers).
  - While it runs, one line every O(progress_seconds) seconds tells bytes, rate and time left.
options:
  path:
    description: Folder of the models.
    type: path
    required: true
  models:
    description: The models to have.
    type: list
    elements: dict
    required: true
    suboptions:
      id:
        description: Name of the model on the hub, C(ORG/NAME).
        type: str
        required: true
      revision:
        description: Commit, tag or branch; empty means the hub's default branch.
        type: str
        default: ""
      allow_patterns:
        description: Glob patterns of the files to fetch; empty means all.
        type: list
        elements: str
        default: []
      ignore_patterns:
        description: Glob patterns of the files to leave out; by default weights in other formats than safetensors.
        type: list
        elements: str
        default: ["*.bin", "*.pth", "*.pt", "*.gguf", "*.msgpack", "*.h5", "*.onnx", "*.ot"]
  hub:
    description: Hub to ask. Its address comes from C(HF_ENDPOINT) or C(MODELSCOPE_ENDPOINT) in the task's environment.
    type: str
    choices: [huggingface, modelscope]
    default: huggingface
  token:
    description: Access token of the hub.
    type: str
    default: ""
  source_dir:
    description: Folder on the host with a folder C(ORG--NAME) for each model; when set, no hub is asked.
    type: str
    default: ""
  python:
    description: Python with C(huggingface_hub) or C(modelscope_hub), used where something is to be fetched from a hub.
    type: path
    default: ""
  attempts:
    description: Tries for each file that bring nothing; the pauses double from 2 s, or are as long as the hub asks.
    type: int
    default: 5
  workers:
    description: Files fetched at the same time.
    type: int
    default: 4
  reserve_gib:
    description: Disk space in GiB that stays free; a fetch that would take it is refused before it begins.
    type: int
    default: 2
  keep_snapshots:
    description: Number of snapshots of a model that stay after a switch, the current one included. Files that they
      share take no room twice.
    type: int
    default: 2
  kept_by:
    description: Glob patterns of links; what they lead to stays, whatever their number. By default the links that
      releases of engines hold.
    type: list
    elements: str
    default: [/etc/api-server/releases/*/*/model]
  manifests:
    description: Return the manifest of each complete model, and the address by which other hosts reach this one.
    type: bool
    default: false
  address:
    description: The address to return; empty means that of the default route.
    type: str
    default: ""
  peer_manifests:
    description: Manifests of models that O(peers) have, as O(manifests) returned them there. Where one is of a model as
      it is wanted, the model comes from them, and no hub is asked but for what they can't give.
    type: list
    elements: dict
    default: []
  peers:
    description: Hosts that run M(selfhost.lmdeploy.model_share) now. A host that dies, stalls or gives wrong bytes is
      left out.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Its name, for people.
        type: str
        required: true
      address:
        description: Its address.
        type: str
        required: true
      port:
        description: Its port.
        type: int
        required: true
  peer_certificate:
    description: Certificate and key of this run, PEM, the same on all its hosts.
    type: str
    default: ""
  fetch:
    description: V(false) only tells what is missing.
    type: bool
    default: true
  progress_seconds:
    description: Seconds between two lines of progress; 0 shows none and runs in one blocking call.
    type: int
    default: 10
  timeout_seconds:
    description: Seconds after which a fetch with progress is given up. What has arrived is kept.
    type: int
    default: 86400
attributes:
  check_mode:
    description: Says which models would be fetched, and asks no hub.
    support: full
  diff_mode:
    description: Shows the commit of each model before and after.
    support: full
"""

EXAMPLES = r"""
- name: Have the model at a commit
  selfhost.lmdeploy.model_snapshot:
    path: /var/lib/models
    python: /opt/miniconda3/envs/lmdeploy/bin/python
    models:
      - id: OpenGVLab/InternVL3-14B-Instruct
        revision: 0123456789abcdef0123456789abcdef01234567
  environment:
    HF_ENDPOINT: https://mirror.example.org
"""

RETURN = r"""
models:
  description: One entry for each model, in the order given.
  returned: success
  type: list
  elements: dict
  contains:
    id:
      description: Name of the model.
      type: str
    path:
      description: Where the model is found, a link to the snapshot.
      type: str
      sample: /var/lib/models/OpenGVLab--InternVL3-14B-Instruct
    commit:
      description: Commit of the snapshot; empty where it is still to be fetched.
      type: str
    bytes:
      description: Size of the snapshot.
      type: int
    changed:
      description: Whether the model was fetched or its link switched.
      type: bool
    source:
      description: Where its bytes came from, where that were other hosts of the fleet; empty otherwise.
      type: str
      sample: 1.2 GB from gpu-1, 1.1 GB from gpu-2
    wish:
      description: The model as it is wanted, where O(manifests) asks for it.
      type: dict
    manifest:
      description: Commit, files and their SHA-256, where O(manifests) asks for it and the model is complete.
      type: dict
address:
  description: Address by which other hosts reach this one; empty where there is none.
  returned: when O(manifests) asks for it
  type: str
"""

import contextlib
import fcntl
import functools
import json
import os
import queue
import random
import re
import shutil
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.common.respawn import has_respawned, respawn_module
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.kept_links import kept
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.model_peers import Peers, context_of, serves
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.model_sources import (
    Folder,
    HuggingFace,
    ModelScope,
    Remote,
    Source,
    TryAgain,
    checked,
    missing_shards,
    selected,
)
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.model_store import (
    STORE,
    StoreError,
    bytes_below,
    digest,
    disk_fault,
    is_complete,
    link_fault,
    own_link,
    read_marker,
    switch_link,
    write_marker,
)

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_IGNORE = ["*.bin", "*.pth", "*.pt", "*.gguf", "*.msgpack", "*.h5", "*.onnx", "*.ot"]
FIRST_PAUSE_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 60.0
RATE_WINDOW_SECONDS = 20.0


class Progress:
    """Writes bytes, rate and time left into one small file while a model is fetched."""

    def __init__(self, file: Path) -> None:
        """Nothing runs yet."""
        self.file = file
        self.note = ""
        self.stopped = threading.Event()

    def watch(self, model: str, work: Path, total: int) -> None:
        """Begin to look at ``work`` once a second."""
        self.stopped = threading.Event()
        threading.Thread(target=self._loop, args=(model, work, total, self.stopped), daemon=True).start()

    def stop(self) -> None:
        """End the watching and remove the file."""
        self.stopped.set()
        self.file.unlink(missing_ok=True)

    def _loop(self, model: str, work: Path, total: int, stopped: threading.Event) -> None:
        seen: list[tuple[float, int]] = []
        while not stopped.wait(1):
            now, done = time.monotonic(), min(total, bytes_below(work))
            seen = [*[point for point in seen if now - point[0] <= RATE_WINDOW_SECONDS], (now, done)]
            spent = seen[-1][0] - seen[0][0]
            rate = (seen[-1][1] - seen[0][1]) / spent if spent else 0.0
            content = {"model": model, "done": done, "total": total, "rate": rate, "note": self.note}
            temporary = self.file.with_suffix(".new")
            try:
                temporary.write_text(json.dumps(content), encoding="utf-8")
                temporary.replace(self.file)
            except OSError:
                continue


class Model:
    """One model of the list below the models folder."""

    def __init__(self, module: AnsibleModule, item: dict[str, Any]) -> None:
        """Take the wishes; nothing is looked at yet."""
        self.params, self.item = module.params, item
        self.id, self.revision = str(item["id"]), str(item["revision"])
        self.directory = Path(module.params["path"])
        self.name = self.id.replace("/", "--")
        self.link = self.directory / self.name
        self.patterns = {"allow": sorted(item["allow_patterns"]), "ignore": sorted(item["ignore_patterns"])}
        self.came_from = ""

    def fault(self) -> str | None:
        """Say what is wrong with the wishes, before anything is fetched."""
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.id) or ".." in self.id:
            return f"id is '{self.id}': a model's name on a hub has the form ORG/NAME."
        return link_fault(self.link)

    def entry(self, commit: str) -> Path:
        """Return the snapshot's folder: the commit, and what tells apart two choices of files from one commit."""
        usual = self.patterns == {"allow": [], "ignore": sorted(DEFAULT_IGNORE)}
        return self.directory / STORE / self.name / (commit if usual else f"{commit}-{digest(self.patterns)}")

    def marker(self) -> dict[str, Any] | None:
        """Return the marker of the snapshot that the link points to, where that is complete."""
        if not own_link(self.link):
            return None
        place = self.link.resolve()
        marker = read_marker(place)
        return marker if marker and is_complete(place, marker) else None

    def state(self) -> tuple[bool, dict[str, Any] | None]:
        """Return whether the model is as wanted, and its marker."""
        marker = self.marker()
        source = marker["source"] if marker else {}
        wanted = self.revision in [source.get("commit"), *source.get("revisions", [])]
        return bool(marker) and wanted and source.get("patterns") == self.patterns, marker

    def prune(self, current: Path) -> None:
        """Remove what is unfinished, and the oldest snapshots beyond those to keep; never the current one."""
        others = []
        for place in sorted(current.parent.iterdir()):
            marker = read_marker(place)
            if place == current:
                continue
            if marker and is_complete(place, marker):
                others.append((place.stat().st_mtime, place))
            else:
                shutil.rmtree(place)
        spare = max(1, int(self.params["keep_snapshots"])) - 1
        old = [place for _time, place in sorted(others, reverse=True)[spare:]]
        for place in sorted({*old} - kept(old, self.params["kept_by"])):
            shutil.rmtree(place)

    def manifest(self) -> dict[str, Any] | None:
        """Return the manifest of the hosts that have this model, if there are any."""
        found = (item for item in self.params["peer_manifests"] if serves(item, self.item))
        return next(found, None) if self.params["peers"] else None

    def source(self) -> Source:
        """Return where this model comes from: the fleet, else the hub."""
        manifest = self.manifest()
        if manifest is None:
            return self.hub()
        entry = self.entry(str(manifest["source"]["commit"]))
        context = context_of(self.params["peer_certificate"], self.directory / STORE)
        return Peers(manifest, f"{self.name}/{entry.name}", self.params["peers"], context, self.hub)

    def hub(self) -> Source:
        """Return the hub, or the folder that stands for it."""
        if self.params["source_dir"]:
            return Folder(self.id, self.revision, Path(self.params["source_dir"]))
        hub: type[HuggingFace | ModelScope] = HuggingFace if self.params["hub"] == "huggingface" else ModelScope
        try:
            return hub(self.id, self.revision, self.params["token"], self.directory / STORE / ".client")
        except ImportError as error:
            raise StoreError(
                f"{sys.executable} has no module '{error.name}': model_weights_python must name a Python that has it "
                "(LMDeploy's environment does)."
            ) from error


class Fetcher:
    """Brings one model into the store: files in parallel, each tried several times and checked."""

    def __init__(self, model: Model, progress: Progress) -> None:
        """Prepare; the source is asked later."""
        self.model, self.progress = model, progress
        self.attempts = max(1, int(model.params["attempts"]))

    def run(self) -> None:
        """Fetch, check, mark and link."""
        model = self.model
        if re.fullmatch("[0-9a-f]{40}", model.revision):
            # A commit that is here already, such as the one before: nobody needs to be asked.
            pinned = read_marker(model.entry(model.revision))
            if pinned and is_complete(model.entry(model.revision), pinned):
                switch_link(model.link, model.entry(model.revision))
                return
        source = model.source()
        commit, offered = self.patient(source.resolve)
        files = selected(offered, model.patterns["allow"], model.patterns["ignore"])
        if not any(file.size for file in files):
            raise StoreError(
                f"{model.id} at {commit} has {len(offered)} files, and its allow_patterns {model.patterns['allow']} "
                f"and ignore_patterns {model.patterns['ignore']} leave none: change them."
            )
        entry = model.entry(commit)
        marker = read_marker(entry)
        if not marker or not is_complete(entry, marker):
            marker = self.fill(source, commit, files, entry)
        known = marker["source"].get("revisions", [])
        if model.revision != commit and model.revision not in known:
            marker["source"]["revisions"] = sorted([*known, model.revision])
            write_marker(entry, {key: value for key, value in marker.items() if key != "format"})
        switch_link(model.link, entry)
        model.prune(entry)

    def fill(self, source: Source, commit: str, files: list[Remote], entry: Path) -> dict[str, Any]:
        """Fetch the files beside the final place and move them there when all are right."""
        model = self.model
        work = entry.with_name(entry.name + ".partial")
        work.mkdir(mode=0o755, parents=True, exist_ok=True)
        self.share(files, work)
        total = sum(file.size for file in files)
        fault = disk_fault(work, max(0, total - bytes_below(work)), int(model.params["reserve_gib"]) << 30)
        if fault:
            raise StoreError(f"No room for {model.id}: {fault}")
        self.progress.watch(model.id, work, total)
        try:
            entries = self.parallel(source, commit, files, work)
        finally:
            self.progress.stop()
        model.came_from = source.summary() if isinstance(source, Peers) else ""
        missing = missing_shards(work)
        if missing:
            raise StoreError(
                f"{model.id} at {commit} is incomplete: its index names {', '.join(missing)}. Correct allow_patterns "
                "and ignore_patterns of the model, or complete the folder it comes from."
            )
        self.tidy(files, work)
        if entry.exists():
            shutil.rmtree(entry)
        marker = {
            "source": {"id": model.id, "commit": commit, "revisions": [], "patterns": model.patterns},
            "bytes": total,
            "files": sorted(entries, key=lambda item: str(item["path"])),
        }
        write_marker(work, marker)
        work.rename(entry)
        return marker

    def patient(self, action: Callable[[], Any]) -> Any:
        """Call ``action`` until it works, with longer pauses each time; the last fault is the result."""
        pause, attempt = FIRST_PAUSE_SECONDS, 1
        while True:
            try:
                return action()
            except TryAgain as error:
                if error.progressed:
                    # A line that is cut again and again still brings the file, piece by piece.
                    pause, attempt = FIRST_PAUSE_SECONDS, 1
                if attempt >= self.attempts:
                    raise StoreError(
                        f"{self.model.id} could not be fetched in {attempt} tries: {error}. What has arrived is kept: "
                        "run again to go on, or fetch from a mirror (mirrors_hf_endpoint) or a folder "
                        "(model_weights_source_dir)."
                    ) from error
                wait = min(pause, LONGEST_PAUSE_SECONDS) if error.wait_seconds is None else error.wait_seconds
                self.progress.note = f"try {attempt} of {self.attempts} failed ({error}), next in {wait:.0f} s"
                time.sleep(wait)
                self.progress.note = ""
                pause, attempt = pause * 2, attempt + 1

    @staticmethod
    def ordered(source: Source, files: list[Remote]) -> list[Remote]:
        """Return the files in the order of fetching: from a hub the largest first."""
        if isinstance(source, Peers):
            # Each host begins elsewhere, and gives the others what it has: so one source doesn't send all to all.
            return random.sample(files, len(files))
        return sorted(files, key=lambda item: -item.size)

    @staticmethod
    def bring(source: Source, commit: str, file: Remote, work: Path) -> dict[str, Any]:
        """Fetch and check one file; where several hosts gave a wrong one, again from another."""
        while True:
            if not (work / file.path).is_file():
                source.fetch(commit, file, work)
            try:
                return checked(work / file.path, file)
            except (StoreError, TryAgain):
                if not isinstance(source, Peers) or not source.doubt(file):
                    raise

    def parallel(self, source: Source, commit: str, files: list[Remote], work: Path) -> list[dict[str, Any]]:
        """Fetch and check all files, a few at a time; the first fault ends it."""
        todo: queue.SimpleQueue[Remote] = queue.SimpleQueue()
        for file in self.ordered(source, files):
            todo.put(file)
        results: queue.SimpleQueue[dict[str, Any] | BaseException] = queue.SimpleQueue()

        ended = threading.Event()

        def worker() -> None:
            while not ended.is_set():
                try:
                    file = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    results.put(self.patient(functools.partial(self.bring, source, commit, file, work)))
                except BaseException as error:  # noqa: BLE001 -- handed to the main thread
                    results.put(error)
                    return

        for _worker in range(max(1, min(int(self.model.params["workers"]), len(files)))):
            # Daemons: after a fault nobody waits for the gigabytes still on their way; a next run goes on with them.
            threading.Thread(target=worker, name="fetch", daemon=True).start()
        entries: list[dict[str, Any]] = []
        while len(entries) < len(files):
            result = results.get()
            if isinstance(result, BaseException):
                ended.set()
                raise result
            entries.append(result)
        return entries

    def share(self, files: list[Remote], work: Path) -> None:
        """Hard-link files that another snapshot of this model holds with the same sha256."""
        wanted = {file.sha256: file for file in files if file.sha256 and not (work / file.path).exists()}
        for other in sorted(work.parent.iterdir()):
            marker = read_marker(other)
            for item in marker["files"] if marker else []:
                file = wanted.get(item["sha256"])
                if file and (other / item["path"]).is_file() and not (work / file.path).exists():
                    (work / file.path).parent.mkdir(parents=True, exist_ok=True)
                    (work / file.path).hardlink_to(other / item["path"])

    @staticmethod
    def tidy(files: list[Remote], work: Path) -> None:
        """Leave the model's own files only, readable by the engine's user."""
        wanted = {file.path for file in files}
        for path in sorted(work.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if any(path.iterdir()):
                    path.chmod(0o755)
                else:
                    path.rmdir()
            elif path.relative_to(work).as_posix() in wanted:
                path.chmod(0o644)
            else:
                path.unlink()
        work.chmod(0o755)


def run(module: AnsibleModule) -> dict[str, Any]:
    """Bring every model into place, or say what would be done."""
    models = [Model(module, item) for item in module.params["models"]]
    faults = [fault for model in models if (fault := model.fault())]
    names = [model.id for model in models]
    faults += [
        f"{name} is listed twice: a host keeps one revision of a model." for name in set(names) if names.count(name) > 1
    ]
    if faults:
        raise StoreError("model_weights_models: " + " ".join(faults))
    before = [model.state() for model in models]
    missing = [model for model, (done, _marker) in zip(models, before, strict=True) if not done]
    if missing and module.params["fetch"] and not module.check_mode:
        need_python(module, missing)
        fetch(module, missing)
    result, old, new = [], "", ""
    for model, (done, marker) in zip(models, before, strict=True):
        now = model.marker() if not done else marker
        current = now if done or not (module.check_mode or not module.params["fetch"]) else None
        commit = str(current["source"]["commit"]) if current else ""
        size = int(current["bytes"]) if current else 0
        entry: dict[str, Any] = {"id": model.id, "path": str(model.link), "commit": commit, "bytes": size}
        entry |= {"changed": not done, "source": model.came_from}
        if module.params["manifests"]:
            entry["wish"] = model.item
            entry |= {"manifest": {key: current[key] for key in ("source", "bytes", "files")}} if current else {}
        result.append(entry)
        if not done:
            old += f"{model.id} {marker['source']['commit']}\n" if marker else ""
            new += f"{model.id} {commit or model.revision or 'default branch'}\n"
    answer = {"changed": bool(missing), "models": result, "diff": {"before": old, "after": new}}
    if not module.params["manifests"]:
        return answer
    return {**answer, "address": module.params["address"] or own_address()}


def own_address() -> str:
    """Return the address that this host has towards others. Nothing is sent: the kernel only looks up a route."""
    for family, elsewhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            probe.connect((elsewhere, 9))
            return str(probe.getsockname()[0])
    return ""


def need_python(module: AnsibleModule, missing: list[Model]) -> None:
    """Go on in the Python that has the hub's client."""
    python = module.params["python"]
    if module.params["source_dir"] or not python or has_respawned():
        return
    if not os.access(python, os.X_OK) and all(model.manifest() for model in missing):
        # The fleet has them; only what it can't give would want the hub.
        return
    if not os.access(python, os.X_OK):
        raise StoreError(
            f"model_weights_python is '{python}', which is not there: install LMDeploy's environment first (role "
            "lmdeploy), or name another Python that has huggingface_hub."
        )
    respawn_module(python)


def fetch(module: AnsibleModule, models: list[Model]) -> None:
    """Fetch the missing models one after another; a second run on this host waits for the first."""
    store = Path(module.params["path"]) / STORE
    store.mkdir(mode=0o755, parents=True, exist_ok=True)
    progress = Progress(store / "progress.json")
    with (store / "lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            for model in models:
                if not model.state()[0]:
                    Fetcher(model, progress).run()
        finally:
            progress.stop()
            shutil.rmtree(store / ".client", ignore_errors=True)


def main() -> None:
    """Run as a module."""
    patterns: dict[str, Any] = {"type": "list", "elements": "str"}
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "models": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "id": {"type": "str", "required": True},
                    "revision": {"type": "str", "default": ""},
                    "allow_patterns": {**patterns, "default": []},
                    "ignore_patterns": {**patterns, "default": DEFAULT_IGNORE},
                },
            },
            "hub": {"type": "str", "choices": ["huggingface", "modelscope"], "default": "huggingface"},
            "token": {"type": "str", "default": "", "no_log": True},
            "source_dir": {"type": "str", "default": ""},
            "python": {"type": "path", "default": ""},
            "attempts": {"type": "int", "default": 5},
            "workers": {"type": "int", "default": 4},
            "reserve_gib": {"type": "int", "default": 2},
            "keep_snapshots": {"type": "int", "default": 2},
            "kept_by": {"type": "list", "elements": "str", "default": ["/etc/api-server/releases/*/*/model"]},
            "manifests": {"type": "bool", "default": False},
            "address": {"type": "str", "default": ""},
            "peer_manifests": {"type": "list", "elements": "dict", "default": []},
            "peers": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "address": {"type": "str", "required": True},
                    "port": {"type": "int", "required": True},
                },
            },
            "peer_certificate": {"type": "str", "default": "", "no_log": True},
            "fetch": {"type": "bool", "default": True},
            "progress_seconds": {"type": "int", "default": 10},
            "timeout_seconds": {"type": "int", "default": 86400},
        },
        supports_check_mode=True,
    )
    try:
        result = run(module)
    except (StoreError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
