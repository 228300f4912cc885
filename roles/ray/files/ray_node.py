# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Run one node of a Ray cluster under systemd, which learns from here whether the cluster has it.

systemd hands over two credentials: ``node.json`` (written by the role ray) and ``token``. `ray start --block` runs as a
child; this process asks the head for the list of nodes:

* READY=1 is said when this node is in it and alive;
* a node that is no longer in it (the head came back with a new cluster, or counts it as dead) ends, and systemd starts
  it again. Ray itself would notice after a minute or more, or not at all.

Needs Python 3.10 or later and the environment's Ray.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

LOOK_SECONDS = 2.0
# So long may the head be silent, or the node be missing, before the node begins anew.
MISSING_SECONDS = 10.0
# Ports behind the first: (flag, offset).
PORTS = (
    ("--node-manager-port", 1),
    ("--object-manager-port", 2),
    ("--runtime-env-agent-port", 3),
    ("--dashboard-agent-listen-port", 4),
    ("--dashboard-agent-grpc-port", 5),
    ("--metrics-export-port", 6),
    ("--min-worker-port", 10),
    ("--max-worker-port", 99),
)
# GcsNodeInfo.GcsNodeState of Ray's gcs.proto.
ALIVE = 0
# What the driver on this host looks for.
TEMP_DIR = "/run/ray"


def arguments(node: dict[str, Any]) -> list[str]:
    """Return what follows `ray start` for a node."""
    first = int(node["first_port"])
    result = ["--block", "--disable-usage-stats", "--log-color=false", f"--node-ip-address={node['address']}"]
    if node["is_head"]:
        # No dashboard: it would open one more port for what nobody asked for.
        result += ["--head", f"--port={first}", "--include-dashboard=false", f"--temp-dir={TEMP_DIR}"]
    else:
        result += [f"--address={node['head']}"]
    result += [f"{flag}={first + offset}" for flag, offset in PORTS]
    for flag, key in (("--num-cpus", "cpus"), ("--num-gpus", "gpus")):
        if node[key] not in (None, ""):
            result.append(f"{flag}={int(node[key])}")
    if node["object_store_gib"] not in (None, ""):
        result.append(f"--object-store-memory={int(float(node['object_store_gib']) * (1 << 30))}")
    return result


def tell(address: str, *lines: str) -> None:
    """Tell systemd our state: sd_notify(3); silent outside a unit."""
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.sendto("\n".join(lines).encode(), "\0" + address[1:] if address.startswith("@") else address)


class Watch(threading.Thread):
    """Looks whether the cluster has this node, and ends the node when it has not."""

    def __init__(self, node: dict[str, Any], child: subprocess.Popen[bytes], notify: str) -> None:
        """Begin with start()."""
        super().__init__(daemon=True)
        self.node, self.child, self.notify = node, child, notify
        self.client: Any = None
        self.joined = False

    def living(self) -> list[str]:
        """Return the addresses of the nodes that the head counts as alive."""
        if self.client is None:
            self.client = importlib.import_module("ray._raylet").GcsClient(address=self.node["head"])
        nodes = self.client.get_all_node_info(timeout=5).values()
        return sorted(str(node.node_manager_address) for node in nodes if node.state == ALIVE)

    def run(self) -> None:
        """Look until the node ends."""
        seen = time.monotonic()
        while self.child.poll() is None:
            try:
                nodes, why = self.living(), "the head does not count this node among its own"
            except Exception as error:  # noqa: BLE001  # whatever the client says, the head did not answer
                self.client = None
                nodes, why = [], " ".join(str(error).split())[:200]
            if self.node["address"] in nodes:
                seen = time.monotonic()
                first, self.joined = not self.joined, True
                status = f"STATUS={len(nodes)} of the cluster's nodes are alive: {', '.join(nodes)}"
                tell(self.notify, *(["READY=1"] if first else []), status)
            elif self.joined and time.monotonic() - seen > MISSING_SECONDS:
                sys.stderr.write(f"node: begins anew: {why}\n")
                self.child.terminate()
                return
            elif not self.joined:
                tell(self.notify, f"STATUS=Joining {self.node['head']}: {why}")
            time.sleep(LOOK_SECONDS)


def main() -> int:
    """Run the node until it ends or is told to."""
    credentials = Path(os.environ["CREDENTIALS_DIRECTORY"])
    node = json.loads((credentials / "node.json").read_text(encoding="utf-8"))
    notify = os.environ.pop("NOTIFY_SOCKET", "")
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(credentials / "token")
    program = str(Path(sys.executable).with_name("ray"))
    child = subprocess.Popen([program, "start", *arguments(node)])
    stopped = threading.Event()

    def stop(*_: object) -> None:
        stopped.set()
        tell(notify, "STOPPING=1")
        child.terminate()

    signal.signal(signal.SIGTERM, stop)
    Watch(node, child, notify).start()
    child.wait()
    return 0 if stopped.is_set() else 1


if __name__ == "__main__":
    sys.exit(main())
