# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""A twin of an engine: the release that runs, once more on another port, for as long as the engine itself is changed.

    /run/systemd/system/INSTANCE-twin.service     the release's unit, with another name, port and end
    /run/api-server-twin/INSTANCE.json            what its launcher reads

Both are gone after a boot, and the unit ends by itself after a while, so a lost controller leaves nothing to clean up.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from ansible_collections.selfhost.lmdeploy.plugins.module_utils.engine_releases import (
    GateFault,
    ReleaseFault,
    Releases,
    read,
    read_json,
    write,
    write_json,
)

RUNTIME = Path("/run")


def moved(settings: dict[str, Any], name: str, port: int) -> dict[str, Any]:
    """Return what a launcher reads, for the same engine under another name and on another port."""
    old, arguments = settings["port"], [str(argument) for argument in settings["arguments"]]
    for at, argument in enumerate(arguments):
        if argument in (f"port={old}", f"--server-port={old}"):
            arguments[at] = f"{argument.partition('=')[0]}={port}"
        elif argument == str(old) and at and arguments[at - 1] == "--server-port":
            arguments[at] = str(port)
    return {**settings, "name": name, "port": port, "arguments": arguments}


class Twin:
    """The twin of one engine."""

    def __init__(self, engine: Releases, runtime: Path = RUNTIME) -> None:
        """Look at nothing yet."""
        self.engine = engine
        self.name = f"{engine.instance}-twin"
        self.unit = f"{self.name}.service"
        self.unit_file = runtime / "systemd/system" / self.unit
        self.settings_file = runtime / "api-server-twin" / f"{engine.instance}.json"

    def text(self, release: str, seconds: float) -> str:
        """Return the unit: the release's own, with what makes it a twin."""
        lines = read(self.engine.folder(release) / self.engine.unit).partition("\n[Install]")[0].splitlines()
        changes = {
            # No second process of a twin that failed: nobody would notice that it comes and goes.
            r"Restart=.*": "Restart=no",
            r"RuntimeDirectory=.*": f"RuntimeDirectory={self.name}",
            r"LoadCredential=instance\.json:.*": f"LoadCredential=instance.json:{self.settings_file}",
            r"Description=(.*)": r"Description=Twin, while the engine itself is changed: \1",
            r"\[Unit\]": "[Unit]\nCollectMode=inactive-or-failed",
            r"\[Service\]": f"[Service]\nRuntimeMaxSec={seconds:.0f}",
        }
        for pattern, change in changes.items():
            lines = [re.sub(rf"^{pattern}$", change, line) for line in lines]
        return "\n".join(lines) + "\n"

    def release(self) -> str:
        """Return the release that a twin would have: the one that serves, or nothing where none does."""
        shown = self.engine.manager.show(self.engine.unit)
        release = self.engine.running()
        return release if shown.get("ActiveState") == "active" and self.engine.is_whole(release) else ""

    def exists(self) -> bool:
        """Tell whether there is a twin, or what is left of one."""
        return self.unit_file.exists() or self.settings_file.exists()

    def have(self, port: int, seconds: float) -> dict[str, Any]:
        """Have the release that runs once more on a port, and ask it; raise ReleaseFault with why it can't be."""
        release = self.release()
        settings = moved(read_json(self.engine.folder(release) / "instance.json"), self.name, port)
        self.end()
        for folder, mode in ((self.settings_file.parent, 0o700), (self.unit_file.parent, 0o755)):
            folder.mkdir(mode=mode, parents=True, exist_ok=True)
        write_json(self.settings_file, settings)
        write(self.unit_file, self.text(release, seconds))
        manager = self.engine.manager
        try:
            manager.reload()
            manager.have(self.unit, "start")
            return self.engine.ask(release, settings)
        except (GateFault, ReleaseFault) as fault:
            lines = manager.journal(self.unit, 0)
            self.end()
            message = (
                f"{self.unit} does not serve beside {self.engine.unit}: {fault}\n"
                f"The end of its journal (journalctl -u {self.unit}):\n{lines}\n"
                "Two engines have to fit on this host: give each less memory for its cache "
                "(api_server_cache_max_entry_count), or set api_server_twin_port_offset to 0, and accept a gap."
            )
            raise ReleaseFault(message) from fault

    def end(self) -> bool:
        """Have no twin; open streams get the time that they get with every engine. Tell whether there was one."""
        if not self.exists():
            return False
        with contextlib.suppress(ReleaseFault):
            self.engine.manager.run("systemctl", "stop", self.unit)
        self.unit_file.unlink(missing_ok=True)
        self.settings_file.unlink(missing_ok=True)
        self.engine.manager.reload()
        with contextlib.suppress(ReleaseFault):
            self.engine.manager.run("systemctl", "reset-failed", self.unit)
        return True


def port_of(engine: Releases) -> int:
    """Return the port of the release that runs, 0 where none does."""
    return int(read_json(engine.folder(engine.running()) / "instance.json").get("port", 0))
