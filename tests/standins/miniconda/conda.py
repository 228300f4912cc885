"""The `conda` command of the Miniconda stand-in: the part of conda 26's command line that the roles speak.

For tests and the lab only. Environments are solved and installed by py-rattler, so they are real conda
environments. Whatever real conda would not accept is refused here too, so a role can't lean on the stand-in.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import NoReturn

VERSION = "26.7.1"
ROOT = Path(sys.prefix)
USER_ENVS = Path.home() / ".conda" / "envs"


class CondaError(Exception):
    """A failure that conda reports and exits 1 for."""


def is_environment(path: Path) -> bool:
    """Tell whether a folder is a conda environment."""
    return (path / "conda-meta" / "history").is_file()


def locate(name: str | None, prefix: str | None) -> Path:
    """Find an environment by name or folder as conda does: links are not resolved."""
    if prefix is not None:
        return Path(prefix).absolute()
    if name in {None, "base", "root"}:
        return ROOT
    for folder in (USER_ENVS, ROOT / "envs"):
        if (folder / str(name)).is_dir():
            return folder / str(name)
    raise CondaError(f"EnvironmentNameNotFound: Could not find conda environment: {name}")


def environments() -> list[Path]:
    """List the environments that conda knows of."""
    named = [path for folder in (USER_ENVS, ROOT / "envs") if folder.is_dir() for path in sorted(folder.iterdir())]
    return [ROOT, *(path for path in named if is_environment(path))]


def packages(prefix: Path) -> list[dict[str, object]]:
    """Read the conda packages of an environment."""
    if not is_environment(prefix):
        raise CondaError(f"EnvironmentLocationNotFound: Not a conda environment: {prefix}")
    found = []
    for record in sorted((prefix / "conda-meta").glob("*.json")):
        data = json.loads(record.read_text(encoding="utf-8"))
        keys = ("name", "version", "build_string", "build_number", "channel", "platform", "dist_name")
        found.append({**{key: data.get(key) for key in keys}, "build_string": data.get("build", "")})
    return found


async def install(specs: list[str], channels: list[str], prefix: Path) -> None:
    """Solve and link packages into a new environment."""
    # rattler loads in 0.3 s: only the commands that need it pay for it.
    import rattler

    urls = [channel if "://" in channel else Path(channel).absolute().as_uri() for channel in channels]
    records = await rattler.solve(
        sources=[rattler.Channel(url) for url in urls],
        specs=specs,
        platforms=["linux-64", "noarch"],
        virtual_packages=rattler.VirtualPackage.detect(),
    )
    await rattler.install(records, target_prefix=prefix, cache_dir=ROOT / "pkgs", show_progress=False)


def create(arguments: argparse.Namespace) -> None:
    """`conda create`."""
    if not arguments.override_channels or not arguments.channel:
        raise CondaError(
            "CondaToSNonInteractiveError: Terms of Service have not been accepted for the default channels"
        )
    if not arguments.yes:
        raise CondaError("DryRunExit: the stand-in asks no question, say --yes")
    if arguments.prefix is None and arguments.name is None:
        raise CondaError("ArgumentError: one of the arguments -n/--name -p/--prefix is required")
    prefix = Path(arguments.prefix).absolute() if arguments.prefix else ROOT / "envs" / arguments.name
    if is_environment(prefix):
        raise CondaError(f"CondaValueError: prefix already exists: {prefix}")
    try:
        asyncio.run(install(arguments.specs, arguments.channel, prefix))
    except Exception as error:
        raise CondaError(f"PackagesNotFoundError: {error}") from error
    stamp = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    history = prefix / "conda-meta" / "history"
    history.parent.mkdir(parents=True, exist_ok=True)
    with history.open("a", encoding="utf-8") as stream:
        stream.write(f"==> {stamp} <==\n# cmd: conda {' '.join(sys.argv[1:])}\n# conda version: {VERSION}\n")
    if arguments.json:
        print(json.dumps({"success": True, "prefix": str(prefix)}))


def show(arguments: argparse.Namespace) -> None:
    """`conda list`, `conda info` and `conda env list`."""
    if arguments.command == "list":
        found = packages(locate(arguments.name, arguments.prefix))
        print(json.dumps(found) if arguments.json else "\n".join(f"{p['name']} {p['version']}" for p in found))
        return
    envs = [str(path) for path in environments()]
    if arguments.command == "env":
        print(json.dumps({"envs": envs}) if arguments.json else "\n".join(envs))
        return
    info = {"conda_version": VERSION, "root_prefix": str(ROOT), "envs": envs, "platform": "linux-64"}
    print(json.dumps(info) if arguments.json else "\n".join(f"{key} : {value}" for key, value in info.items()))


def run(arguments: argparse.Namespace) -> None:
    """`conda run`: the program with the environment's bin first on PATH."""
    prefix = locate(arguments.name, arguments.prefix)
    environment = {**os.environ, "CONDA_PREFIX": str(prefix), "PATH": f"{prefix}/bin:{os.environ['PATH']}"}
    os.execvpe(arguments.program[0], arguments.program, environment)  # noqa: S606 - this is what the command is for


