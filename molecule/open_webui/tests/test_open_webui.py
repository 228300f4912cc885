"""Open WebUI as people and other accounts on the host find it, after its variables were changed once."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError

import pytest
import yaml
from hardening import exposure
from webui import Ui, tunnel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testinfra.host import Host

ROOT = Path(__file__).parents[3]
SCENARIO = Path(__file__).parents[1]
NAME = "mol-open-webui"
SSH = ["ssh", "-F", str(ROOT / ".lab/ssh/config")]
MODEL = "SmolLM2-135M-Instruct"
ADMIN = "boss@localhost"
UNIT = "open-webui.service"


@pytest.fixture(scope="module")
def ui() -> Iterator[Ui]:
    """Return Open WebUI as a stranger finds it."""
    with tunnel(NAME) as stranger:
        yield stranger


@pytest.fixture(scope="module")
def password(host: Host) -> str:
    """Return the admin's password as the operator finds it."""
    return str(host.file("/etc/open-webui/admin-password").content_string).strip()


@pytest.fixture(scope="module")
def admin(ui: Ui, password: str) -> Ui:
    """Return Open WebUI as its admin sees it."""
    return ui.signed_in(ADMIN, password)


@pytest.fixture(scope="module")
def person(ui: Ui, admin: Ui) -> Ui:
    """Return Open WebUI as an ordinary user sees it whom the admin has just let in."""
    email, word = f"{secrets.token_hex(4)}@localhost", secrets.token_urlsafe(18)
    admin.call("/api/v1/auths/add", {"name": "Person", "email": email, "password": word, "role": "user"})
    return ui.signed_in(email, word)


@pytest.fixture(scope="module")
def environment(host: Host) -> dict[str, str]:
    """Return the environment of the running process."""
    pid = host.check_output(f"systemctl show {UNIT} --property=MainPID --value")
    entries = host.check_output(f"base64 -w0 /proc/{pid}/environ")
    decoded = subprocess.run(["base64", "-d"], input=entries, capture_output=True, text=True, check=True).stdout
    return dict(entry.split("=", 1) for entry in decoded.split("\0") if "=" in entry)


def as_nobody(host: Host, command: str, data: str = "") -> str:
    """Return what an account without any rights gets from a command."""
    done = subprocess.run(
        [*SSH, NAME, f"setpriv --reuid=65534 --regid=65534 --clear-groups sh -c '{command}'"],
        input=data,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout


def test_the_wanted_version_answers(ui: Ui) -> None:
    assert ui.call("/ready") == {"status": True}
    assert ui.call("/api/version")["version"] == "0.12.4"


def test_it_listens_on_the_loopback_address_alone(host: Host) -> None:
    assert host.socket("tcp://127.0.0.1:8080").is_listening
    assert not host.socket("tcp://0.0.0.0:8080").is_listening


def test_the_admin_signs_in_with_what_the_variables_say_now(admin: Ui, password: str) -> None:
    assert password == "twelve chars or more"
    account = admin.call("/api/v1/auths/")
    assert (account["email"], account["name"], account["role"]) == (ADMIN, "Boss", "admin")


def test_sign_up_is_closed(ui: Ui) -> None:
    stranger = {"name": "Stranger", "email": "stranger@localhost", "password": "a-long-password"}
    with pytest.raises(HTTPError, match="HTTP Error 403"):
        ui.call("/api/v1/auths/signup", stranger)


def test_the_admins_old_address_is_gone(ui: Ui, password: str) -> None:
    with pytest.raises(HTTPError, match="HTTP Error 400"):
        ui.signed_in("admin@localhost", password)


def test_an_ordinary_user_sees_the_models_of_both_connections(person: Ui) -> None:
    assert sorted(model["id"] for model in person.call("/api/models")["data"]) == [MODEL, "recorder"]


def test_an_ordinary_user_gets_the_models_own_answer(person: Ui) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
        "stream": False,
        "temperature": 0,
        "max_tokens": 64,
    }
    answer = person.call("/api/chat/completions", body)
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_a_chat_as_browsers_send_it_carries_no_tools(person: Ui, host: Host) -> None:
    question = [{"role": "user", "content": f"Say {secrets.token_hex(4)}"}]
    # The session is what makes Open WebUI add its built-in tools.
    body = {"model": "recorder", "messages": question, "stream": False, "session_id": secrets.token_hex(8)}
    answer = person.call("/api/chat/completions", body)
    assert answer["choices"][0]["message"]["content"] == "This was recorded."
    lines = [json.loads(line) for line in host.file("/run/openai_recorder.jsonl").content_string.splitlines()]
    (sent,) = [line for line in lines if line["body"] and line["body"]["messages"][-1] == question[0]]
    assert sent["path"] == "/v1/chat/completions"
    assert sent["key"] == "Bearer sk-key-of-the-recorder"
    assert "tools" not in sent["body"]


def test_what_an_admin_changes_by_hand_does_not_outlive_a_restart(admin: Ui, host: Host) -> None:
    before = admin.call("/openai/config")
    admin.call("/openai/config/update", {**before, "OPENAI_API_BASE_URLS": ["http://127.0.0.1:1/v1"]})
    host.check_output(f"systemctl restart {UNIT}")
    assert admin.call("/openai/config")["OPENAI_API_BASE_URLS"] == before["OPENAI_API_BASE_URLS"]
    assert before["OPENAI_API_BASE_URLS"][1] == "http://127.0.0.1:9999/v1"


