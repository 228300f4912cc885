# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""One line about how far a long step is, from a host's module to whoever watches on the controller.

A module can't speak before it ends. So while a step runs, ``told`` keeps its present line in a file of the host, and
the action (plugin_utils/watched.py) looks there when the step takes long. A step that is over soon costs nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ansible_collections.selfhost.lmdeploy.plugins.module_utils.model_store import human

# Root's lies where only root writes; another user's in the home folder. A shell finds both by these words.
ROOT_FOLDER = Path("/run/selfhost-progress")
USER_FOLDER = ".cache/selfhost-progress"
LOOK_SECONDS = 1.0
RATE_WINDOW_SECONDS = 20.0
# A line that is longer is none to be read in passing.
LONGEST_LINE = 160
LOADING = re.compile(r"Loading .*: (?P<seconds>\d+) s, (?P<read>[\d.]+) GB read")


def place(step: str) -> Path:
    """Return the file of a step, for the user that runs this."""
    return (ROOT_FOLDER if os.geteuid() == 0 else Path.home() / USER_FOLDER) / step


def command(step: str) -> str:
    """Return the shell command that prints a step's present line, if there is one."""
    return f"cat {ROOT_FOLDER}/{step} ~/{USER_FOLDER}/{step} 2>/dev/null || :"


@contextlib.contextmanager
def told(step: str, say: Callable[[], str], look_seconds: float = LOOK_SECONDS) -> Iterator[None]:
    """Keep what ``say`` returns, renewed every ``look_seconds``, where the controller finds it; nothing stays after.

    Whatever goes wrong with that is no fault of the step: it is then merely not told.
    """
    file, over = place(step), threading.Event()

    def keep() -> None:
        while not over.wait(look_seconds):
            with contextlib.suppress(Exception):
                line = " ".join(say().split())[:LONGEST_LINE]
                file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                new = file.with_name(f".{file.name}.new")
                new.write_text(line, encoding="utf-8")
                new.replace(file)

    with contextlib.suppress(OSError):
        # Of a run that was killed.
        file.unlink(missing_ok=True)
    keeper = threading.Thread(target=keep, name="progress", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        over.set()
        keeper.join(timeout=5)
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
            # Where nothing else is told now, nothing is left.
            file.parent.rmdir()


class Flow:
    """How fast something grows, from its last twenty seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing was seen yet."""
        self._clock = clock
        self._seen: list[tuple[float, int]] = []

    def rate(self, done: int) -> float:
        """Return the growth a second, given how much there is now."""
        now = self._clock()
        self._seen = [*[point for point in self._seen if now - point[0] <= RATE_WINDOW_SECONDS], (now, done)]
        spent = now - self._seen[0][0]
        return (done - self._seen[0][1]) / spent if spent else 0.0

    def text(self, done: int, total: int = 0) -> str:
        """Return bytes, the rate and, where the total is known, the time left."""
        return flow_text(done, total, self.rate(done))


def flow_text(done: int, total: int, rate: float) -> str:
    """Return bytes done of all (0 where that is not known), bytes a second, and the time left."""
    text = f"{human(done)} of {human(total)}" if total else human(done)
    if rate <= 0:
        return f"{text}, waiting for data"
    if not total:
        return f"{text}, {human(rate)}/s"
    left = (total - done) / rate
    return f"{text}, {human(rate)}/s, " + (f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left")


def load_text(status: str, weights: int, last_seconds: float) -> str:
    """Return how far a model's load is, from what its unit says, the bytes of its weights and the last load's seconds.

    The engine's other reads count as well, so the share is a measure and no promise.
    """
    found = LOADING.match(status)
    if found is None:
        return status
    before = f" of {last_seconds:.0f} s last time" if last_seconds else ""
    read = float(found["read"]) * 1e9
    share = f", {min(read / weights * 100, 100):.0f}% of {human(weights)} read" if weights else f", {human(read)} read"
    return f"loading for {found['seconds']} s{before}{share}"


def apt_text(lines: Iterable[str]) -> str:
    """Return how far an installation is, from what apt-get printed so far."""
    total, counts = 0, {"fetched": 0, "unpacked": 0, "set up": 0}
    for line in lines:
        if found := re.match(r"\d+ upgraded, (\d+) newly installed", line):
            total = int(found[1])
        for word, beginning in (("fetched", "Get:"), ("unpacked", "Unpacking "), ("set up", "Setting up ")):
            counts[word] += bool(total) and line.startswith(beginning)
    now = next((word for word in reversed(counts) if counts[word]), "")
    return f"{counts[now]} of {max(total, counts[now])} packages {now}" if now else "package lists"


def weights_of(path: Path) -> int:
    """Return the bytes of a model's weights: of a file, or of a folder's files."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return path.stat().st_size if path.exists() else 0
