"""Collect what no exporter knows: GPUs, backups, releases. Writes a file that the node exporter reads.

Use: collector.py --output FILE [--nvidia-smi PROGRAM] [--backups GLOB]... Started by monitoring-collector.timer.
Standard library only, and the host's own Python: it must work when every environment is broken.
"""

from __future__ import annotations

import argparse
import csv
import glob
import io
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

SMI_SECONDS = 20
MIB = 1024 * 1024
UNITS = Path("/etc/systemd/system")
# nvidia-smi's name of a field -> metric, kind, meaning, factor.
GPU_FIELDS: Mapping[str, tuple[str, str, str, float]] = {
    "memory.total": ("selfhost_gpu_memory_total_bytes", "gauge", "Memory of the GPU", MIB),
    "memory.used": ("selfhost_gpu_memory_used_bytes", "gauge", "Memory in use", MIB),
    "utilization.gpu": ("selfhost_gpu_utilization_ratio", "gauge", "Share of time in which it computed", 0.01),
    "temperature.gpu": ("selfhost_gpu_temperature_celsius", "gauge", "Temperature", 1),
    "power.draw": ("selfhost_gpu_power_watts", "gauge", "Power that it draws", 1),
    "power.limit": ("selfhost_gpu_power_limit_watts", "gauge", "Power that it may draw", 1),
    # The older spelling, which new drivers take too.
    "clocks_throttle_reasons.hw_thermal_slowdown": (
        "selfhost_gpu_thermal_slowdown",
        "gauge",
        "Whether it is slowed down by its heat",
        1,
    ),
    "ecc.errors.corrected.volatile.total": (
        "selfhost_gpu_ecc_corrected_errors_total",
        "counter",
        "Memory errors mended since the driver started",
        1,
    ),
    "ecc.errors.uncorrected.volatile.total": (
        "selfhost_gpu_ecc_uncorrected_errors_total",
        "counter",
        "Memory errors not mended since the driver started",
        1,
    ),
    "remapped_rows.pending": ("selfhost_gpu_rows_remap_pending", "gauge", "Bad memory that a restart takes out", 1),
    "remapped_rows.failure": ("selfhost_gpu_rows_remap_failed", "gauge", "Bad memory without a spare", 1),
}
NAMES = ("index", "uuid", "name")
WORDS = {"Active": 1.0, "Not Active": 0.0, "Yes": 1.0, "No": 0.0}
XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")
ENVIRONMENT = re.compile(r"^ExecStart=\S*?/(?:releases|envs)/([^/\s]+)(?:/([0-9a-f]+))?/bin/", re.MULTILINE)
# An engine's unit says which release of the engine it is of; other programs' releases are their environments'.
RELEASE = re.compile(r"^# Release ([0-9a-f]+)$", re.MULTILINE)


class Page:
    """Metrics in Prometheus' text form; help and type stand once before the samples of a metric."""

    def __init__(self) -> None:
        """Begin empty."""
        self._samples: dict[str, list[str]] = {}

    def add(self, name: str, kind: str, meaning: str, value: float, **labels: str) -> None:
        """Add a sample."""
        lines = self._samples.setdefault(name, [f"# HELP {name} {meaning}.", f"# TYPE {name} {kind}"])
        escaped = {
            key: text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for key, text in labels.items()
        }
        inside = ",".join(f'{key}="{text}"' for key, text in escaped.items())
        shown = int(value) if float(value).is_integer() else float(value)
        lines.append(f"{name}{{{inside}}} {shown}" if inside else f"{name} {shown}")

    def text(self) -> str:
        """Return the page."""
        return "".join(f"{line}\n" for lines in self._samples.values() for line in lines)


def number(text: str) -> float | None:
    """Return what nvidia-smi says as a number; None for [N/A], [Not Supported] and the like."""
    if text in WORDS:
        return WORDS[text]
    try:
        return float(text)
    except ValueError:
        return None


def gpu_metrics(page: Page, text: str) -> int:
    """Add what nvidia-smi's table says and return the number of GPUs; what a GPU doesn't know is left out."""
    count = 0
    for row in csv.reader(io.StringIO(text), skipinitialspace=True):
        if len(row) != len(NAMES) + len(GPU_FIELDS):
            continue
        count += 1
        index, uuid, name = row[: len(NAMES)]
        for (metric, kind, meaning, factor), value in zip(GPU_FIELDS.values(), row[len(NAMES) :], strict=True):
            known = number(value.strip())
            if known is not None:
                page.add(metric, kind, meaning, known * factor, gpu=index, uuid=uuid, model=name)
    return count


