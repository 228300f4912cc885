"""The controller's half of conda_environment: a lock is judged before the host is asked, and sent only on request."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.errors import AnsibleActionFail
from ansible_collections.selfhost.lmdeploy.plugins.action.conda_environment import ActionModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.conda_releases import release_id

LOCK = f"# python: 3.11\nsix==1.17.0 --hash=sha256:{'0' * 64}\n"


class Action(ActionModule):
    """The action over a host that is a list of calls."""

    def __init__(self, arguments: dict[str, Any], *, has_release: bool) -> None:
        """Take the task's arguments."""
        self._task = SimpleNamespace(
            action="conda_environment", _uuid="1", args=arguments, async_val=0, check_mode=False
        )
        self._loader = SimpleNamespace(get_real_file=lambda path: path)
        self._connection = SimpleNamespace(_shell=SimpleNamespace(join_path=lambda *parts: "/".join(parts)))
        self.has_release = has_release
        self.calls: list[dict[str, Any]] = []
        self.sent: dict[str, str] = {}
        self.removed: list[str] = []

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Skip what Ansible's own class does before."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ansible.plugins.action.ActionBase.run", lambda *_: {})
            return super().run(tmp, task_vars or {})

    def _find_needle(self, _folder: str, name: str) -> str:
        return name

    def _execute_module(self, **call: Any) -> dict[str, Any]:
        self.calls.append(call["module_args"])
        is_answer = self.has_release or "lock" in call["module_args"]
        return {"changed": False, "prefix": "/opt"} if is_answer else {"changed": False, "lock_needed": True}

    def _make_tmp_path(self, *_: Any) -> str:
        return "/remote"

    def _transfer_data(self, path: str, data: str) -> None:
        self.sent[path] = data

    def _fixup_perms2(self, *_: Any) -> None:
        pass

    def _remove_tmp_path(self, path: str, *_: Any, **__: Any) -> None:
        self.removed.append(path)


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """Return a good lock."""
    path = tmp_path / "app.txt"
    path.write_text(LOCK, encoding="utf-8")
    return path


def test_a_host_that_has_the_release_gets_one_call_and_no_file(lock: Path) -> None:
    action = Action({"name": "app", "lock": str(lock)}, has_release=True)
    assert action.run() == {"changed": False, "prefix": "/opt"}
    assert action.calls == [{"name": "app", "release": release_id(LOCK, "3.11")}]
    assert action.sent == {}


def test_a_host_that_must_build_gets_the_locks(lock: Path) -> None:
    action = Action({"name": "app", "lock": str(lock), "uv_lock": str(lock)}, has_release=False)
    assert action.run() == {"changed": False, "prefix": "/opt"}
    assert len(action.calls) == 2
    assert action.calls[1] == {**action.calls[0], "lock": "/remote/lock.txt", "uv_lock": "/remote/uv_lock.txt"}
    assert action.sent == {"/remote/lock.txt": LOCK, "/remote/uv_lock.txt": LOCK}
    assert action.removed == ["/remote"]


def test_python_alone_is_an_empty_lock() -> None:
    action = Action({"name": "app"}, has_release=False)
    action.run()
    assert action.calls[0]["release"] == release_id("", "3.11")
    assert action.sent["/remote/lock.txt"] == ""


def test_a_release_that_is_named_needs_no_lock() -> None:
    action = Action({"name": "app", "state": "switched", "release": "0" * 12}, has_release=True)
    action.run()
    assert action.calls == [{"name": "app", "state": "switched", "release": "0" * 12}]
    removal = Action({"name": "app", "state": "absent"}, has_release=True)
    removal.run()
    assert removal.calls == [{"name": "app", "state": "absent"}]


@pytest.mark.parametrize(
    ("text", "changes", "words"),
    [
        ("six>=1.0\n", {}, "line 1: six>=1.0 is not pinned"),
        (LOCK, {"python_version": "3.12"}, "was made for Python 3.11, but python_version is '3.12'"),
        (None, {}, "can't be read on the controller"),
    ],
)
def test_a_bad_lock_ends_before_the_host_is_asked(lock: Path, text: str | None, changes: Any, words: str) -> None:
    lock.unlink() if text is None else lock.write_text(text, encoding="utf-8")
    action = Action({"name": "app", "lock": str(lock), **changes}, has_release=True)
    with pytest.raises(AnsibleActionFail) as caught:
        action.run()
    assert words in str(caught.value)
    assert str(lock) in str(caught.value)
    assert action.calls == []
