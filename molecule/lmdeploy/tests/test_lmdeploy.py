"""What people notice of LMDeploy on a host: there by name, exactly its lock, one CUDA, and wrong wishes refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import figures
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
FILES = ROOT / "roles/lmdeploy/files"
LINK = "/opt/miniconda3/envs/lmdeploy"
VARIABLES: dict[str, Any] = yaml.safe_load((Path(__file__).parents[1] / "converge.yml").read_text())[0]["vars"]
INSTANCE = "/etc/api-server/releases/api-server/current/instance.json"


def locked(path: Path) -> dict[str, str]:
    """Return the versions that a lock pins."""
    return dict(re.findall(r"^([a-z0-9.-]+)==([^ ]+) ", path.read_text(), re.MULTILINE))


@pytest.fixture(scope="module")
def installed(host: Any) -> dict[str, str]:
    """Return the versions that the environment has, by its own pip."""
    listed = json.loads(host.check_output(f"{LINK}/bin/python -m pip list --format json --disable-pip-version-check"))
    return {re.sub(r"[-_.]+", "-", entry["name"]).lower(): entry["version"] for entry in listed}


def test_a_person_activates_it_by_name(host: Any) -> None:
    """As in the recipe: conda activate lmdeploy, then lmdeploy is on the path, with Python 3.11."""
    said = host.check_output(
        "bash -lc 'conda activate lmdeploy && command -v lmdeploy && python -V && lmdeploy --version'"
    )
    assert said.split("\n") == [f"{LINK}/bin/lmdeploy", said.split("\n")[1], "0.18.0"]
    assert "Python 3.11." in said


def test_the_environment_is_its_lock(installed: dict[str, str]) -> None:
    """Every version is the locked one, and nothing else is there but pip and its helpers."""
    lock = locked(FILES / "locks/lmdeploy-0.18.0.txt")
    assert {"lmdeploy", "timm", "partial-json-parser", "torch"} <= set(lock)
    assert {name: installed.get(name) for name in lock} == lock
    assert set(installed) - set(lock) <= {"pip", "setuptools", "wheel"}


def test_nothing_of_the_browser_side_is_in_it(host: Any, installed: dict[str, str]) -> None:
    """Open WebUI pins other versions of the same packages: it has an environment of its own."""
    assert "open-webui" not in installed
    host.run_expect([1], f"{LINK}/bin/python -c 'import open_webui'")
    host.run_expect([0], f"{LINK}/bin/python -m pip check")


def test_each_cuda_library_is_there_once(host: Any) -> None:
    """One NCCL, one cuBLAS, one CUDA runtime, and TurboMind misses only what comes with the driver."""
    for name in ("libnccl.so.2", "libcublas.so.*", "libcudart.so.*"):
        assert len(host.check_output(f"find {LINK}/ -name '{name}'").split()) == 1, name
    assert host.check_output(f"grep -l '/libnccl.so.2,' {LINK}/lib/python3.11/site-packages/*/RECORD | wc -l") == "1"
    missing = host.check_output(
        f"ldd {LINK}/lib/python3.11/site-packages/lmdeploy/turbomind/_turbomind*.so | grep 'not found'"
    )
    assert missing.split()[0] == "libcuda.so.1"
    assert len(missing.splitlines()) == 1


def test_what_triton_compiles_finds_its_headers(host: Any) -> None:
    """Triton compiles a module of C at the start of the PyTorch backend, with the host's compiler."""
    program = "#include <Python.h>"
    include = f"-I{LINK}/include/python3.11"
    host.run_expect([0], f"echo '{program}' | gcc -x c -fPIC -shared {include} -o /tmp/triton-probe.so -")
    host.run_expect([0], "rm /tmp/triton-probe.so")


def test_what_preflight_knows_is_what_is_installed(host: Any) -> None:
    """The list of options, templates and parsers in the role was taken from exactly this version."""
    kept = json.loads(host.check_output(f"cat {LINK}/lmdeploy.json"))
    assert kept["cli"] == json.loads((FILES / "cli/0.18.0.json").read_text())
    assert "internvl2_5" not in kept["cli"]["chat_templates"]
    assert kept["libraries"]["libnccl.so.2"].startswith("/opt/miniconda3/releases/lmdeploy/")


