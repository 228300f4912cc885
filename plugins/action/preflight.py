# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Controller side of M(selfhost.lmdeploy.preflight): values and specs, one survey of the host, one judgement."""

from __future__ import annotations

import json
import os
import time
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ansible.errors import AnsibleError
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase
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
    ENVIRONMENTS,
    HIDDEN,
    SECRET_NAME,
    Desired,
    Finding,
    Peer,
    cleaned,
    secrets_in,
    shown,
)
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_gpu import resolve_engine, tp_of
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_host import survey_request

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_survey import Survey

ROLES = Path(__file__).resolve().parents[2] / "roles"
ENGINES = ("lmdeploy", "llama_cpp")
# Facts that roles set for those that run after them; nobody writes them into an inventory.
GIVEN_BY_ROLES = frozenset({"api_server_engine_resolved", "conda_env_release_prefix", "lmdeploy_release_prefix"})


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


def unknown_variables(variables: Mapping[str, Any], roles: Iterable[Role], host: str) -> list[Finding]:
    """Return a finding for each variable that carries a role's prefix and that no role knows."""
    known = set(GIVEN_BY_ROLES)
    prefixes: list[str] = []
    for role in roles:
        known |= role.options.keys() | role.defaults.keys() | role.internal.keys()
        prefixes.append(f"{role.name}_")
    found = []
    for name in sorted(variables):
        if not name.startswith(tuple(prefixes)) or name in known:
            continue
        near = get_close_matches(name, known - GIVEN_BY_ROLES, n=1, cutoff=0.8)
        fix = f"Did you mean {near[0]}?" if near else "Take it out, or give your own variables another beginning."
        why = "No role knows this variable, so it would be ignored in silence."
        found.append(Finding("variable_unknown", "error", name, shown(name, plain(variables[name])), host, why, fix))
    return found


def checked(name: str, option: Mapping[str, Any], value: Any) -> tuple[Any, list[str]]:
    """Return a value as its argument spec understands it, and what the spec has against it."""
    spec = {key: entry for key, entry in plain(option).items() if key not in {"default", "required"}}
    outcome = ArgumentSpecValidator({name: spec}).validate({name: value})
    return plain(outcome.validated_parameters.get(name)), list(outcome.error_messages)


