# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""The controller's half of conda_environment: reads the locks here and sends them only to hosts that must build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.plugins.action import ActionBase
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.conda_releases import (
    LockError,
    lock_python,
    parse_lock,
    release_id,
)
from ansible_collections.selfhost.lmdeploy.plugins.plugin_utils.watched import watched

MODULE = "selfhost.lmdeploy.conda_environment"
LOCKS = ("lock", "uv_lock")


class ActionModule(ActionBase):  # type: ignore[misc] # ansible-core carries no types
    """Compute the release's id from the lock; transfer the lock when the host lacks that release."""

    # Files travel only when a build needs them: true here would cost a call for a folder every time.
    TRANSFERS_FILES = False
    _requires_connection = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask the host first; a host that has the release is done after this one call."""
        super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        state = arguments.get("state") or "present"
        paths = {name: str(arguments.pop(name, None) or "") for name in LOCKS}
        if state != "absent" and not arguments.get("release"):
            arguments["release"] = self._release_id(paths["lock"], str(arguments.get("python_version") or "3.11"))
        result = self._call(arguments, task_vars)
        if result.pop("lock_needed", False):
            result = self._build(arguments, paths, task_vars)
        return result

    def _call(self, arguments: dict[str, Any], task_vars: dict[str, Any] | None) -> dict[str, Any]:
        result = self._execute_module(module_name=MODULE, module_args=arguments, task_vars=task_vars)
        return dict(result)

    def _build(
        self, arguments: dict[str, Any], paths: dict[str, str], task_vars: dict[str, Any] | None
    ) -> dict[str, Any]:
        folder = self._make_tmp_path()
        try:
            remote = {}
            for name, path in paths.items():
                remote[name] = self._connection._shell.join_path(folder, f"{name}.txt")
                self._transfer_data(remote[name], self._read(path) if path else "")
            self._fixup_perms2([folder, *remote.values()])
            with watched(self, str((task_vars or {}).get("inventory_hostname", ""))):
                return self._call({**arguments, **remote}, task_vars)
        finally:
            self._remove_tmp_path(folder)

    def _read(self, path: str) -> str:
        try:
            found = self._loader.get_real_file(self._find_needle("files", path))
            return Path(found).read_text(encoding="utf-8")
        except (AnsibleError, OSError, UnicodeDecodeError) as error:
            raise AnsibleActionFail(f"lock {path!r} can't be read on the controller: {error}") from error

    def _release_id(self, path: str, python_version: str) -> str:
        """Check the lock before anything happens on the host; an empty path means Python alone."""
        text = self._read(path) if path else ""
        try:
            parse_lock(text)
        except LockError as error:
            raise AnsibleActionFail(
                f"lock {path!r} can't be installed: {error}. Make it again with `uv pip compile --generate-hashes`."
            ) from error
        made_for = lock_python(text)
        if made_for is not None and made_for != python_version:
            raise AnsibleActionFail(
                f"lock {path!r} was made for Python {made_for}, but python_version is {python_version!r}: "
                "choose that version, or make the lock again."
            )
        return release_id(text, python_version)
