# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Models once a fleet: who fetches what from a hub, and how the other hosts take it from those that have it.

A manifest (commit, files, SHA-256 of each) travels over Ansible's own connection. The bytes come from any host of the
fleet, in pieces, and are compared with the manifest, so a source may die, stall or lie: it is left out, and what no
host can give comes from the hub.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import ssl
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ansible_collections.selfhost.lmdeploy.plugins.module_utils.model_sources import Remote, Source, finish, part_of
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.model_store import CHUNK_BYTES, StoreError, human

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

PIECE_BYTES = 64 << 20
SILENCE_SECONDS = 15.0
# So many faults in a row, and a host is asked no more.
FAULTS_TO_LEAVE = 3
FIRST_PAUSE_SECONDS = 1.0
# A host that takes the model too may have a file soon.
LACK_SECONDS = 5.0
HUB = "hub"


# What the module model_snapshot returned on a host with "manifests", newest last.
Results = list[dict[str, Any]]


def models_of(results: Results) -> list[dict[str, Any]]:
    """Return what is known of each model that a host wants, the newest word on each."""
    newest: dict[str, dict[str, Any]] = {}
    for result in results:
        newest |= {model["id"]: model for model in result.get("models") or []}
    return list(newest.values())


def serves(manifest: dict[str, Any], wish: dict[str, Any]) -> bool:
    """Tell whether a manifest is that of a model as it is wanted."""
    source = manifest["source"]
    return bool(
        source["id"] == wish["id"]
        and wish["revision"] in [source["commit"], *source["revisions"]]
        and source["patterns"] == {key: sorted(wish[f"{key}_patterns"]) for key in ("allow", "ignore")}
    )


def share_out(hosts: dict[str, Results]) -> dict[str, Any]:
    """Say who does what: ``fetch`` (host: models to get from the hub), ``take`` (host: manifests), ``share`` (hosts).

    A model that some host has is taken from there, at the commit that most hosts have; what none has is fetched by one
    host, a different one for each model where that can be. Nobody shares where nobody takes.
    """
    models = {name: models_of(results) for name, results in hosts.items()}
    held = {name: [item["manifest"] for item in known if item.get("manifest")] for name, known in models.items()}
    wanted = {name: [item["wish"] for item in known] for name, known in models.items()}
    fetch: dict[str, list[dict[str, Any]]] = {}
    take: dict[str, list[dict[str, Any]]] = {}
    share: set[str] = set()
    for name, wishes in wanted.items():
        for wish in wishes:
            if any(serves(manifest, wish) for manifest in held[name]):
                continue
            found = [manifest for other in held.values() for manifest in other if serves(manifest, wish)]
            if found:
                commits = [manifest["source"]["commit"] for manifest in found]
                manifest = max(found, key=lambda item: commits.count(item["source"]["commit"]))
                take.setdefault(name, []).append(manifest)
                entry = manifest["source"]
                share |= {
                    other
                    for other, theirs in held.items()
                    if any(item["source"]["commit"] == entry["commit"] and serves(item, wish) for item in theirs)
                }
            elif not any(same_wish(wish, other) for others in fetch.values() for other in others):
                fellows = [other for other in hosts if any(same_wish(wish, one) for one in wanted[other])]
                fetcher = min(fellows, key=lambda other: len(fetch.get(other, [])))
                fetch.setdefault(fetcher, []).append(wish)
    # Who takes gives on at once what has arrived.
    return {"fetch": fetch, "take": take, "share": sorted(share | set(take)) if take else []}


def same_wish(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether two hosts want the same files of the same model."""
    return one["id"] == other["id"] and one["revision"] == other["revision"] and patterns(one) == patterns(other)


def patterns(wish: dict[str, Any]) -> list[list[str]]:
    """Return what chooses files, in an order that makes equal choices equal."""
    return [sorted(wish["allow_patterns"]), sorted(wish["ignore_patterns"])]


class PeerFault(Exception):
    """A host of the fleet did not give what was asked for."""


class Lacking(PeerFault):
    """It has not got the file, or not yet."""


@dataclass
class Peer:
    """One host that gives models, and what we know of it."""

    name: str
    address: str
    port: int
    busy: int = 0
    bytes: int = 0
    faults: int = 0
    rests_until: float = 0.0
    lost: str = ""
    # Until when it need not be asked again for a file that it had not.
    lacks: dict[str, float] = field(default_factory=dict)


def context_of(pem: str, folder: Path) -> ssl.SSLContext:
    """Return TLS with the run's certificate on both sides; the key is on disk only while it is read."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # The one certificate says that the other side belongs to this run; it names no host.
    context.check_hostname = False
    context.load_verify_locations(cadata=pem[: pem.index("-----BEGIN PRIVATE KEY")])
    handle, name = tempfile.mkstemp(dir=folder)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(pem)
        context.load_cert_chain(name)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)  # noqa: PTH108  # a name, not a path of ours
    return context