def test_a_restart_returns_when_it_answers_and_sessions_survive_it(ui: Ui, person: Ui, host: Host) -> None:
    command = (
        f"systemctl restart {UNIT} && python3 -c 'import urllib.request as u; "
        'print(u.urlopen("http://127.0.0.1:8080/ready").status)\''
    )
    assert host.check_output(command) == "200"
    assert person.call("/api/v1/auths/")["role"] == "user"


def test_a_run_that_waits_for_it_says_how_far_it_is(host: Host, tmp_path: Path) -> None:
    """In the callback's line: what is done, for how long, and how long it took the last time."""
    host.check_output("touch /etc/open-webui/open-webui.env")
    unit = {"name": UNIT, "files": ["/etc/open-webui/open-webui.env"]}
    tasks = [{"name": "Run", "selfhost.lmdeploy.unit_current": unit}]
    playbook = tmp_path / "restart.yml"
    playbook.write_text(json.dumps([{"hosts": NAME, "gather_facts": False, "tasks": tasks}]))
    inventory = str(ROOT / "molecule/inventory/hosts.yml")
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ansible-playbook")), "-i", inventory, str(playbook)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "SELFHOST_PROGRESS_SECONDS": "2"},
    )
    line = rf"^\.\.\. Run: \d+ s, waiting for {NAME} \(restart for \d+ s of \d+ s last time, .*\)$"
    assert re.search(line, done.stdout, re.MULTILINE), done.stdout
    assert not host.file("/run/selfhost-progress").exists


def test_a_start_that_fails_says_so(host: Host) -> None:
    override = "/run/systemd/system/open-webui.service.d/fail.conf"
    host.check_output(f"mkdir -p $(dirname {override})")
    host.check_output(
        f"printf '[Service]\\nEnvironment=PYTHONPATH=/none\\nExecStart=\\nExecStart=/bin/false\\n' > {override}"
    )
    try:
        host.check_output("systemctl daemon-reload")
        assert host.run(f"systemctl restart {UNIT}").rc != 0
    finally:
        host.check_output(f"rm {override} && systemctl daemon-reload && systemctl restart {UNIT}")
    assert host.service(UNIT).is_running


def test_any_value_arrives_in_the_process_as_it_was_given(environment: dict[str, str]) -> None:
    settings = yaml.safe_load((SCENARIO / "vars.yml").read_text(encoding="utf-8"))["open_webui_settings"]
    assert environment["SELFHOST_TEST_TEXT"] == settings["SELFHOST_TEST_TEXT"]
    assert json.loads(environment["SELFHOST_TEST_JSON"]) == settings["SELFHOST_TEST_JSON"]
    assert environment["SELFHOST_TEST_EMPTY"] == ""


def test_no_secret_is_where_another_account_finds_it(host: Host, password: str, environment: dict[str, str]) -> None:
    found = [password, environment["WEBUI_SECRET_KEY"], *environment["OPENAI_API_KEYS"].split(";")]
    assert len(found) == 4
    assert min(len(secret.encode()) for secret in found[1:2]) >= 32
    shown = as_nobody(host, "ps axeww; systemctl show open-webui.service; cat /etc/systemd/system/open-webui.service")
    assert "open-webui serve" in shown
    journal = host.check_output("journalctl --no-pager --output=cat")
    assert "Open WebUI" in journal
    for secret in found:
        assert secret not in shown
        assert secret not in journal
    # Patterns go through standard input, so that the search itself shows them to nobody.
    readable = as_nobody(
        host, "grep -rIlsF -f - /etc /home /run /srv /tmp /usr/local /var/lib /var/log /var/tmp", "\n".join(found)
    )
    assert readable == ""


def test_secrets_are_root_only_files(host: Host) -> None:
    assert host.file("/etc/open-webui").mode == 0o700
    for name in ("open-webui.env", "secret-key", "admin-password", "admin.json"):
        file = host.file(f"/etc/open-webui/{name}")
        assert (file.user, file.group, file.mode) == ("root", "root", 0o600)


def test_the_unit_can_do_little(host: Host) -> None:
    assert exposure(host, UNIT) <= 1.1
    pid = host.check_output(f"systemctl show {UNIT} --property=MainPID --value")
    status = dict(re.findall(r"^(\w+):\s*(\S+)", host.file(f"/proc/{pid}/status").content_string, re.MULTILINE))
    assert (status["NoNewPrivs"], status["Seccomp"], int(status["CapEff"], 16), int(status["CapBnd"], 16)) == (
        "1",
        "2",
        0,
        0,
    )
    assert host.process.get(pid=int(pid)).user == "open-webui"


def test_data_are_outside_the_environment_and_for_its_user_alone(host: Host) -> None:
    for name in ("data/webui.db", "static/favicon.png"):
        assert host.file(f"/var/lib/open-webui/{name}").exists
    assert host.file("/var/lib/open-webui").mode == 0o700
    assert host.check_output("find /opt/miniconda3 -user open-webui") == ""
    assert host.check_output("find / -xdev -name .webui_secret_key") == ""


def test_it_starts_at_boot(host: Host) -> None:
    assert host.service(UNIT).is_enabled


def test_the_slim_lock_holds_what_upstream_lists(host: Host) -> None:
    pattern = "/opt/miniconda3/envs/open-webui/lib/python3.11/site-packages/requirements-slim.txt"
    upstream = {
        line.split("#")[0].strip()
        for line in host.file(pattern).content_string.splitlines()
        if line.split("#")[0].strip()
    }
    source = (ROOT / "roles/open_webui/files/locks/open-webui-0.12.4-slim.in").read_text(encoding="utf-8")
    ours = {line.strip() for line in source.splitlines() if line.strip() and not line.startswith("#")}
    assert ours - upstream == {"open-webui==0.12.4"}
    assert upstream <= ours
