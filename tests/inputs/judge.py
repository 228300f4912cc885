"""What becomes of an inventory: preflight's word on it, and the files that the roles would write, read back.

Preflight's action plugin is the real one; only its look at the host is answered here. Files are rendered from the
roles' own defaults, internal variables, filters and templates, by Ansible, and read as systemd and programs read them.
"""

from __future__ import annotations

import functools
import ipaddress
import json
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader
from ansible.template import Templar, trust_as_template

ROOT = Path(__file__).resolve().parents[2]
# Before anything of the collection is imported: filters are then found by their full names, as a playbook finds them.
init_plugin_loader([str(ROOT / ".collections")])

import preflight_hosts as hosts  # noqa: E402  # see above
from ansible_collections.selfhost.lmdeploy.plugins.action import preflight  # noqa: E402  # see above
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import environment_file  # noqa: E402  # see above
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_checks import judge  # noqa: E402  # see above
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_desired import Desired  # noqa: E402  # see above
from generate import BASES, ROLES, Case  # noqa: E402  # see above

PLAYED = ["mirrors", "miniconda", "conda_env", "model_weights", "api_server", "gateway", "open_webui", "backup"]
RELEASE = "/opt/miniconda3/releases/engine/0123456789ab"
FOLDER = "/etc/api-server/releases/engine/@RELEASE@"
LAUNCHER = f"{FOLDER}/launcher.py"
SECRETS = {"WEBUI_SECRET_KEY": "generated", "WEBUI_ADMIN_PASSWORD": "generated"}
LOADER = DataLoader()


class Harm(AssertionError):
    """An accepted inventory does something that its author did not write."""


@dataclass
class Files:
    """What the roles would write: units and configurations by name, environment files and the launcher's JSON."""

    units: dict[str, str] = field(default_factory=dict)
    environments: dict[str, dict[str, str]] = field(default_factory=dict)
    instances: dict[str, str] = field(default_factory=dict)
    gateways: dict[str, str] = field(default_factory=dict)


@dataclass
class Verdict:
    """How an inventory fared. ``message`` is what a person reads; ``files`` what an accepted one would write."""

    refused: bool
    message: str
    files: Files | None = None