def xid_metrics(page: Page, kernel: str) -> None:
    """Count the errors that the driver wrote into the kernel's log since the boot; an increase is seen from 0."""
    counts: dict[tuple[str, str], int] = {}
    for bus, xid in XID.findall(kernel):
        counts[bus, xid] = counts.get((bus, xid), 0) + 1
    meaning = "Errors of the driver since the boot, by their number"
    page.add("selfhost_gpu_xid_errors_total", "counter", meaning, sum(counts.values()))
    for (bus, xid), count in sorted(counts.items()):
        page.add("selfhost_gpu_xid_errors_by_kind_total", "counter", meaning, count, bus=bus, xid=xid)


def backup_metrics(page: Page, globs: Iterable[str]) -> None:
    """Add when the newest file of each pattern was written, and its size; nothing where there is none yet."""
    for pattern in globs:
        found = [(path.stat(), path) for path in map(Path, glob.glob(pattern)) if path.exists()]  # noqa: PTH207 Path has no absolute patterns
        if found:
            about = max(found, key=lambda pair: pair[0].st_mtime)[0]
            page.add(
                "selfhost_backup_timestamp_seconds",
                "gauge",
                "When the newest backup was made",
                about.st_mtime,
                path=pattern,
            )
            page.add("selfhost_backup_size_bytes", "gauge", "Size of the newest backup", about.st_size, path=pattern)


def release_metrics(page: Page, units: Path) -> None:
    """Add which release each service of the collection starts."""
    for path in sorted([*units.glob("api-server*.service"), *units.glob("open-webui.service")]):
        text = path.read_text(encoding="utf-8")
        found, said = ENVIRONMENT.search(text), RELEASE.search(text)
        if found:
            named, release = found[1], (said or found)[1 if said else 2] or ""
            page.add(
                "selfhost_release_info",
                "gauge",
                "Release that a unit starts",
                1,
                unit=path.name,
                env=named,
                release=release,
            )


def output_of(*command: str, good: tuple[int, ...] = (0,)) -> str | None:
    """Return what a program printed; None where it is missing, hangs, or ends with another code than the good ones."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SMI_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        sys.stderr.write(f"{command[0]}: {error}\n")
        return None
    if done.returncode not in good:
        sys.stderr.write(f"{command[0]} ended with {done.returncode}: {done.stderr.strip() or done.stdout.strip()}\n")
        return None
    return done.stdout


def collect(nvidia_smi: str, backups: Iterable[str], units: Path = UNITS) -> str:
    """Return the whole page."""
    page = Page()
    if nvidia_smi:
        fields = ",".join([*NAMES, *GPU_FIELDS])
        table = output_of(nvidia_smi, f"--query-gpu={fields}", "--format=csv,noheader,nounits")
        count = gpu_metrics(page, table) if table is not None else 0
        page.add("selfhost_gpus", "gauge", "Number of GPUs that nvidia-smi shows", count)
        page.add("selfhost_gpu_scrape_success", "gauge", "Whether nvidia-smi answered with a GPU", float(count > 0))
        asked = ("journalctl", "--dmesg", "--boot", "--grep=NVRM: Xid", "--output=cat", "--no-pager")
        # 1: no line is of that kind.
        kernel = output_of(*asked, good=(0, 1))
        xid_metrics(page, kernel or "")
    backup_metrics(page, backups)
    release_metrics(page, units)
    page.add("selfhost_collected_timestamp_seconds", "gauge", "When this was collected", time.time())
    return page.text()


def main() -> None:
    """Write the page in one step, so that nobody reads half of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--nvidia-smi", default=shutil.which("nvidia-smi", path="/usr/bin:/usr/lib/wsl/lib") or "")
    parser.add_argument("--backups", action="append", default=[])
    given = parser.parse_args()
    text = collect(given.nvidia_smi, given.backups)
    beside = given.output.with_suffix(".new")
    beside.write_text(text, encoding="utf-8")
    beside.chmod(0o644)
    beside.replace(given.output)


if __name__ == "__main__":
    main()
