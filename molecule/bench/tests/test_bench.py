"""bench.yml against an engine that sees, and through its gateway: figures, the change since the last run, the plot."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
HOST, MODEL = "mol-bench", "SmolLM2-135M-Instruct"
INVENTORIES = ("molecule/inventory/hosts.yml", "molecule/bench/inventory/hosts.yml")
ASKED = {"bench_kinds": ["text", "image"], "bench_clients": [1, 2], "bench_requests": 1, "bench_max_tokens": 8}
ROW = re.compile(
    rf"^\s*(?P<host>{HOST}|gateway) +{MODEL} +(?P<kind>text|image) +(?P<clients>\d) +(?P<good>\d+) +(?P<bad>\d+) +"
    r"(?P<speed>[\d.]+)(?: +(?P<change>[-+]\d+%))? +[\d.]+ ",
    re.MULTILINE,
)
LEVELS = {(host, kind, clients) for host in (HOST, "gateway") for kind in ("text", "image") for clients in ("1", "2")}


def bench(folder: Path) -> str:
    """Run what a user runs; return what it printed."""
    command = [str(Path(sys.executable).with_name("ansible-playbook")), "playbooks/bench.yml"]
    command += [word for path in INVENTORIES for word in ("-i", path)]
    command += ["-e", json.dumps({**ASKED, "bench_dir": str(folder)})]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return done.stdout


def rows(output: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Return the rows of a table by host, kind and clients."""
    found = [row.groupdict() for row in ROW.finditer(output)]
    return {(row["host"], row["kind"], row["clients"]): row for row in found}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Return the folder of the figures, and what two runs printed."""
    folder = tmp_path_factory.mktemp("bench")
    return folder, [bench(folder), bench(folder)]


def test_text_and_images_are_measured_at_the_engine_and_through_the_gateway(runs: tuple[Path, list[str]]) -> None:
    for output in runs[1]:
        told = rows(output)
        assert set(told) == LEVELS, output
        assert all(row["bad"] == "0" and row["good"] == row["clients"] for row in told.values()), output


def test_the_second_run_is_compared_with_the_first(runs: tuple[Path, list[str]]) -> None:
    folder, (first, second) = runs
    assert not any(row["change"] for row in rows(first).values()), first
    assert all(row["change"] for row in rows(second).values()), second
    assert "Compared with the run of" in second
    kept = {name: json.loads((folder / name).read_text()) for name in ("engine.json", "engine-last.json")}
    assert kept["engine.json"]["moment"] > kept["engine-last.json"]["moment"]
    changes = {(now["host"], now["kind"], str(now["clients"])): now["change"] for now in kept["engine.json"]["levels"]}
    told = {key: f"{change['tokens_per_second']:+.0f}%" for key, change in changes.items()}
    assert told == {key: row["change"] for key, row in rows(second).items()}


def test_the_plot_draws_both_runs(runs: tuple[Path, list[str]]) -> None:
    drawn = ET.parse(runs[0] / "engine.svg")  # noqa: S314 - our own file
    lines = [line.get("class") for line in drawn.iter("{http://www.w3.org/2000/svg}polyline")]
    # Two diagrams of four lines: host and gateway, text and image.
    assert lines.count("last") == lines.count(None) == 8


def test_an_image_reaches_the_model(host: Any) -> None:
    """It is encoded into tokens, which a question without it does not have."""
    levels = "/v1/chat/completions"
    program = f"""
import base64, json, struct, urllib.request, zlib
def part(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
rows = b"".join(b"\\0" + b"\\xff\\0\\0" * 64 for row in range(64))
png = b"\\x89PNG\\r\\n\\x1a\\n" + part(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0))
png += part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")
key = open("/etc/api-server/api-key").read().split()[0]
image = {{"type": "image_url", "image_url": {{"url": "data:image/png;base64," + base64.b64encode(png).decode()}}}}
for content in ([{{"type": "text", "text": "Look."}}], [{{"type": "text", "text": "Look."}}, image]):
    body = {{"model": "{MODEL}", "max_tokens": 1, "messages": [{{"role": "user", "content": content}}]}}
    asked = urllib.request.Request("http://127.0.0.1:23333{levels}", json.dumps(body).encode(),
        {{"Content-Type": "application/json", "Authorization": "Bearer " + key}})
    print(json.load(urllib.request.urlopen(asked))["usage"]["prompt_tokens"])
"""
    without, seen = map(int, host.check_output("python3 -c %s", program).split())
    assert seen >= without + 49