def trusted(value: Any) -> Any:
    """Return a value whose texts may be templates."""
    if isinstance(value, dict):
        return {key: trusted(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [trusted(entry) for entry in value]
    return trust_as_template(value) if isinstance(value, str) else value


@functools.cache
def roles() -> dict[str, preflight.Role]:
    """Return the roles as preflight reads them."""
    return {name: preflight.Role(name, LOADER) for name in sorted({*ROLES, "preflight"})}


def is_gpu(case: Case) -> bool:
    """Tell whether the host of a case has a GPU: it has where LMDeploy is wanted."""
    return BASES[case.base]["api_server_engine"] == "lmdeploy" or case.variables.get("api_server_engine") == "lmdeploy"


def ask_preflight(case: Case) -> tuple[dict[str, Any], Desired | None]:
    """Return the result of the action plugin, and the values as it understood them."""
    changes: dict[str, Any] = {"gpu": hosts.machine("h100")} if is_gpu(case) else {"gpu": hosts.NO_CARD}
    survey: dict[str, Any] = {**hosts.host(**changes), "time": time.time()}
    understood: list[Desired] = []

    def look(module_name: str, module_args: dict[str, Any], **_rest: Any) -> dict[str, Any]:
        assert module_name == "selfhost.lmdeploy.host_survey"
        # What goes to the host must be data that survives the way.
        json.dumps(module_args)
        return {"survey": {**survey, "urls": [{"reached": True, "detail": ""} for _ in module_args["urls"]]}}

    def listening_judge(desired: Desired, survey: Any) -> Any:
        understood.append(desired)
        return judge(desired, survey)

    task = MagicMock(args={"roles": PLAYED, "timeout_seconds": 1.0}, register="x", async_val=0, check_mode=False)
    plugin = preflight.ActionModule(
        task=task, connection=MagicMock(), play_context=MagicMock(), loader=LOADER, templar=Templar(LOADER),
        shared_loader_obj=MagicMock(),
    )  # fmt: skip
    plugin._execute_module = look
    variables = trusted(case.variables) if case.trusted else case.variables
    with patch.object(preflight, "judge", listening_judge):
        result = plugin.run(task_vars={"inventory_hostname": "box", "hostvars": {"box": variables}, **variables})
    return result, understood[-1] if understood else None


class Renderer:
    """The roles' expressions and templates over some variables."""

    def __init__(self, variables: Mapping[str, Any], *, gpu: bool) -> None:
        """Lay them over the roles' defaults and under their internal variables, as Ansible does."""
        merged: dict[str, Any] = {}
        for role in roles().values():
            merged.update(role.defaults)
        merged.update(variables)
        for role in roles().values():
            merged.update(role.internal)
        merged["inventory_hostname"] = "box"
        self.variables = merged
        self.gpu = gpu

    def value(self, expression: str, role: str, **more: Any) -> Any:
        """Return the value of an expression as a task of a role would see it."""
        variables = {**self.variables, "role_path": str(ROOT / "roles" / role), **more}
        templar = Templar(LOADER, variables=variables)
        return preflight.plain(templar.template(trust_as_template(expression)))

    def template(self, role: str, name: str, **more: Any) -> str:
        """Return a rendered template of a role."""
        path = ROOT / "roles" / role / "templates" / name
        return str(self.value(f"{{{{ lookup('ansible.builtin.template', '{path}') }}}}", role, **more))

    def files(self) -> Files:
        """Return all files."""
        made = Files()
        self.engines(made)
        self.interface(made)
        self.gateway(made)
        self.backup(made)
        return made

    def engines(self, made: Files) -> None:
        """Add the engines' units and JSON."""
        engine = self.value("{{ api_server_engine }}", "api_server")
        known: dict[str, Any] = {
            "api_server_engine_resolved": ("lmdeploy" if self.gpu else "llama_cpp") if engine == "auto" else engine,
            "__api_server_host": {"release": RELEASE, "models": {}, "gpus": int(self.gpu), "wsl": False, "units": []},
            "__api_server_release": RELEASE,
            "__api_server_folder": FOLDER,
        }
        expression = (
            "{{ __api_server_plain | selfhost.lmdeploy.engine_instances("
            "api_server_instances, __api_server_host, __api_server_settings) }}"
        )
        listed = self.value(expression, "api_server", **known)
        for instance in listed:
            name = instance["instance"]
            more = {**known, "__api_server_instance": instance, "__api_server_list": listed}
            made.units[f"{name}.service"] = self.template("api_server", "api-server.service.j2", **more)
            content = "{{ dict(__api_server_instance.launcher, release=__api_server_release) | to_nice_json }}"
            made.instances[name] = str(self.value(content, "api_server", **more))

    def interface(self, made: Files) -> None:
        """Add Open WebUI's unit and environment."""
        faults = self.value("{{ __open_webui_configuration | selfhost.lmdeploy.open_webui_faults }}", "open_webui")
        if faults:
            raise Harm(f"preflight let pass what the role open_webui refuses: {faults}")
        both = self.value("{{ __open_webui_configuration | selfhost.lmdeploy.open_webui_environment }}", "open_webui")
        made.environments["open-webui"] = {**both["variables"], **both["secrets"], **SECRETS}
        made.units["open-webui.service"] = self.template("open_webui", "open-webui.service.j2")

    def gateway(self, made: Files) -> None:
        """Add HAProxy's configuration."""
        plan = self.value("{{ __gateway_variables | selfhost.lmdeploy.gateway_plan }}", "gateway")
        made.gateways["haproxy.cfg"] = self.template("gateway", "haproxy.cfg.j2", __gateway_plan=plan)

    def backup(self, made: Files) -> None:
        """Add the backup's units, and the settings of its program."""
        for kind in ("service", "timer"):
            made.units[f"open-webui-backup.{kind}"] = self.template("backup", f"open-webui-backup.{kind}.j2")
        made.gateways["settings.json"] = str(self.value("{{ __backup_settings | to_nice_json }}", "backup"))


def verdict(case: Case) -> Verdict:
    """Return how an inventory fares; an accepted one that does harm raises Harm."""
    result, understood = ask_preflight(case)
    message = str(result.get("msg", ""))
    if result.get("failed"):
        return Verdict(True, message)
    assert understood is not None
    variables = trusted(case.variables) if case.trusted else case.variables
    files = Renderer(variables, gpu=is_gpu(case)).files()
    # Preflight judged the values as the specs understand them; the roles take them as they stand in the inventory.
    spec_view = {**variables, **understood.values}
    if files != Renderer(spec_view, gpu=is_gpu(case)).files():
        raise Harm(
            f"the roles take the values otherwise than preflight understood them: {difference(files, spec_view, case)}"
        )
    for name, text in files.units.items():
        check_unit(name, text)
    for values in files.environments.values():
        check_environment(values)
    for text in files.instances.values():
        check_instance(text)
    check_haproxy(files.gateways["haproxy.cfg"])
    json.loads(files.gateways["settings.json"])
    return Verdict(False, message, files)


def difference(files: Files, spec_view: Mapping[str, Any], case: Case) -> str:
    """Return the first lines that differ."""
    other = Renderer(spec_view, gpu=is_gpu(case)).files()
    mine, theirs = ([*json.dumps(vars(entry), indent=1, default=str).splitlines()] for entry in (files, other))
    return " | ".join(f"{a.strip()} / {b.strip()}" for a, b in zip(mine, theirs, strict=False) if a != b)[:400]


# -- units ------------------------------------------------------------------------------------------------------------


@functools.cache
def template_lines(role: str, name: str) -> list[re.Pattern[str]]:
    """Return a pattern for each line that a template may write, in order."""
    text = (ROOT / "roles" / role / "templates" / name).read_text(encoding="utf-8")
    patterns = []
    for line in text.splitlines():
        # A loop within a line is one value.
        looped = re.sub(r"\{% for .*?\{% endfor %\}", "\x01", line)
        bare = re.sub(r"\{%.*?%\}", "\x01" if "=" in line else "", looped)
        if bare.strip():
            parts = re.split(r"\{\{.*?\}\}|\x01", bare)
            patterns.append(re.compile("(.*)".join(re.escape(part) for part in parts)))
    return patterns


def directives(name: str, text: str) -> list[tuple[str, str]]:
    """Return (key, value) of a unit's lines, each of which must be one that the template writes, in its order."""
    role, template = (
        ("backup", f"{name}.j2")
        if name.startswith("open-webui-backup")
        else ("open_webui", "open-webui.service.j2")
        if name.startswith("open-webui")
        else ("api_server", "api-server.service.j2")
    )
    waiting = iter(template_lines(role, template))
    found = []
    # Every character that any reader might take as the end of a line.
    for line in text.splitlines():
        if not line.strip():
            continue
        if not any(pattern.fullmatch(line) for pattern in waiting):
            raise Harm(f"{name} has a line that the template does not write there: {line!r}")
        if line.endswith("\\") or re.search(r"[\x00-\x1f\x7f-\x9f]", line):
            raise Harm(f"{name} has a line that goes on or holds a control character: {line!r}")
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.append((key, value))
    return found


def words(value: str) -> list[str]:
    """Return a unit's value as the words that systemd reads; what would be changed on the way is harm."""
    if re.search(r"[%$\\\"']", value):
        raise Harm(f"a value that systemd would expand or unquote: {value!r}")
    return value.split()


def check_unit(name: str, text: str) -> None:
    """Refuse a unit that says more, or something else, than its template."""
    for key, value in directives(name, text):
        read = words(value)
        if name.startswith("open-webui-backup"):
            if key == "ReadWritePaths" and not all(word.removeprefix("-").startswith("/") for word in read):
                raise Harm(f"{name} writes where no path is: {value!r}")
        elif key == "ExecStart" and name.startswith("open-webui"):
            is_whole = len(read) == 6 and read[1::2] == ["serve", *read[3:4], read[5]] and read[2] == "--host"
            if not is_whole or read[4] != "--port" or read[3].startswith("-") or not read[5].isdigit():
                raise Harm(f"{name} starts something else: {value!r}")
        elif key == "ExecStart" and read != [f"{RELEASE}/bin/python", LAUNCHER]:
            raise Harm(f"{name} starts something else: {value!r}")
        elif key == "IPAddressAllow":
            for word in read:
                if word not in ("localhost", "any"):
                    ipaddress.ip_network(word, strict=False)
        elif key in ("ReadWritePaths", "StateDirectory") and any(".." in word.split("/") for word in read):
            raise Harm(f"{name}: {key} leaves its place: {value!r}")


def check_haproxy(text: str) -> None:
    """Refuse a configuration of HAProxy's with a line, or a word in a line, that the template does not write.

    A value stands in quotes or as a word, so it holds nothing that ends either. Order is free: the template has loops.
    """
    patterns = template_lines("gateway", "haproxy.cfg.j2")
    for line in text.split("\n"):
        if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", line):
            raise Harm(f"haproxy.cfg has a line with a control character: {line!r}")
        if not line.strip():
            continue
        matches = [match for pattern in patterns if (match := pattern.fullmatch(line))]
        if not any(all(map(harmless, match.groups())) for match in matches):
            raise Harm(f"haproxy.cfg has a line that the template does not write: {line!r}")


def harmless(value: str) -> bool:
    """Tell whether a value is numbers and words for HAProxy, or the gateway's answer in JSON."""
    if value.startswith('{"object":"list"'):
        return "'" not in value and "%" not in value and bool(json.loads(value))
    return re.fullmatch(r"[\w.:/@+~=*\[\] -]*", value, re.ASCII) is not None


def verify(units: dict[str, str], folder: Path) -> list[str]:
    """Return what `systemd-analyze verify` says against units, in one call. Programs that are not here don't count."""
    for name, text in units.items():
        (folder / name).write_text(text, encoding="utf-8")
    paths = [str(folder / name) for name in units]
    if not paths:
        return []
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *paths],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = (done.stdout + done.stderr).splitlines()
    return [line for line in lines if "case-" in line and "is not executable" not in line]


# -- environment and JSON ----------------------------------------------------------------------------------------------


def check_environment(values: dict[str, str]) -> None:
    """Refuse an environment that does not come back whole."""
    text = environment_file.render(values, "A comment")
    if environment_file.parse(text) != values:
        raise Harm("the environment file does not come back as it was written")
    text.encode()
    for name in ("OPENAI_API_BASE_URLS", "OPENAI_API_KEYS"):
        if len(values[name].split(";")) != len(values["OPENAI_API_KEYS"].split(";")):
            raise Harm(f"{name} has another number of entries than there are connections")


def check_instance(text: str) -> None:
    """Refuse an instance file whose arguments or environment a process can't be given."""
    instance = json.loads(text)
    for argument in instance["arguments"]:
        if not isinstance(argument, str) or "\0" in argument:
            raise Harm(f"an argument that no process can be given: {argument!r}")
    for name, value in instance["environment"].items():
        if environment_file.NAME.match(name) is None or "\0" in value:
            raise Harm(f"an environment variable that no process can be given: {name!r}")
    arguments = [argument.split("=", 1)[0] for argument in instance["arguments"]]
    if any(("--api-keys".startswith(a) and a.startswith("--api")) or a == "api_keys" for a in arguments):
        raise Harm("a key stands in the arguments")
    text.encode()
