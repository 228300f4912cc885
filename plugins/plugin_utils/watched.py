# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""The controller's half of progress: looks on the host how far a long step is, and hands it to the callback.

The callback ``progress`` names a folder of the run, in which every worker leaves the figures of its host; there they go
into the callback's own line. Without the callback each line is printed as it comes, so it is never lost.
"""

from __future__ import annotations

import contextlib
import copy
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ansible import constants
from ansible.plugins.action import ActionBase
from ansible.plugins.action.normal import ActionModule as NormalAction
from ansible.utils.display import Display
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.progress import command

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_SECONDS = 10.0
# The same word as for the callback, which may be off.
SECONDS_VARIABLE = "SELFHOST_PROGRESS_SECONDS"
# A look comes this much before the callback's line, in shares of its interval, so that the figures are fresh.
AHEAD = 0.2
# A host that does not answer a look delays the end of a step by no more than this.
LOOK_SECONDS = 10.0


def folder() -> Path:
    """Return the folder of this run's figures; the same in the main process and in all its workers."""
    return Path(str(constants.DEFAULT_LOCAL_TMP)) / "selfhost-progress"


def open_folder(interval: float) -> None:
    """Have the folder: figures are shown by a callback from now on, every ``interval`` seconds."""
    folder().mkdir(exist_ok=True)
    (folder() / "interval").write_text(str(interval), encoding="ascii")


def interval() -> float | None:
    """Return the seconds between two lines of the callback; None where there is no callback."""
    try:
        return float((folder() / "interval").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def figures(task: str) -> dict[str, str]:
    """Return what the hosts of a task told last, by their names."""
    found = {}
    for file in (folder() / task).glob("[!.]*"):
        with contextlib.suppress(OSError):
            found[file.name] = file.read_text(encoding="utf-8")
    return found


def tell(task: str, host: str, text: str, seconds: float = DEFAULT_SECONDS) -> None:
    """Hand one line about a host to the callback; print it where there is none, or one that speaks less often."""
    shown = interval()
    if shown is None or seconds < shown:
        Display().display(f"... {host}: {text}")
        return
    place = folder() / task / host
    place.parent.mkdir(exist_ok=True)
    new = place.with_name(f".{place.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(place)


def forget(task: str, host: str) -> None:
    """Take back what a host told."""
    with contextlib.suppress(OSError):
        (folder() / task / host).unlink(missing_ok=True)


def look(action: ActionBase, step: str) -> str:
    """Return the present line of a step, by a connection of its own beside the one on which the step runs."""
    twin = copy.copy(action)
    twin._connection = copy.copy(action._connection)
    if twin._connection.become:
        twin._connection.become = copy.copy(twin._connection.become)
    answer = twin._low_level_execute_command(command(step), sudoable=True)
    return str(answer.get("stdout", "")).strip()


@contextlib.contextmanager
def watched(action: ActionBase, host: str) -> Iterator[None]:
    """While a step runs on a host, look now and then how far it is, and tell it."""
    step = action._task.action.rpartition(".")[2]
    task, over = action._task._uuid, threading.Event()
    pause = interval() or float(os.environ.get(SECONDS_VARIABLE) or DEFAULT_SECONDS)

    def watch() -> None:
        wait = pause * (1 - AHEAD)
        while not over.wait(wait):
            wait = pause
            # The step itself says what is wrong with the host.
            with contextlib.suppress(Exception):
                text = look(action, step)
                if text and not over.is_set():
                    tell(task, host, text, pause)

    watcher = threading.Thread(target=watch, name="selfhost-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(timeout=LOOK_SECONDS)
        forget(task, host)


class WatchedAction(NormalAction):  # type: ignore[misc]  # ansible-core carries no types
    """Runs a module as any other, and tells how far it is when it takes long."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the module's result."""
        with watched(self, str((task_vars or {}).get("inventory_hostname", ""))):
            return dict(super().run(tmp, task_vars))