def test_the_unit_has_arguments_that_the_real_parser_takes(host: Any) -> None:
    """The unit is written and lies still; LMDeploy's own parser takes its arguments."""
    unit = host.file("/etc/systemd/system/api-server.service").content_string
    release = host.check_output(f"readlink -f {LINK}")
    assert f"ExecStart={release}/bin/python " in unit
    service = host.service("api-server")
    assert not service.is_running
    assert not service.is_enabled
    arguments = json.loads(host.check_output(f"cat {INSTANCE}"))["arguments"]
    text = " ".join(arguments)
    assert arguments[0] == "/srv/tiny-internvl"
    for part in ("--backend turbomind", "--server-port 23333", "--server-name 127.0.0.1", "--tp 1"):
        assert part in text
    assert "--chat-template" not in text
    assert "--session-len 16384 " in f"{text} "
    assert "--vision-max-batch-size 4" in text
    checked = host.run(f"{LINK}/bin/python /etc/api-server/releases/api-server/current/launcher.py --check {INSTANCE}")
    assert json.loads(checked.stdout) == {"errors": []}
    assert checked.rc == 0


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ("--nnodes 2 --node-rank 1 --dist-init-addr 10.0.0.1:23399", []),
        ("--backend pytorch --distributed-executor-backend ray", []),
        ("--nnodes 2 --node-rank one --dist-init-addr 10.0.0.1:23399", ["api_server_nodes"]),
    ],
)
def test_the_real_parser_judges_the_flags_of_several_hosts(host: Any, flags: str, refused: list[str]) -> None:
    """What api_server_nodes adds is taken; a slip is told by the variable's name."""
    instance = json.loads(host.check_output(f"cat {INSTANCE}"))
    instance["arguments"] += flags.split()
    host.run_expect([0], "printf '%%s' %s > /root/several.json", json.dumps(instance))
    program = "/etc/api-server/releases/api-server/current/launcher.py"
    checked = host.run(f"{LINK}/bin/python {program} --check /root/several.json")
    assert [error["variable"] for error in json.loads(checked.stdout)["errors"]] == refused


ATTACK = """
import importlib.util, json, sys
import PIL.Image
from lmdeploy.vl.media import connection
from lmdeploy.vl.media.image import ImageMediaIO

def tried(url):
    try:
        return f"opened {connection.load_from_url(url, ImageMediaIO()).size}"
    except Exception as error:
        return str(error)

PIL.Image.new("RGB", (28, 28)).save("/srv/picture.png")
urls = json.load(sys.stdin)
before = [tried(url) for url in urls]
spec = importlib.util.spec_from_file_location("launcher", sys.argv[1])
launcher = sys.modules["launcher"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launcher)
launcher.refuse_files()
print(json.dumps([before, [tried(url) for url in urls]]))
"""
DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
OWN_FILES = ["file:///srv/picture.png", "/srv/picture.png", "../picture.png"]
PLACES = [
    "http://127.0.0.1:22/",
    "http://localhost:23333/health",
    "http://10.213.0.1/",
    "http://169.254.169.254/latest/",
]


def test_a_request_makes_the_engine_open_no_file_and_ask_nobody_in_the_network(host: Any) -> None:
    """LMDeploy's own loader, as it is and as the unit runs it. The scenario trust probes the unit."""
    given = json.dumps([*OWN_FILES, *PLACES, f"data:image/png;base64,{DOT}"])
    launcher_file = str(Path(INSTANCE).with_name("launcher.py"))
    host.check_output("mkdir -p /srv/attack")
    said = host.check_output(
        "cd /srv/attack && printf %%s %s | %s/bin/python -c %s %s", given, LINK, ATTACK, launcher_file
    )
    before, after = json.loads(said.splitlines()[-1])
    # Facts about LMDeploy that this stands on: when they change, so must refuse_files.
    assert before[: len(OWN_FILES)] == ["opened (28, 28)"] * len(OWN_FILES)
    assert all("non-global IP" in text for text in before[len(OWN_FILES) : -1]), before
    assert all(text.startswith("The engine opens no file of its host") for text in after[: len(OWN_FILES)]), after
    assert all("non-global IP" in text for text in after[len(OWN_FILES) : -1]), after
    assert after[-1] == before[-1] == "opened (1, 1)"


DOORMAN = """
import http.client, importlib.util, json, os, pathlib, signal, sys, tempfile, threading, time
import fastapi, uvicorn
from lmdeploy.serve.utils.server_utils import AuthenticationMiddleware

PORT, OLD, NEW = 23555, "o" * 48, "n" * 48
folder = pathlib.Path(tempfile.mkdtemp())
source = folder / "source"
os.environ.update(RUNTIME_DIRECTORY=str(folder), MAINPID=str(os.getpid()))
spec = importlib.util.spec_from_file_location("launcher", sys.argv[1])
launcher = sys.modules["launcher"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launcher)
source.write_text(OLD)
keys = launcher.Keys(source)
launcher.let_keys_change(keys)
signal.signal(signal.SIGHUP, lambda *_: keys.renew(folder / "api-key"))
app = fastapi.FastAPI()
app.get("/v1/models")(lambda: {})
app.add_middleware(AuthenticationMiddleware, tokens=keys.valid)
answers = []

def ask(key):
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=5)
    try:
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()

def until(key, status):
    while ask(key) != status:
        time.sleep(0.01)

def client():
    # Every 50 ms with the key that a client has at that moment.
    until(OLD, 200)
    held = [OLD]
    def asking():
        while key := "".join(held):
            answers.append(ask(key))
            time.sleep(0.05)
    thread = threading.Thread(target=asking)
    thread.start()
    for number in range(3):
        time.sleep(0.5)
        source.write_text(f"{NEW}{number}" + chr(10) + held[0])
        launcher.hand_over(source)
        until(f"{NEW}{number}", 200)
        time.sleep(0.5)
        before, held[0] = held[0], f"{NEW}{number}"
        time.sleep(0.5)
        source.write_text(held[0])
        launcher.hand_over(source)
        until(before, 401)
    time.sleep(0.5)
    held.clear()
    thread.join()
    server.should_exit = True

server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=PORT, log_level="error"))
threading.Thread(target=client).start()
server.run()
print(json.dumps([len(answers), len([status for status in answers if status != 200])]))
"""


