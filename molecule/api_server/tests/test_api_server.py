"""What a user of the engine notices, and what nobody may notice: the key."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hardening import exposure

VARIABLES = yaml.safe_load((Path(__file__).parents[1] / "vars.yml").read_text())
MODEL = VARIABLES["api_server_model_name"]
KEY_FILE = "/etc/api-server/api-key"
MOST_SECONDS_TO_RECOVER = 60

# Runs on the host: asks the engine and prints status and text. Arguments: port, question, tokens, whether to send the
# key. With a question to stream, each line is printed as it comes.
CLIENT = r"""
import json, sys, urllib.error, urllib.request
port, question, tokens, keyed, stream = json.loads(sys.argv[1])
key = open("/etc/api-server/api-key").read().strip() if keyed else "wrong"
body = {"model": "MODEL", "messages": [{"role": "user", "content": question}], "max_tokens": tokens, "temperature": 0,
        "stream": stream, "ignore_eos": stream}
request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(),
                                 {"Authorization": "Bearer " + key, "Content-Type": "application/json"})
try:
    with urllib.request.urlopen(request, timeout=120) as answer:
        if stream:
            for line in answer:
                if line.strip():
                    print(line.decode().strip(), flush=True)
        else:
            print(answer.status, json.load(answer)["choices"][0]["message"]["content"])
except urllib.error.HTTPError as error:
    print(error.code)
except (OSError, urllib.error.URLError) as error:
    print("refused" if "refused" in str(error) else error)
""".replace("MODEL", MODEL)

# Runs on the host: looks for the key where people other than root, or root without asking for it, could meet it.
SEARCH = r"""
import json, os, pathlib, stat, subprocess, sys
key = pathlib.Path("/etc/api-server/api-key").read_text().strip().encode()
searched, places = 0, []

def look(place, content):
    global searched
    searched += 1
    if key in content:
        places.append(place)

for name in [*pathlib.Path("/proc").glob("[0-9]*/cmdline"), pathlib.Path("/proc", sys.argv[1], "environ")]:
    look(str(name), name.read_bytes())
for command in ("systemctl show api-server.service", "systemctl cat api-server.service", "journalctl"):
    look(command, subprocess.run(command.split(), capture_output=True, check=True).stdout)
for top in ("/etc", "/home", "/root", "/run", "/tmp", "/usr/local", "/var/lib", "/var/log", "/var/tmp"):
    for folder, _, names in os.walk(top):
        for name in names:
            path = pathlib.Path(folder, name)
            about = path.lstat()
            if stat.S_ISREG(about.st_mode) and about.st_mode & stat.S_IROTH and about.st_size < 10_000_000:
                look(str(path), path.read_bytes())
print(json.dumps({"searched": searched, "places": places}))
"""


def client(port: int, question: str, tokens: int = 24, *, keyed: bool = True, stream: bool = False) -> str:
    """Return the command that asks on the host."""
    given = json.dumps([port, question, tokens, keyed, stream])
    return f"python3 -c {shlex.quote(CLIENT)} {shlex.quote(given)}"


def ask(host: Any, port: int = 23333, *, keyed: bool = True) -> str:
    """Return what the engine says to a question with one answer."""
    question = "What is the capital of France? Answer in one sentence."
    return str(host.run(client(port, question, keyed=keyed)).stdout).strip()


def main_pid(host: Any, unit: str = "api-server") -> str:
    """Return the process that systemd watches."""
    return str(host.check_output(f"systemctl show --property MainPID --value {unit}.service"))


def converge(play: Callable[..., Any], **changes: object) -> Any:
    """Run the role with the scenario's variables and some changed ones."""
    return play("api_server", **{**VARIABLES, **changes})


def test_the_unit_runs_and_starts_at_boot_as_its_own_user(host: Any) -> None:
    service = host.service("api-server.service")
    assert service.is_running
    assert service.is_enabled
    assert host.check_output(f"ps -o user:32= -p {main_pid(host)}") == "api-server"
    status = host.check_output("systemctl show --property StatusText --value api-server.service")
    assert status.startswith(f"Serving {MODEL}")


def test_the_model_answers_those_who_have_the_key(host: Any) -> None:
    assert re.match(r"200 .*Paris", ask(host))
    assert ask(host, keyed=False) == "401"


def test_only_this_host_reaches_it(host: Any) -> None:
    listening = host.check_output("ss --listening --tcp --numeric --no-header")
    assert re.findall(r"\S+:23333\b", listening) == ["127.0.0.1:23333"]


def test_the_key_shows_nowhere(host: Any) -> None:
    file = host.file(KEY_FILE)
    assert (file.mode, file.user, file.size > 32) == (0o600, "root", True)
    assert host.file("/etc/api-server").mode == 0o711, "the engine may pass to its launcher, and look at nothing"
    found = json.loads(host.check_output(f"python3 -c {shlex.quote(SEARCH)} {main_pid(host)}"))
    assert found["searched"] > 1000
    assert found["places"] == []


