"""Open WebUI as a person of a scenario uses it: accounts, chats and files through its API."""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from testinfra.host import Host

ROOT = Path(__file__).resolve().parents[1]
ARCHIVES = "/var/backups/open-webui"


@dataclass
class Ui:
    """Open WebUI's HTTP API as one account, through a tunnel: it listens on the host's loopback alone."""

    url: str
    token: str = ""

    def call(self, path: str, body: Any = None, *, kind: str = "application/json") -> Any:
        """Return the answer, decoded where it is JSON."""
        headers = {"Content-Type": kind, **({"Authorization": f"Bearer {self.token}"} if self.token else {})}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)  # noqa: S310 - the tunnel's own address
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
            content = answer.read()
        return json.loads(content) if "json" in answer.headers["Content-Type"] else content.decode()

    def signed_in(self, email: str, word: str) -> Ui:
        """Return the same place, seen by an account."""
        return Ui(self.url, self.call("/api/v1/auths/signin", {"email": email, "password": word})["token"])

    def upload(self, name: str, content: str) -> str:
        """Bring a file and return its id."""
        edge = secrets.token_hex(16)
        head = f'--{edge}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\nContent-Type: text/plain'
        body = f"{head}\r\n\r\n{content}\r\n--{edge}--\r\n".encode()
        return str(self.call("/api/v1/files/?process=false", body, kind=f"multipart/form-data; boundary={edge}")["id"])

    def ask(self, title: str) -> None:
        """Make a chat."""
        message = {"id": "1", "role": "user", "content": title, "parentId": None, "childrenIds": []}
        chat = {"title": title, "history": {"messages": {"1": message}, "currentId": "1"}, "messages": [message]}
        self.call("/api/v1/chats/new", {"chat": chat})

    def delete(self, chat: str) -> None:
        """Remove a chat."""
        request = urllib.request.Request(  # noqa: S310 - the tunnel's own address
            f"{self.url}/api/v1/chats/{chat}", headers={"Authorization": f"Bearer {self.token}"}, method="DELETE"
        )
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60).close()

    def seen(self, email: str, word: str) -> tuple[str, list[str], list[str]]:
        """Return the version, the titles of a person's chats and what is in the person's files."""
        person = self.signed_in(email, word)
        chats = sorted(chat["title"] for chat in person.call("/api/v1/chats/list?page=1"))
        listed = person.call("/api/v1/files/")
        files = [entry["id"] for entry in (listed["items"] if isinstance(listed, dict) else listed)]
        contents = [person.call(f"/api/v1/files/{entry}/content") for entry in files]
        return self.call("/api/version")["version"], chats, contents


def archives(host: Host, reason: str) -> list[str]:
    """Return the backups of a reason on the host, the newest last."""
    names = host.run(f"ls {ARCHIVES} | grep -- '-{reason}.tar.gz$'").stdout.split()
    return [f"{ARCHIVES}/{name}" for name in sorted(names)]


def people_of_the_older_release(host: Host, name: str, email: str, word: str, content: str) -> None:
    """Have a person with a chat and a file in the release before an upgrade."""
    with tunnel(name) as stranger:
        password = host.file("/etc/open-webui/admin-password").content_string.strip()
        admin = stranger.signed_in("admin@localhost", password)
        admin.call("/api/v1/auths/add", {"name": "Person", "email": email, "password": word, "role": "user"})
        person = stranger.signed_in(email, word)
        person.ask("Before the upgrade")
        person.upload("plan.txt", content)
        assert stranger.seen(email, word) == ("0.12.0", ["Before the upgrade"], [content])


def upgrade_saves_the_data_first(host: Host, play: Callable[[], Any]) -> None:
    """Bring the newer release: it says where the data of the older one are, and a second run changes nothing."""
    played = play()
    assert played.changed() > 0
    (archive,) = archives(host, "upgrade")
    assert f"The data of Open WebUI 0.12.0 are in {archive}" in played.output
    assert play().changed() == 0


@contextmanager
def tunnel(name: str) -> Iterator[Ui]:
    """Give a stranger's way to the Open WebUI of a host."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["ssh", "-F", str(ROOT / ".lab/ssh/config"), "-N", "-o", "ControlPath=none"]
    process = subprocess.Popen([*command, "-L", f"{port}:127.0.0.1:8080", name])
    try:
        ui = Ui(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + 60
        while True:
            try:
                ui.call("/health")
                break
            except (OSError, urllib.error.URLError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        yield ui
    finally:
        process.terminate()
        process.wait()