class Values:
    """The variables of roles, computed as the roles will see them, with the faults found on the way."""

    def __init__(self, templar: Any, task_vars: dict[str, Any], roles: Mapping[str, Role], host: str) -> None:
        """Prepare to compute: roles' defaults below, then the inventory, then roles' internal variables."""
        self.task_vars = task_vars
        self.host = host
        self.variables: dict[str, Any] = {}
        for role in roles.values():
            self.variables.update(role.defaults)
        self.variables.update(task_vars)
        for role in roles.values():
            self.variables.update(role.internal)
        self.templar = templar
        self.found: dict[str, Any] = {}
        self.findings: list[Finding] = []
        self.secrets: set[str] = set()

    def fault(self, check: str, name: str, value: Any, message: str, fix: str) -> None:
        """Keep a finding."""
        desired = Desired(self.host, frozenset(), {})
        self.findings.append(desired.fault(check, name, value, message, fix))

    def read(self, role: Role) -> None:
        """Compute and check every variable of a role."""
        templar = self.templar.copy_with_new_env(available_variables={**self.variables, "role_path": str(role.path)})
        for name, option in role.options.items():
            if name not in self.variables or name in self.found:
                continue
            try:
                value = plain(templar.template(self.variables[name]))
            except AnsibleError as error:
                # A default that needs what only its role knows is the role's own affair.
                if name in self.task_vars:
                    fix = f"Correct the expression in {name}; each variable that it names must have a value."
                    self.fault("variable_template", name, "(an expression)", str(error), fix)
                continue
            self.secrets.update(secrets_in(name, value))
            if option.get("no_log") and isinstance(value, str) and len(value) >= 4:
                self.secrets.add(value)
            value, messages = checked(name, option, value)
            if not messages:
                self.found[name] = value
                continue
            hidden = bool(option.get("no_log")) or SECRET_NAME.search(name)
            why = "The value does not fit." if hidden else " ".join(messages)
            choices = ", ".join(str(choice) for choice in option.get("choices") or [])
            fix = (
                f"Take one of: {choices}."
                if choices
                else f"Give it as {option.get('type', 'str')}; see the role's page."
            )
            self.fault("variable_invalid", name, HIDDEN if hidden else value, f"{why}.".replace("..", "."), fix)


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
                "timeout_seconds": {"type": "float", "default": 4.0},
            }
        )
        arguments = plain(arguments)
        host = str(variables["inventory_hostname"])
        roles = {path.name: Role(path.name, self._loader) for path in sorted(ROLES.iterdir()) if path.is_dir()}
        values = Values(self._templar, variables, roles, host)
        desired = self._desired(arguments, values, roles)

        request = {**survey_request(desired), "timeout_seconds": arguments["timeout_seconds"]}
        request["ca_pem"] = self._ca(desired)
        survey, offset = self._survey(request, variables, values)
        if survey is not None and not desired.engine and "api_server" in desired.roles:
            engine = resolve_engine(desired.text("api_server_engine"), survey)
            desired = self._with_engine(desired, engine, values, roles, offset)
        elif survey is not None:
            desired = self._with_engine(desired, desired.engine, values, roles, offset)

        findings = unknown_variables(variables, roles.values(), host)
        findings += self._skipped(arguments["skipped_checks"], host)
        findings += values.findings + judge(desired, survey)
        findings = without_secrets(findings, list(values.secrets))
        errors, warnings = split(findings, arguments["skipped_checks"])

        findings_as_data = as_json([*errors, *warnings])
        result.update(changed=False, engine=desired.engine)
        if self._task.register:
            # Who registers wants data; everyone else reads the message, and should not read it twice.
            result["findings"] = findings_as_data
        if survey is not None and desired.engine == "lmdeploy":
            result["tp"] = {instance.unit: tp_of(instance, survey) for instance in desired.instances}
        result["warnings"] = [block(finding) for finding in warnings]
        if arguments["report_dir"]:
            told = {"host": host, "engine": desired.engine, "passed": not errors, "findings": findings_as_data}
            text = json.dumps({**told, "survey": survey}, indent=2, sort_keys=True)
            result["report"] = self._write(arguments["report_dir"], host, cleaned(text, values.secrets))
        if errors:
            result.update(failed=True, msg=report(errors, host))
        return result

    def _desired(self, arguments: dict[str, Any], values: Values, roles: Mapping[str, Role]) -> Desired:
        """Return what the inventory wants, as far as it is known before the survey."""
        wanted = frozenset(arguments["roles"])
        for name in sorted(wanted & roles.keys()):
            values.read(roles[name])
        engine = str(values.found.get("api_server_engine", "")) if "api_server" in wanted else ""
        candidates = (engine,) if engine in ENGINES else ENGINES if "api_server" in wanted else ()
        if len(candidates) == 1:
            wanted |= {engine}
        before = len(values.findings)
        for name in candidates:
            if name in roles:
                values.read(roles[name])
        if len(candidates) > 1:
            # Faults of an engine that auto may not take are none; the one it takes is read again.
            del values.findings[before:]
        return self._complete(
            Desired(
                values.host,
                wanted,
                dict(values.found),
                engine if engine in ENGINES else "",
                peers=tuple(self._peers(arguments["model_servers"], values, roles)),
            )
        )

    def _with_engine(
        self, desired: Desired, engine: str, values: Values, roles: Mapping[str, Role], offset: float
    ) -> Desired:
        """Return the wish with the engine that the survey decided, and the faults of that engine's variables."""
        if engine and engine not in desired.roles and engine in roles:
            for name in roles[engine].options:
                values.found.pop(name, None)
            values.read(roles[engine])
        return self._complete(
            Desired(
                desired.host,
                desired.roles | ({engine} if engine else set()),
                dict(values.found),
                engine,
                peers=desired.peers,
                clock_offset_seconds=offset,
            )
        )

    def _complete(self, desired: Desired) -> Desired:
        """Return the wish with the files of the controller that belong to it: locks and the command line's facts."""
        locks: dict[str, str | None] = {}
        for environment in ENVIRONMENTS:
            path = desired.text(environment.lock_variable)
            if environment.role in desired.roles and path:
                locks[environment.lock_variable] = self._text(path)
        known = self._text(str(ROLES / "lmdeploy/files/cli" / f"{desired.text('lmdeploy_version') or '-'}.json"))
        return Desired(
            desired.host,
            desired.roles,
            desired.values,
            desired.engine,
            locks,
            json.loads(known) if known else None,
            desired.peers,
            desired.clock_offset_seconds,
        )

    def _text(self, path: str) -> str | None:
        """Return the text of a file on the controller, None where there is none."""
        try:
            return Path(self._loader.path_dwim(path)).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None

    def _ca(self, desired: Desired) -> str:
        """Return the certificates that the role mirrors will make the host trust."""
        path = desired.text("mirrors_ca_file")
        return (self._text(path) or "") if path else ""

    def _peers(self, model_servers: list[str], values: Values, roles: Mapping[str, Role]) -> Iterable[Peer]:
        """Yield where the engines of other hosts listen."""
        default = roles["api_server"].defaults.get("api_server_host", "") if "api_server" in roles else ""
        for name in model_servers:
            try:
                others = values.task_vars["hostvars"][name]
                plain_host = str(others.get("api_server_host", default))
                instances = others.get("api_server_instances") or []
                listens = [str(entry.get("host") or plain_host) for entry in instances] or [plain_host]
            except (AnsibleError, KeyError, AttributeError):
                continue  # that host's own preflight reports what is wrong with its variables
            yield Peer(str(name), tuple(listens))

    def _survey(
        self, request: dict[str, Any], task_vars: dict[str, Any], values: Values
    ) -> tuple[Survey | None, float]:
        """Return the survey and how far the host's clock is ahead; without a survey, a finding says why."""
        before = time.time()
        answer = self._execute_module(
            module_name="selfhost.lmdeploy.host_survey", module_args=request, task_vars=task_vars
        )
        survey = plain(answer.get("survey"))
        if survey:
            return survey, survey["time"] - before
        said = " ".join(str(answer.get(key) or "") for key in ("msg", "module_stderr", "module_stdout")).split()
        fix = "The host needs Python 3.10 or later (apt install python3); ansible_python_interpreter names another one."
        values.fault("survey", "ansible_host", values.host, "The host could not be looked at: " + " ".join(said), fix)
        return None, 0.0

    def _skipped(self, names: list[str], host: str) -> list[Finding]:
        """Return a finding for each skipped check that does not exist."""
        found = []
        for name in names:
            if name not in CHECKS:
                near = get_close_matches(name, CHECKS, n=1)
                fix = f"Did you mean {near[0]}?" if near else "The role's page lists the checks."
                why = "There is no check of this name, so nothing would be skipped."
                found.append(Finding("variable_invalid", "error", "preflight_skipped_checks", name, host, why, fix))
        return found

    def _write(self, folder: str, host: str, text: str) -> str:
        """Write the report on the controller, for its owner only, and return its path."""
        target = Path(self._loader.path_dwim(folder)) / f"{host}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:  # noqa: PTH123 a mode from the start
            file.write(text + "\n")
        return str(target)
