# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Controller side of M(selfhost.lmdeploy.preflight): values and specs, one survey of the host, one judgement."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ansible.errors import AnsibleError
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.action import ActionBase
from ansible.release import __version__
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.engine import ENGINES
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_checks import (
    CHECKS,
    as_json,
    block,
    judge,
    report,
    split,
    without_secrets,
)
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_desired import (
    ALIKE,
    ENVIRONMENTS,
    ERROR,
    HIDDEN,
    NO_ENGINE,
    SECRET_NAME,
    Desired,
    Fellow,
    Finding,
    Peer,
    cleaned,
    secrets_in,
    shown,
)
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_gpu import layout, resolve_engine
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_host import survey_request
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_settled import (
    RUN,
    always_looked_at,
    hardware,
    of_the_inventory,
    texts,
    watched,
)
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.witness import digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_survey import Survey

ROLES = Path(__file__).resolve().parents[2] / "roles"
# Facts that roles set for those that run after them; nobody writes them into an inventory.
GIVEN_BY_ROLES = frozenset(
    {
        "api_server_engine_resolved",
        "api_server_release_ids",
        "api_server_switch_needed",
        "conda_env_current_prefix",
        "conda_env_release_built",
        "conda_env_release_prefix",
        "lmdeploy_release_prefix",
        "preflight_settled",
        "preflight_watched",
        "preflight_wsl",
    }
)


def plain(value: Any) -> Any:
    """Return a value of Ansible's own types as the plain Python value that it stands for."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(entry) for entry in value]
    if isinstance(value, str):
        return str(value)
    return value


class Role:
    """A role of this collection as its files describe it."""

    def __init__(self, name: str, loader: Any) -> None:
        """Read specs, defaults and internal variables; a file that is missing is empty."""
        self.name = name
        self.path = ROLES / name

        def read(part: str) -> dict[str, Any]:
            path = self.path / part
            # unsafe: without a deep copy, which would take as long as all the rest; nothing here is written to.
            text = loader.load_from_file(str(path), unsafe=True, trusted_as_template=True) if path.is_file() else {}
            return text or {}

        entries = read("meta/argument_specs.yml").get("argument_specs", {}).values()
        self.options: dict[str, dict[str, Any]] = {}
        for entry in entries:
            self.options.update(entry.get("options") or {})
        self.defaults = read("defaults/main.yml")
        self.internal = read("vars/main.yml")


@functools.cache
def known_roles() -> dict[str, Role]:
    """Return every role of the collection by its name."""
    loader = DataLoader()
    return {path.name: Role(path.name, loader) for path in sorted(ROLES.iterdir()) if path.is_dir()}


@functools.cache
def code() -> str:
    """Return a digest of all that decides what a run does, the inventory left out: this collection, and Ansible."""
    total = hashlib.sha256(__version__.encode())
    for top in ("playbooks", "plugins", "roles"):
        for path in sorted((ROLES.parent / top).rglob("*")):
            if path.suffix not in (".md", ".pyc") and path.is_file():
                total.update(f"{path.relative_to(ROLES.parent)}\0".encode())
                total.update(path.read_bytes())
    return total.hexdigest()


# Ansible imports a plugin before it makes a process for each host, so what is read here is read once in a run.
known_roles()
code()


def finding(check: str, variable: str, value: str, host: str, message: str, fix: str) -> Finding:
    """Return an error."""
    return Finding(check, ERROR, variable, value, host, message, fix)


def unknown_variables(variables: Mapping[str, Any], roles: Iterable[Role], host: str) -> list[Finding]:
    """Return a finding for each variable that carries a role's prefix and that no role knows."""
    known: set[str] = set()
    prefixes: list[str] = []
    for role in roles:
        known |= role.options.keys() | role.defaults.keys() | role.internal.keys()
        prefixes.append(f"{role.name}_")
    found = []
    for name in sorted(variables):
        if not name.startswith(tuple(prefixes)) or name in known or name in GIVEN_BY_ROLES:
            continue
        near = get_close_matches(name, known, n=1, cutoff=0.8)
        fix = f"Did you mean {near[0]}?" if near else "Take it out, or give your own variables another beginning."
        why = "No role knows this variable, so it would be ignored in silence."
        found.append(finding("variable_unknown", name, shown(name, plain(variables[name])), host, why, fix))
    return found


def unknown_words(variable: str, words: Iterable[str], known: Iterable[str], host: str) -> list[Finding]:
    """Return a finding for each word of a list that means nothing."""
    found = []
    for word in set(words) - set(known):
        near = get_close_matches(word, known, n=1)
        fix = f"Did you mean {near[0]}?" if near else "Take one of: " + ", ".join(sorted(known)) + "."
        found.append(finding("variable_invalid", variable, word, host, "There is nothing of this name.", fix))
    return found


