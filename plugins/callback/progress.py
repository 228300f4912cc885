# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Plain progress lines for long tasks, and one closing line with counts and times."""

from __future__ import annotations

DOCUMENTATION = r"""
name: progress
type: notification
short_description: Say every few seconds what a long task is waiting for
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - While a task runs longer than O(interval_seconds), prints one plain line every O(interval_seconds) seconds with the
    task's name, the time since it began, how many hosts are done and which ones are still at work.
  - Behind a host's name stands how far it is, where the task's module tells that, as this collection's do - bytes of
    all, rate and time left of a download, packages of all of an environment, seconds of the last load of a model.
  - At the end prints one line with the number of tasks that ran, the time of the whole run, and the slowest tasks.
  - Uses neither colours nor cursor movement, so it reads the same in a terminal, in AWX and in a log file.
options:
  interval_seconds:
    description: Seconds between two lines, and the time that a task may take before the first. Hosts are looked at as
      often.
    type: float
    default: 10.0
    env:
      - name: SELFHOST_PROGRESS_SECONDS
    ini:
      - section: callback_progress
        key: interval_seconds
  slowest:
    description: How many of the slowest tasks the closing line names; 0 names none.
    type: int
    default: 3
    env:
      - name: SELFHOST_PROGRESS_SLOWEST
    ini:
      - section: callback_progress
        key: slowest
requirements:
  - Enable it with C(callbacks_enabled = selfhost.lmdeploy.progress) in ansible.cfg.
"""

import threading
import time
from typing import Any

from ansible.plugins.callback import CallbackBase
from ansible_collections.selfhost.lmdeploy.plugins.plugin_utils.watched import figures, open_folder

# More names than this on one line are a number, not an information.
MAX_HOSTS_SHOWN = 5


def short_name(task: Any) -> str:
    """Return a task's name without this collection's, which would stand before every role's."""
    return str(task.get_name()).strip().removeprefix("selfhost.lmdeploy.")


def waiting_line(task: str, elapsed: float, running: list[str], done: int, figures: dict[str, str]) -> str:
    """Return the line for a task that has run ``elapsed`` seconds: who still works and how far, how many are ready."""
    named = [f"{name} ({figures[name]})" if figures.get(name) else name for name in running]
    shown = ", ".join(named[:MAX_HOSTS_SHOWN])
    if len(running) > MAX_HOSTS_SHOWN:
        shown += f" and {len(running) - MAX_HOSTS_SHOWN} more"
    ready = f", {done} done" if done else ""
    return f"... {task}: {elapsed:.0f} s, waiting for {shown}{ready}"


def closing_line(executed: int, skipped: int, seconds: float, durations: dict[str, float], slowest: int) -> str:
    """Return the last line: tasks that ran and were skipped (summed over hosts), seconds in all, the slowest."""
    line = f"{executed} tasks ran, {skipped} skipped, in {seconds:.1f} s"
    top = sorted(durations.items(), key=lambda item: -item[1])[:slowest]
    if top:
        line += "; slowest: " + ", ".join(f"{name} {spent:.1f} s" for name, spent in top)
    return line


class CallbackModule(CallbackBase):  # type: ignore[misc]  # ansible-core carries no types
    """Watch the running task from a thread of its own."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "notification"
    CALLBACK_NAME = "selfhost.lmdeploy.progress"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        """Start with no task; the thread begins with the first one."""
        super().__init__()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._began = time.monotonic()
        self._tasks: dict[str, tuple[str, float]] = {}
        self._running: dict[str, dict[str, float]] = {}
        self._done: dict[str, int] = {}
        self._durations: dict[str, float] = {}
        self._executed = 0
        self._skipped = 0

    # -- what Ansible tells ---------------------------------------------------------------------------------------

    def v2_playbook_on_start(self, playbook: Any) -> None:
        """Begin the clock and the watching thread (in the main process: forks never start one)."""
        self._began = time.monotonic()
        open_folder(float(self.get_option("interval_seconds")))
        self._thread = threading.Thread(target=self._watch, name="selfhost-progress", daemon=True)
        self._thread.start()

    def v2_runner_on_start(self, host: Any, task: Any) -> None:
        """A host began a task."""
        uuid = task._uuid
        with self._lock:
            self._tasks.setdefault(uuid, (short_name(task), time.monotonic()))
            self._running.setdefault(uuid, {})[host.get_name()] = time.monotonic()

    def v2_runner_on_ok(self, result: Any) -> None:
        """A host finished a task well."""
        self._finish(result, ran=True)

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        """A host failed a task."""
        self._finish(result, ran=True)

    def v2_runner_on_unreachable(self, result: Any) -> None:
        """A host could not be reached."""
        self._finish(result, ran=True)

    def v2_runner_on_skipped(self, result: Any) -> None:
        """A host had nothing to do."""
        self._finish(result, ran=False)

    def v2_playbook_on_stats(self, stats: Any) -> None:
        """Stop watching and print the closing line."""
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=1)
        seconds = time.monotonic() - self._began
        slowest = int(self.get_option("slowest"))
        self._display.display(closing_line(self._executed, self._skipped, seconds, self._durations, slowest))

    # -- inside ---------------------------------------------------------------------------------------------------

    def _finish(self, result: Any, *, ran: bool) -> None:
        task, host = result.task, result.host
        now = time.monotonic()
        with self._lock:
            hosts = self._running.get(task._uuid, {})
            began = hosts.pop(host.get_name(), None)
            self._done[task._uuid] = self._done.get(task._uuid, 0) + 1
            if ran:
                self._executed += 1
            else:
                self._skipped += 1
            if began is not None and ran:
                name = short_name(task)
                self._durations[name] = max(self._durations.get(name, 0.0), now - began)
            if not hosts:
                self._running.pop(task._uuid, None)

    def _watch(self) -> None:
        interval = float(self.get_option("interval_seconds"))
        last: dict[str, float] = {}
        while not self._wake.wait(min(1.0, interval / 2)):
            now = time.monotonic()
            with self._lock:
                waiting = [
                    (uuid, *self._tasks[uuid], sorted(hosts), self._done.get(uuid, 0))
                    for uuid, hosts in self._running.items()
                ]
            for uuid, name, began, hosts, done in waiting:
                if now - last.get(uuid, began) >= interval:
                    last[uuid] = now
                    self._display.display(waiting_line(name, now - began, hosts, done, figures(uuid)))