def test_nobody_is_refused_while_keys_change(host: Any) -> None:
    """LMDeploy's own check of keys and the launcher's reload: three changes, and a client that asks every 50 ms."""
    launcher_file = str(Path(INSTANCE).with_name("launcher.py"))
    said = host.check_output("%s/bin/python -c %s %s", LINK, DOORMAN, launcher_file)
    asked, refused = json.loads(said.splitlines()[-1])
    print(f"three changes of the key: {refused} of {asked} requests refused")
    figures.note("rotation_lmdeploy", changes=3, requests=asked, refused=refused)
    assert asked > 60
    assert refused == 0


def test_the_seeds_template_and_unknown_wishes_are_refused_together(host: Any, play: Callable[..., Any]) -> None:
    """One message names each variable and lists what this version knows; unit and file stay as they were."""
    before = host.check_output(f"sha256sum {INSTANCE} /etc/systemd/system/api-server.service")
    wishes = {
        **VARIABLES,
        "api_server_chat_template": "internvl2_5",
        "api_server_tool_call_parser": "qwen9",
        "api_server_extra_args": ["--cache-max-entry-cont", "0.5"],
    }
    message = play("api_server", **wishes).message()
    facts = json.loads((FILES / "cli/0.18.0.json").read_text())
    for part in (
        "api_server_chat_template is 'internvl2_5'",
        ", ".join(facts["chat_templates"]),
        "api_server_tool_call_parser is 'qwen9'",
        ", ".join(facts["tool_call_parsers"]),
        "--cache-max-entry-cont",
        "--cache-max-entry-count",
    ):
        assert part in message
    assert host.check_output(f"sha256sum {INSTANCE} /etc/systemd/system/api-server.service") == before


def test_a_version_with_known_holes_is_refused(host: Any, play: Callable[..., Any]) -> None:
    """The message says why and what to set."""
    message = play("lmdeploy", lmdeploy_version="0.17.2").message()
    assert "lmdeploy_version is 0.17.2" in message
    assert "CVE-2026-76850" in message
    assert "0.18.0 or later" in message
    assert len(host.file("/opt/miniconda3/releases/lmdeploy").listdir()) == 1


def test_a_lock_that_does_not_match_is_refused(host: Any, play: Callable[..., Any]) -> None:
    """Neither another version's lock nor a missing one changes anything."""
    lock = str(FILES / "locks/lmdeploy-0.18.0.txt")
    message = play("lmdeploy", lmdeploy_version="0.18.1", lmdeploy_lock=lock).message()
    assert "lmdeploy_version is 0.18.1" in message
    assert "installs lmdeploy 0.18.0" in message
    message = play("lmdeploy", lmdeploy_version="0.18.1").message()
    assert "there is no lock" in message
    assert "lmdeploy-0.18.1.txt" in message
    assert len(host.file("/opt/miniconda3/releases/lmdeploy").listdir()) == 1


def test_a_release_with_two_nccls_is_not_used(host: Any, play: Callable[..., Any]) -> None:
    """The proof fails, says what it found, and passes again when the second copy is gone."""
    host.run_expect([0], f"rm {LINK}/lmdeploy.json && touch {LINK}/lib/libnccl.so.2")
    message = play("lmdeploy").message()
    assert "is not used" in message
    assert "libnccl.so.2 must be there once" in message
    assert "lmdeploy_lock" in message
    host.run_expect([0], f"rm {LINK}/lib/libnccl.so.2")
    assert play("lmdeploy").changed() == 1
    assert play("lmdeploy", check=True).changed() == 0


def test_uninstall_removes_it(host: Any, play: Callable[..., Any]) -> None:
    """The environment goes with its releases; conda stays."""
    assert play("lmdeploy", "uninstall").changed() == 1
    assert not host.file(LINK).exists
    assert not host.file("/opt/miniconda3/releases/lmdeploy").exists
    host.run_expect([0], "/opt/miniconda3/bin/conda --version")