def checked(name: str, option: Mapping[str, Any], value: Any) -> tuple[Any, list[str]]:
    """Return a value as its argument spec understands it, and what the spec has against it."""
    spec = {key: entry for key, entry in plain(option).items() if key not in {"default", "required"}}
    outcome = ArgumentSpecValidator({name: spec}).validate({name: value})
    return plain(outcome.validated_parameters.get(name)), list(outcome.error_messages)


def misfit(option: Mapping[str, Any], value: Any, *, inner: bool = False) -> str:
    """Return why a role would not see in a value what its spec sees in it, '' where both see the same.

    A spec reads text as a list or dict of its own making, and passes over what has no value; a role does neither.
    """
    kind = option.get("type", "str")
    if value is None:
        may_lack = inner or ("default" in option and option["default"] is None)
        return "" if may_lack else "It has no value."
    if kind in ("str", "path"):
        if isinstance(value, bool):
            return "It is true or false, which YAML also takes from words like no and on: put it in quotes."
        return "" if isinstance(value, str | int | float) else "It is no text."
    if kind == "list":
        if not isinstance(value, list):
            return "It is no list."
        entry = {"type": option.get("elements", "raw"), "options": option.get("options") or {}}
        return next((f"An entry: {wrong}" for item in value if (wrong := misfit(entry, item))), "")
    if kind == "dict":
        if not isinstance(value, dict):
            return "It is no dict."
        known = (option.get("options") or {}).items()
        found = ((key, misfit(part, value.get(key), inner=True)) for key, part in known)
        return next((f"Its {key}: {wrong}" for key, wrong in found if wrong), "")
    return ""


@dataclass
class Read:
    """A role's variables as the role will see them, and the faults found on the way."""

    found: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


class Reader:
    """Computes the variables of roles: their defaults below, then the inventory, then their internal variables."""

    def __init__(self, templar: Any, task_vars: dict[str, Any], roles: Mapping[str, Role], host: str) -> None:
        """Put together what expressions may name."""
        self.templar = templar
        self.task_vars = task_vars
        self.host = host
        self.secrets: set[str] = set()
        self.variables: dict[str, Any] = {}
        for role in roles.values():
            self.variables.update(role.defaults)
        self.variables.update(task_vars)
        for role in roles.values():
            self.variables.update(role.internal)

    def read(self, role: Role) -> Read:
        """Compute and check every variable of a role."""
        result = Read()
        templar = self.templar.copy_with_new_env(available_variables={**self.variables, "role_path": str(role.path)})
        for name, option in role.options.items():
            if name not in self.variables:
                continue
            try:
                value = plain(templar.template(self.variables[name]))
            except AnsibleError as error:
                # A default that needs what only its role knows is the role's own affair.
                if name in self.task_vars:
                    fix = f"Correct the expression in {name}; each variable that it names must have a value."
                    shown_value = "(an expression)"
                    result.findings.append(finding("variable_template", name, shown_value, self.host, str(error), fix))
                continue
            self._judge(name, option, value, result)
        return result

    def _judge(self, name: str, option: Mapping[str, Any], value: Any, result: Read) -> None:
        """Check one value against its spec."""
        self.secrets.update(secrets_in(name, value))
        hidden = bool(option.get("no_log")) or SECRET_NAME.search(name) is not None
        if hidden and isinstance(value, str) and len(value) >= 4:
            self.secrets.add(value)
        wrong = misfit(option, value)
        value, messages = checked(name, option, value)
        messages = messages or [wrong] * bool(wrong)
        if not messages:
            result.found[name] = value
            return
        why = "The value does not fit." if hidden else " ".join(messages).rstrip(".") + "."
        choices = ", ".join(str(choice) for choice in option.get("choices") or [])
        fix = f"Take one of: {choices}." if choices else f"Give it as {option.get('type', 'str')}; see the role's page."
        told = HIDDEN if hidden else shown(name, value)
        result.findings.append(finding("variable_invalid", name, told, self.host, why, fix))