def accept_terms(arguments: argparse.Namespace) -> None:
    """`conda tos accept --system`: leave the record where the real plugin leaves it."""
    record = ROOT / "conda-meta" / "tos" / ("0" * 64) / "0.0.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"tos_accepted": arguments.action == "accept"}), encoding="utf-8")
    print("accepted Terms of Service for defaults")


def standin_prefix(arguments: argparse.Namespace) -> None:
    """Print an environment's folder: what conda.sh needs to activate it."""
    is_folder = "/" in arguments.name
    prefix = locate(None, arguments.name) if is_folder else locate(arguments.name, None)
    if not is_environment(prefix):
        raise CondaError(f"EnvironmentLocationNotFound: Not a conda environment: {prefix}")
    print(prefix)


def parser() -> argparse.ArgumentParser:
    """Build the command line. No abbreviations: real conda has none either."""
    top = argparse.ArgumentParser(prog="conda", allow_abbrev=False)
    top.add_argument("-V", "--version", action="version", version=f"conda {VERSION}")
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, *, with_target: bool = True) -> argparse.ArgumentParser:
        added = commands.add_parser(name, allow_abbrev=False)
        if with_target:
            target = added.add_mutually_exclusive_group()
            target.add_argument("-n", "--name")
            target.add_argument("-p", "--prefix")
        return added

    made = command("create")
    made.add_argument("-c", "--channel", action="append", default=[])
    for flags in (["--override-channels"], ["-y", "--yes"], ["-q", "--quiet"], ["--json"], ["--no-default-packages"]):
        made.add_argument(*flags, action="store_true")
    made.add_argument("specs", nargs="*")
    made.set_defaults(call=create)

    for name in ("list", "info"):
        shown = command(name)
        shown.add_argument("--json", action="store_true")
        shown.set_defaults(call=show)
    listed = command("env", with_target=False)
    listed.add_argument("action", choices=["list"])
    listed.add_argument("--json", action="store_true")
    listed.set_defaults(call=show)

    ran = command("run")
    ran.add_argument("--no-capture-output", action="store_true")
    ran.add_argument("program", nargs=argparse.REMAINDER)
    ran.set_defaults(call=run)

    terms = command("tos", with_target=False)
    terms.add_argument("action", choices=["accept"])
    terms.add_argument("--system", action="store_true", required=True)
    terms.set_defaults(call=accept_terms)

    found = command("standin-prefix", with_target=False)
    found.add_argument("name")
    found.set_defaults(call=standin_prefix)
    return top


def main() -> NoReturn:
    """Run one conda command and end the program."""
    status = 0
    arguments = parser().parse_args()
    try:
        arguments.call(arguments)
    except CondaError as error:
        print(f"\n{error}\n", file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # rattler's threads outlive its calls and crash one interpreter in seven while it shuts down.
    os._exit(status)


if __name__ == "__main__":
    main()