def test_the_unit_is_as_closed_as_promised(host: Any) -> None:
    assert exposure(host, "api-server.service") <= 1.3


def test_a_restart_returns_when_the_model_answers(host: Any) -> None:
    before = main_pid(host)
    began = time.monotonic()
    host.check_output("systemctl restart api-server.service")
    print(f"restarted and ready after {time.monotonic() - began:.1f} s")
    assert re.match(r"200 .*Paris", ask(host))
    assert main_pid(host) != before


def test_a_hung_engine_is_restarted(host: Any) -> None:
    before = main_pid(host)
    began = time.monotonic()
    host.check_output(f"kill -STOP {before}")
    while main_pid(host) in (before, "0") or not ask(host).startswith("200 "):
        assert time.monotonic() - began < MOST_SECONDS_TO_RECOVER
        time.sleep(0.5)
    print(f"answers again {time.monotonic() - began:.1f} s after it hung")
    assert "Paris" in ask(host)
    assert "Watchdog timeout" in host.check_output("journalctl --unit api-server.service --lines 60 --output cat")


def test_open_streams_end_and_newcomers_are_refused_when_it_stops(host: Any) -> None:
    command = client(23333, "Tell me a long story.", 500, stream=True)
    host.check_output(f"nohup {command} >/root/stream.txt 2>&1 & sleep 1")
    began = time.monotonic()
    while "data:" not in host.file("/root/stream.txt").content_string:
        assert time.monotonic() - began < 30
    host.check_output("systemctl stop --no-block api-server.service; sleep 0.5")
    newcomer = ask(host)
    state = host.check_output("systemctl show --property ActiveState --value api-server.service")
    stream = host.file("/root/stream.txt").content_string
    host.run("systemctl stop api-server.service")
    ended = host.file("/root/stream.txt").content_string
    result = host.check_output("systemctl show --property Result --value api-server.service")
    host.check_output("rm /root/stream.txt; systemctl start api-server.service")
    assert "[DONE]" not in stream, "the stream was over before the stop: ask for more tokens"
    assert state == "deactivating"
    assert newcomer == "refused"
    assert ended.strip().endswith("data: [DONE]")
    assert result == "success"


def test_what_the_engine_does_not_know_is_refused_before_anything_changes(host: Any, play: Callable[..., Any]) -> None:
    before = main_pid(host)
    message = converge(play, api_server_extra_args=["n_paralell=2", "n_batch=many"]).message()
    assert "api_server_extra_args is 'n_paralell=2'" in message
    assert "known: n_parallel" in message
    assert "n_batch=many" in message
    assert main_pid(host) == before
    message = converge(play, api_server_port=70000, api_server_host="10.0.0.9", api_server_api_key="").message()
    assert "api_server_port is 70000" in message
    assert "api_server_allowed_networks is empty" in message
    assert ask(host).startswith("200 ")


def test_an_engine_that_does_not_start_tells_why(host: Any, play: Callable[..., Any]) -> None:
    message = converge(play, api_server_model="/var/lib/models/none.gguf").message()
    assert "no model is at /var/lib/models/none.gguf" in message
    restarts = host.check_output("systemctl show --property NRestarts --value api-server.service")
    assert restarts == "0", "what a restart can't mend is not tried again"


def test_named_instances_come_and_go(host: Any, play: Callable[..., Any]) -> None:
    first = {"name": "a", "port": 23401, "model_name": MODEL}
    second = {"name": "b", "port": 23402, "model_name": MODEL}
    key = "0123456789abcdef" * 3
    assert converge(play, api_server_instances=[first, second], api_server_api_key=key).changed() > 0
    assert [ask(host, port)[:4] for port in (23401, 23402, 23333)] == ["200 ", "200 ", "refu"]
    assert host.file(KEY_FILE).content_string.strip() == key
    assert not host.file("/etc/systemd/system/api-server.service").exists
    assert not host.file("/etc/api-server/api-server.json").exists
    before = main_pid(host, "api-server-b")
    assert converge(play, api_server_instances=[second]).changed() > 0
    assert main_pid(host, "api-server-b") == before, "the other instance is not touched"
    assert [ask(host, port)[:4] for port in (23401, 23402)] == ["refu", "200 "]
    assert not host.file("/etc/systemd/system/api-server-a.service").exists


def test_uninstalling_leaves_nothing_but_models(host: Any, play: Callable[..., Any]) -> None:
    assert play("api_server", "uninstall").changed() > 0
    left = host.check_output(
        "ls -d /etc/api-server /usr/local/lib/api-server /var/lib/api-server /var/cache/api-server "
        "/etc/systemd/system/api-server* 2>/dev/null || true"
    )
    assert left == ""
    assert not host.user("api-server").exists
    assert host.file("/var/lib/models/SmolLM2-135M-Instruct.Q4_1.gguf").exists
    assert play("api_server", "uninstall").changed() == 0
