# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Runs the module model_snapshot in the background of the host and shows how far it is.

One call recognises complete models. Only where something is missing does a second one run detached on the host, so that
hours of download do not hang on one connection, while lines with bytes, rate and time left appear here.
"""

from __future__ import annotations

import json
import shlex
import time
from typing import Any

from ansible import constants
from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.model_store import STORE, human
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.progress import flow_text
from ansible_collections.selfhost.lmdeploy.plugins.plugin_utils.watched import forget, tell

MODULE = "selfhost.lmdeploy.model_snapshot"
LOST_POLLS = 20
# The host ends a job within seconds of its limit.
GRACE_SECONDS = 30
# What a background job adds to a module's result.
JOB_KEYS = ("ansible_job_id", "finished", "results_file", "started", "stderr", "stderr_lines", "stdout", "stdout_lines")


def line(progress: dict[str, Any]) -> str:
    """Return one line about a running fetch: bytes, rate, time left."""
    done, total, rate = progress["done"], progress["total"], progress["rate"]
    if progress.get("note") or done >= total:
        return f"{progress['model']}: {human(done)} of {human(total)}, {progress.get('note') or 'checking'}"
    return f"{progress['model']}: {flow_text(done, total, rate)}"


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible-core carries no types
    """Plan in one call; fetch in the background when something is missing."""

    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the module's result."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        args = dict(self._task.args)
        plan = self._execute_module(MODULE, {**args, "fetch": False}, task_vars=task_vars)
        seconds = int(args.get("progress_seconds", 10))
        if self._task.check_mode or plan.get("failed") or not plan.get("changed") or not args.get("fetch", True):
            return {**result, **plan}
        if seconds <= 0:
            return {**result, **self._execute_module(MODULE, args, task_vars=task_vars)}
        return {**result, **self._watched(args, seconds, task_vars or {})}

    def _watched(self, args: dict[str, Any], seconds: int, task_vars: dict[str, Any]) -> dict[str, Any]:
        limit = int(args.get("timeout_seconds", 86400))
        # What "async" on a task sets; its own polling shows no figures, so it stays off and is done here.
        self._task.async_val = limit
        folder = self._connection._shell.tmpdir or self._make_tmp_path()
        try:
            job = self._execute_module(MODULE, args, task_vars=task_vars, wrap_async=True)
            if job.get("failed") or "ansible_job_id" not in job:
                return dict(job)
            done = self._wait(
                args, str(job["ansible_job_id"]), time.monotonic() + limit + GRACE_SECONDS, seconds, task_vars
            )
            # The host's watcher removes the module, and with it a token, up to five seconds later.
            self._remove_tmp_path(folder, force=not constants.DEFAULT_KEEP_REMOTE_FILES)
            return done
        finally:
            self._task.async_val = 0
            forget(self._task._uuid, str(task_vars.get("inventory_hostname", "")))

    def _wait(
        self, args: dict[str, Any], job: str, deadline: float, seconds: int, task_vars: dict[str, Any]
    ) -> dict[str, Any]:
        pause, lost, shown = 1.0, 0, time.monotonic()
        folder = self._remote_expand_user(self.get_shell_option("async_dir", default="~/.ansible_async"))
        while time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(pause * 1.5, float(seconds), 10.0)
            try:
                status = self._ask(job, "status", folder, task_vars)
                if status.get("finished"):
                    self._ask(job, "cleanup", folder, task_vars)
                    if "child_pid" in status:
                        # The job didn't end, the host's watcher ended it.
                        break
                    return {key: value for key, value in status.items() if key not in JOB_KEYS}
                if time.monotonic() - shown >= seconds:
                    shown = time.monotonic()
                    self._show(args, seconds, task_vars)
                lost = 0
            except AnsibleConnectionFailure:
                # The fetch goes on without us; only a host that stays away is a fault.
                lost += 1
                if lost == LOST_POLLS:
                    raise
                self._connection.reset()
        limit = args.get("timeout_seconds", 86400)
        return {
            "failed": True,
            "msg": f"The models were not complete after {limit} s (model_weights_timeout_seconds). What has arrived is "
            "kept: run again to go on, or allow more time.",
        }

    def _ask(self, job: str, mode: str, folder: str, task_vars: dict[str, Any]) -> dict[str, Any]:
        arguments = {"jid": job, "mode": mode, "_async_dir": folder}
        return dict(self._execute_module("ansible.legacy.async_status", arguments, task_vars=task_vars))

    def _show(self, args: dict[str, Any], seconds: int, task_vars: dict[str, Any]) -> None:
        file = f"{args['path']}/{STORE}/progress.json"
        # A look at one small file, without the cost of a module.
        answer = self._low_level_execute_command(f"cat {shlex.quote(file)}", sudoable=True)
        try:
            text = line(json.loads(answer.get("stdout", "")))
        except (ValueError, KeyError, TypeError):
            return
        tell(self._task._uuid, str(task_vars.get("inventory_hostname", "")), text, seconds)