class ActionModule(ActionBase):  # type: ignore[misc] # ansible-core carries no types
    """Judge one host; see the module's documentation."""

    _supports_check_mode = True
    _supports_diff = False
    _requires_connection = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the findings; failed when one of them is an error that is not skipped."""
        variables = task_vars or {}
        result: dict[str, Any] = super().run(tmp, variables)
        _outcome, arguments = self.validate_argument_spec(
            argument_spec={
                "roles": {"type": "list", "elements": "str", "required": True},
                "model_servers": {"type": "list", "elements": "str", "default": []},
                "skipped_checks": {"type": "list", "elements": "str", "default": []},
                "report_dir": {"type": "str", "default": ""},
                "others": {"type": "list", "elements": "str", "default": []},
                "settled_hours": {"type": "float", "default": 24.0},
                "timeout_seconds": {"type": "float", "default": 4.0},
            }
        )
        arguments = plain(arguments)
        host = str(variables["inventory_hostname"])
        roles = known_roles()
        reader = Reader(self._templar, variables, roles, host)

        desired, survey, findings = self._look(arguments, reader, roles)
        findings = unknown_variables(variables, roles.values(), host) + findings + judge(desired, survey)
        findings += unknown_words("preflight_skipped_checks", arguments["skipped_checks"], CHECKS, host)
        findings += unknown_words("preflight_roles", arguments["roles"], roles, host)
        findings = without_secrets(findings, list(reader.secrets))
        errors, warnings = split(findings, arguments["skipped_checks"])

        data = as_json([*errors, *warnings])
        result.update(changed=False, engine=desired.engine.replace(NO_ENGINE, ""))
        if self._task.register:
            # Who registers wants data; everyone else reads the message, and should not read it twice.
            result["findings"] = data
        if survey is not None:
            # The survey saw it, so the playbook needn't ask the host again.
            result["ansible_facts"] = {
                "preflight_wsl": survey["wsl"]["is_wsl"],
                "preflight_settled": survey["settled"],
                "preflight_watched": self._watched(arguments, desired, survey, reader),
            }
        if survey is not None and desired.engine == "lmdeploy":
            result["tp"] = {instance.unit: dealt.tp for instance, dealt in layout(desired, survey)}
            result["gpus"] = {instance.unit: list(dealt.gpus) for instance, dealt in layout(desired, survey)}
        result["warnings"] = [block(warning) for warning in warnings]
        if arguments["report_dir"]:
            told = {"host": host, "engine": result["engine"], "passed": not errors, "findings": data, "survey": survey}
            text = json.dumps(told, indent=2, sort_keys=True)
            result["report"] = self._write(arguments["report_dir"], host, cleaned(text, reader.secrets))
        if errors:
            result.update(failed=True, msg=report(errors, host))
        return result

    def _look(
        self, arguments: dict[str, Any], reader: Reader, roles: Mapping[str, Role]
    ) -> tuple[Desired, Survey | None, list[Finding]]:
        """Return the wish, the survey that it asks for, and the faults of values and survey.

        With ``api_server_engine: auto`` the survey tells the engine, and only that engine's role counts.
        """
        named = frozenset(arguments["roles"]) & roles.keys()
        read = {
            name: reader.read(roles[name]) for name in [*sorted(named), *(ENGINES if "api_server" in named else ())]
        }
        wanted = str(read["api_server"].found.get("api_server_engine", NO_ENGINE)) if "api_server" in named else ""
        engine = "" if wanted == "auto" else wanted
        peers = tuple(self._peers(arguments["model_servers"], reader, read, roles))
        fellows = tuple(self._fellows(reader, read, roles))

        def wish(offset: float = 0.0) -> Desired:
            taken = named | ({engine} & read.keys())
            asked = taken if engine else read.keys()
            values = {name: value for role in sorted(asked) for name, value in read[role].found.items()}
            return self._with_files(Desired(reader.host, taken, values, engine, {}, None, peers, offset, fellows))

        first = wish()
        request = {
            **survey_request(first),
            "timeout_seconds": arguments["timeout_seconds"],
            "ca_pem": self._ca(first),
            "watched": watched(first),
        }
        survey, offset, findings = self._survey(request, reader)
        if survey is not None and wanted == "auto":
            engine = resolve_engine(wanted, survey)
        desired = wish(offset)
        # Faults of an engine that is not taken are none.
        return desired, survey, [found for role in sorted(desired.roles) for found in read[role].findings] + findings

    def _watched(self, arguments: dict[str, Any], desired: Desired, survey: Survey, reader: Reader) -> dict[str, Any]:
        """Return what tells whether the host is as a whole run left it, and wanted as it was then."""
        # The firewall's variables are judged by its role alone, but count here.
        firewall = reader.read(known_roles()["firewall"]).found
        values = {name: value for name, value in desired.values.items() if not name.startswith("preflight_")}
        files = {text: found for text in {*texts(values), *texts(firewall)} if (found := self._file(text))}
        wanted = digest(
            code(),
            sorted(desired.roles),
            arguments["model_servers"],
            [values, firewall, files],
            plain(of_the_inventory(reader.task_vars)),
            hardware(survey),
        )
        return {
            **survey["watch"],
            "run": RUN,
            "wanted": "" if always_looked_at(desired, survey) else wanted,
            "watched": watched(desired),
            "others": arguments["others"],
            "hours": arguments["settled_hours"],
        }

    def _file(self, text: str) -> str:
        """Return a digest of the file of the controller that a value names, '' where it names none."""
        if not text or len(text) > 1000 or "\n" in text or "\0" in text:
            return ""
        try:
            path = Path(self._loader.path_dwim(text))
            return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        except (OSError, ValueError):
            return ""  # no path at all, such as text that is no Unicode

    def _with_files(self, desired: Desired) -> Desired:
        """Return the wish with the files of the controller that belong to it: locks and the command line's facts."""
        locks: dict[str, str | None] = {}
        for environment in ENVIRONMENTS:
            path = desired.text(environment.lock_variable)
            if environment.role in desired.roles and path:
                locks[environment.lock_variable] = self._text(path)
        known = self._text(str(ROLES / "lmdeploy/files/cli" / f"{desired.text('lmdeploy_version') or '-'}.json"))
        return replace(desired, locks=locks, command_line=json.loads(known) if known else None)

    def _text(self, path: str) -> str | None:
        """Return the text of a file on the controller, None where there is none."""
        try:
            return Path(self._loader.path_dwim(path)).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return None

    def _ca(self, desired: Desired) -> str:
        """Return the certificates that the role mirrors will make the host trust."""
        path = desired.text("mirrors_ca_file")
        return (self._text(path) or "") if path else ""

    def _peers(
        self, model_servers: list[str], reader: Reader, read: Mapping[str, Read], roles: Mapping[str, Role]
    ) -> Iterable[Peer]:
        """Yield where the engines of other hosts listen, as far as this host is to find them by itself."""
        role, variable = (
            ("gateway", "gateway_engines") if "gateway" in read else ("open_webui", "open_webui_connections")
        )
        if role not in read or read[role].found.get(variable):
            return
        default = roles["api_server"].defaults.get("api_server_host", "")
        for name in model_servers:
            try:
                others = reader.task_vars["hostvars"][name]
                plain_host = str(others.get("api_server_host", default))
                instances = others.get("api_server_instances") or []
                listens = [str(entry.get("host") or plain_host) for entry in instances] or [plain_host]
            except (AnsibleError, KeyError, AttributeError):
                continue  # that host's own preflight reports what is wrong with its variables
            yield Peer(str(name), tuple(listens))

    def _fellows(self, reader: Reader, read: Mapping[str, Read], roles: Mapping[str, Role]) -> Iterable[Fellow]:
        """Yield the hosts that serve one model together with this one, itself among them; mostly there are none."""
        nodes = set(read["api_server"].found.get("api_server_nodes") or []) if "api_server" in read else set()
        defaults = {name: value for role in roles.values() for name, value in role.defaults.items()}
        for name in plain(reader.task_vars.get("groups", {})).get("model_servers", []) if nodes else []:
            try:
                others = reader.task_vars["hostvars"][name]
                if nodes & set(plain(others.get("api_server_nodes") or [])):
                    values = {
                        variable: shown(variable, plain(others.get(variable, defaults.get(variable))))
                        for variable in ALIKE
                    }
                    yield Fellow(str(name), str(others.get("ansible_host", name)), values)
            except (AnsibleError, KeyError, AttributeError, TypeError):
                continue  # that host's own preflight reports what is wrong with its variables

    def _survey(self, request: dict[str, Any], reader: Reader) -> tuple[Survey | None, float, list[Finding]]:
        """Return the survey and how far the host's clock is ahead; without a survey, a finding says why."""
        before = time.time()
        answer = self._execute_module(
            module_name="selfhost.lmdeploy.host_survey", module_args=request, task_vars=reader.task_vars
        )
        survey = plain(answer.get("survey"))
        if survey:
            survey["urls"] = dict(zip(request["urls"], survey["urls"], strict=True))
            return survey, survey["time"] - before, []
        said = " ".join(str(answer.get(key) or "") for key in ("msg", "module_stderr", "module_stdout")).split()
        why = "The host could not be looked at: " + " ".join(said)
        fix = "The host needs Python 3.10 or later (apt install python3); ansible_python_interpreter names another one."
        return None, 0.0, [finding("survey", "ansible_host", reader.host, reader.host, why, fix)]

    def _write(self, folder: str, host: str, text: str) -> str:
        """Write the report on the controller, for its owner only, and return its path."""
        target = Path(self._loader.path_dwim(folder)) / f"{host}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:  # noqa: PTH123 a mode from the start
            file.write(text + "\n")
        return str(target)
