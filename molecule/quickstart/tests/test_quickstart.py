"""A newcomer on a bare machine does what docs/en/quickstart.md says, word for word, and reaches an answer.

The commands and the inventory come out of the page itself, so page and test can't part. docs/zh has the same ones: a
static test compares them. What the machine lacks and no page can give is made first: an account with sudo, a place to
clone from, and what this network needs (a CA, where conda comes from).
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from webui import tunnel

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/en/quickstart.md"
HOST = "mol-quickstart"
SSH = ["ssh", "-F", str(ROOT / ".lab/ssh/config")]
BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
PERSON = "newcomer"
PASSWORD = secrets.token_hex(8)
INVENTORY = "inventories/single-gpu"


def section(title: str) -> str:
    """Return the text below a heading of the page."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def blocks(title: str, kind: str) -> list[str]:
    """Return the code blocks of one kind below a heading, without the list's indent."""
    found = BLOCK.findall(section(title))
    return [re.sub(r"^ {3}", "", text, flags=re.MULTILINE) for name, text in found if name == kind]


def commands(title: str) -> list[str]:
    """Return the command lines below a heading, in order."""
    return [line.strip() for text in blocks(title, "bash") for line in text.splitlines() if line.strip()]


class Terminal:
    """The newcomer's terminal: a login shell on the machine, and a person who types the password when asked."""

    def __init__(self) -> None:
        """Sign in."""
        self.process = subprocess.Popen(
            [*SSH, "-tt", "-o", "ControlPath=none", HOST, f"exec su - {PERSON}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.run("stty -echo; PS1=; bind 'set enable-bracketed-paste off'")

    def run(self, command: str) -> str:
        """Return what a command printed; it must end well."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        # The mark is put together by the shell, so that its echo is none.
        self.process.stdin.write(f"{{ {command}\n}}; printf '\\n%s=%s=\\n' 'end''ed' $?\n".encode())
        self.process.stdin.flush()
        text, answered = "", 0
        while not (ended := re.search(r"\nended=(\d+)=", text)):
            piece = os.read(self.process.stdout.fileno(), 65536).decode(errors="replace")
            assert piece, f"{command}: the terminal closed\n{text}"
            text += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", piece)
            asked = len(re.findall(r"(?:BECOME password|\[sudo\] password for \w+): ", text))
            if asked > answered:
                answered = asked
                self.process.stdin.write(f"{PASSWORD}\n".encode())
                self.process.stdin.flush()
        assert ended[1] == "0", f"{command}\n{text}"
        print(f"$ {command}\n{text}")
        return text[: ended.start()]

    def close(self) -> None:
        """Sign out."""
        self.process.kill()
        self.process.wait()


def send(source: Path, target: str) -> None:
    """Put what a folder holds below a folder of the machine, owned by the newcomer."""
    packed = subprocess.run(["tar", "-czC", str(source), "."], capture_output=True, check=True).stdout
    unpack = f"mkdir -p {target} && tar -xzC {target} --no-same-owner && chown -R {PERSON}: {target}"
    subprocess.run([*SSH, HOST, unpack], input=packed, check=True)


def published(tmp: Path) -> Path:
    """Return a bare repository of what stands in this checkout, as a person clones it."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True).stdout
    tree, bare = tmp / "tree", tmp / "lmdeploy.git"
    tree.mkdir()
    subprocess.run(["tar", "-cf", f"{tmp}/tree.tar", "--null", "-T", "-"], cwd=ROOT, input=listed, check=True)
    subprocess.run(["tar", "-xf", f"{tmp}/tree.tar"], cwd=tree, check=True)
    author = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for words in (["init", "--quiet"], ["add", "--all"], [*author, "commit", "--quiet", "-m", "all"]):
        subprocess.run(["git", *words], cwd=tree, check=True)
    subprocess.run(["git", "clone", "--quiet", "--bare", str(tree), str(bare)], check=True)
    return bare


def network(folder: Path) -> Path:
    """Return a folder with the group variables that a person behind this machine's network writes, and their CA."""
    values = yaml.safe_load((ROOT / "molecule/inventory/group_vars/all/machine.yml").read_text(encoding="utf-8"))
    del values["ansible_ssh_common_args"]
    # Packages fetched for one scenario are there for the next.
    values["conda_env_cache_dir"] = "/var/cache/selfhost/uv"
    folder.mkdir()
    if "mirrors_ca_file" in values:
        (folder / "ca.crt").write_bytes(Path(values["mirrors_ca_file"]).read_bytes())
        values["mirrors_ca_file"] = f"/home/{PERSON}/network/ca.crt"
    (folder / "network.yml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    """Return a newcomer's terminal on a machine where nothing was done yet."""
    tmp = tmp_path_factory.mktemp("newcomer")
    person = f"useradd --create-home --shell /bin/bash --groups sudo {PERSON} && echo {PERSON}:{PASSWORD} | chpasswd"
    subprocess.run([*SSH, HOST, person], check=True)
    send(network(tmp / "network"), f"/home/{PERSON}/network")
    send(published(tmp), "/srv/lmdeploy.git")
    # As the person who runs this network does on every machine.
    ca = f"/home/{PERSON}/network/ca.crt"
    trust = f"test ! -e {ca} || {{ cp {ca} /usr/local/share/ca-certificates/ && update-ca-certificates; }}"
    subprocess.run([*SSH, HOST, trust], check=True, capture_output=True)
    terminal = Terminal()
    yield terminal
    terminal.close()


def edited(terminal: Terminal, tmp: Path) -> None:
    """Do the third step: the page's own inventory for a CPU, and what this network needs beside it."""
    hosts = yaml.safe_load((ROOT / INVENTORY / "hosts.yml").read_text(encoding="utf-8"))
    (wish,) = blocks("One GPU box", "yaml")
    hosts.update(yaml.safe_load(wish))
    hosts["web_uis"]["vars"]["open_webui_profile"] = "slim"
    (tmp / "hosts.yml").write_text(yaml.safe_dump(hosts, sort_keys=False), encoding="utf-8")
    send(tmp, f"/home/{PERSON}/lmdeploy/{INVENTORY}")
    terminal.run(f"mkdir -p {INVENTORY}/group_vars/all && cp ~/network/network.yml {INVENTORY}/group_vars/all/")


def test_the_page_leads_to_an_answer(terminal: Terminal, tmp_path: Path) -> None:
    steps = commands("One GPU box")
    assert [step.split()[0] for step in steps][:3] == ["sudo", "git", "script/setup"]
    said = {}
    for step in steps:
        if step.startswith("ansible-playbook playbooks/preflight.yml"):
            edited(terminal, tmp_path)
        said[step] = terminal.run(step.replace("ADDRESS", "/srv/lmdeploy.git"))
    smoke = next(text for step, text in said.items() if "smoke.yml" in step)
    assert re.search(r"SmolLM2-135M-Instruct at http://127\.0\.0\.1:\d+, [\d.]+ s: .*Paris", smoke), smoke
    assert re.search(r"through Open WebUI, [\d.]+ s: .*Paris", smoke), smoke
    # The last step is a person's: open the page, sign in.
    word = next(text for step, text in said.items() if "admin-password" in step).split()[-1]
    site = next(text for step, text in said.items() if "site.yml" in step)
    assert "/etc/open-webui/admin-password" in site, "the end of site.yml says where the password lies"
    with tunnel(HOST) as ui:
        models = [model["id"] for model in ui.signed_in("admin@localhost", word).call("/api/models")["data"]]
    assert models == ["SmolLM2-135M-Instruct"]


def test_the_verbs_of_the_page_work(terminal: Terminal) -> None:
    for row in re.findall(r"^\| `(playbooks/(?:preflight|smoke|status)\.yml)` ", section("Verbs"), re.MULTILINE):
        terminal.run(f"ansible-playbook {row} -i {INVENTORY} -K")


def test_the_installed_collection_finds_the_same_host(terminal: Terminal, host: Any) -> None:
    for step in commands("Verbs"):
        said = terminal.run(step.replace("INVENTORY", f"~/lmdeploy/{INVENTORY}"))
    assert re.search(r"^localhost .* changed=0 .* failed=0", said, re.MULTILINE), said
    assert host.file(f"/home/{PERSON}/.ansible/collections/ansible_collections/selfhost/lmdeploy/MANIFEST.json").exists