class Peers:
    """A source for models that other hosts of the fleet have; what they can't give comes from the hub."""

    def __init__(
        self,
        manifest: dict[str, Any],
        place: str,
        peers: Iterable[dict[str, Any]],
        context: ssl.SSLContext,
        hub: Callable[[], Source],
    ) -> None:
        """Keep the manifest, the entry's place below the store, the hosts, and how to have the hub if need be."""
        self.manifest, self.place, self.context, self._hub = manifest, place, context, hub
        self.peers = [Peer(peer["name"], peer["address"], peer["port"]) for peer in peers]
        self.lock = threading.Lock()
        # Who gave bytes of a file; and, where they were wrong, who is to give it alone.
        self.givers: dict[str, set[str]] = {}
        self.alone: dict[str, list[str]] = {}
        self.hub: Source | None = None
        self.hub_bytes = 0

    def resolve(self) -> tuple[str, list[Remote]]:
        """Return what the manifest says."""
        files = [Remote(item["path"], item["size"], item["sha256"]) for item in self.manifest["files"]]
        return str(self.manifest["source"]["commit"]), files

    def fetch(self, commit: str, remote: Remote, work: Path) -> None:
        """Bring one file, piece by piece, each from the host that is least busy; the rest from the hub."""
        part = part_of(remote, work)
        with self.lock:
            givers = self.givers.setdefault(remote.path, {"an earlier run"} if part.stat().st_size else set())
        while (begin := part.stat().st_size) < remote.size:
            peer_or_none = self.choose(remote.path)
            if peer_or_none is None:
                givers.add(HUB)
                self.hub_bytes += remote.size - begin
                self.ask_hub().fetch(commit, remote, work)
                return
            self.piece(peer_or_none, remote, part, begin)
        finish(part, remote, work)

    def piece(self, peer: Peer, remote: Remote, part: Path, begin: int) -> None:
        """Append one piece from a host and note how it did."""
        try:
            self.download(peer, remote, part, begin)
        except Lacking:
            peer.lacks[remote.path] = time.monotonic() + LACK_SECONDS
        except (PeerFault, OSError, http.client.HTTPException) as error:
            with self.lock:
                peer.faults += 1
                peer.rests_until = time.monotonic() + FIRST_PAUSE_SECONDS * 2 ** (peer.faults - 1)
                if peer.faults >= FAULTS_TO_LEAVE:
                    peer.lost = str(error) or type(error).__name__
        else:
            peer.faults = 0
        finally:
            got = part.stat().st_size - begin
            with self.lock:
                peer.busy -= 1
                peer.bytes += got
                if got:
                    self.givers[remote.path].add(peer.name)

    def download(self, peer: Peer, remote: Remote, part: Path, begin: int) -> None:
        """Ask one host for one piece."""
        last = min(begin + PIECE_BYTES, remote.size) - 1
        connection = http.client.HTTPSConnection(peer.address, peer.port, timeout=SILENCE_SECONDS, context=self.context)
        try:
            connection.request(
                "GET", f"/{quote(f'{self.place}/{remote.path}')}", headers={"Range": f"bytes={begin}-{last}"}
            )
            answer = connection.getresponse()
            if answer.status == http.HTTPStatus.NOT_FOUND:
                raise Lacking
            if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
                message = f"HTTP {answer.status}"
                raise PeerFault(message)
            left = last + 1 - begin
            with part.open("ab") as sink:
                while left and (piece := answer.read(min(left, CHUNK_BYTES))):
                    sink.write(piece)
                    left -= len(piece)
            if left:
                message = f"the connection ended {human(left)} early"
                raise PeerFault(message)
        finally:
            connection.close()

    def choose(self, path: str) -> Peer | None:
        """Return the least busy host that may have a file, waiting for one that rests; None when none is left."""
        while True:
            with self.lock:
                alone = self.alone.get(path)
                now = time.monotonic()
                able = [peer for peer in self.peers if not peer.lost and peer.lacks.get(path, 0.0) <= now]
                if alone is not None:
                    able = [peer for peer in able if peer.name in alone[:1]]
                ready = [peer for peer in able if peer.rests_until <= now]
                if ready:
                    chosen = min(ready, key=lambda peer: (peer.busy, random.random()))  # noqa: S311  # no secret
                    chosen.busy += 1
                    return chosen
                if not able:
                    if not alone:
                        return None
                    # The next one is to give it alone.
                    alone.pop(0)
                    continue
                pause = min(peer.rests_until for peer in able) - now
            time.sleep(max(0.0, pause))

    def doubt(self, remote: Remote) -> bool:
        """Hear that a file arrived wrong; tell whether another try makes sense.

        One host gave it: that one lies and is left out. Several did: from now on one gives it whole, then the next.
        """
        with self.lock:
            givers = self.givers.pop(remote.path, set())
            if givers == {HUB}:
                return False
            if len(givers) == 1:
                for peer in self.peers:
                    if peer.name in givers:
                        peer.lost = f"gave {remote.path} with a wrong checksum"
            if len(givers) > 1 or remote.path in self.alone:
                living = [peer.name for peer in self.peers if not peer.lost]
                self.alone[remote.path] = [name for name in self.alone.get(remote.path, living) if name in living]
        return True

    def ask_hub(self) -> Source:
        """Return the hub, asked for only where the fleet can't help."""
        with self.lock:
            if self.hub is None:
                try:
                    self.hub = self._hub()
                except StoreError as error:
                    message = f"{error} It was needed, because no host of the fleet could give all: {self.summary()}."
                    raise StoreError(message) from error
            return self.hub

    def summary(self) -> str:
        """Say in one line who gave how much, and who was left out and why."""
        given = [f"{human(peer.bytes)} from {peer.name}" for peer in self.peers if peer.bytes]
        given += [f"{human(self.hub_bytes)} from the hub"] if self.hub_bytes else []
        return ", ".join(given + [f"{peer.name} left out: {peer.lost}" for peer in self.peers if peer.lost])
