# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""What the inventory wants of one host, in the form that the checks judge, and the finding that a check makes.

Pure, no Ansible. Values have passed their role's argument spec; one that didn't is missing here, and reported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ansible_collections.selfhost.lmdeploy.plugins.module_utils.engine import UNIT, EngineFault, model_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

# The engine of a host whose api_server_engine is no engine's name.
NO_ENGINE = "none"
ERROR = "error"
WARNING = "warning"
HIDDEN = "(hidden)"
GATEWAY_UNIT = "haproxy.service"
RAY_UNIT = "ray.service"
LOOPBACK = re.compile(r"127\.\d+\.\d+\.\d+|::1|localhost")
WILDCARDS = frozenset({"0.0.0.0", "::", "[::]", "*", ""})  # noqa: S104 compared with, not bound to
SECRET_NAME = re.compile(r"(password|passphrase|api_?keys?|token|secret|secret_key|credentials?)$", re.IGNORECASE)
CREDENTIALS_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")


@dataclass(frozen=True)
class Finding:
    """One fault: which check found it, in which variable, why it is one, and the way out."""

    check: str
    severity: str
    variable: str
    value: str
    host: str
    message: str
    fix: str


@dataclass(frozen=True)
class Environment:
    """One conda environment of ours: the variables that say what is in it, and the room that it takes."""

    role: str
    name_variable: str
    version_variable: str
    lock_variable: str
    package: str


ENVIRONMENTS = (
    Environment("lmdeploy", "lmdeploy_env_name", "lmdeploy_version", "lmdeploy_lock", "lmdeploy"),
    Environment("llama_cpp", "llama_cpp_env_name", "llama_cpp_version", "llama_cpp_lock", "xllamacpp"),
    Environment("open_webui", "open_webui_env_name", "open_webui_version", "open_webui_lock", "open-webui"),
)


@dataclass(frozen=True)
class Instance:
    """One engine process. A setting that the instance doesn't name comes from the plain ``api_server_`` variable."""

    index: int
    own: Mapping[str, Any]
    plain: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """Return a setting, None where nobody gives it."""
        return self.own[key] if self.own.get(key) is not None else self.plain.get(f"api_server_{key}")

    def text(self, key: str) -> str:
        """Return a setting as text, '' where nobody gives it."""
        value = self.get(key)
        return "" if value is None else str(value)

    def whole(self, key: str) -> int | None:
        """Return a setting that is a number, None where it is none."""
        return whole(self.get(key))

    def items(self, key: str) -> list[Any]:
        """Return a setting that is a list."""
        value = self.get(key)
        return list(value) if isinstance(value, list | tuple) else []

    def flags(self) -> Iterator[tuple[str, str]]:
        """Yield (flag, first value) of the extra arguments."""
        words = [str(word) for word in self.items("extra_args")]
        for word, following in zip(words, [*words[1:], ""], strict=False):
            if word.startswith("-") and not re.fullmatch(r"-\d+(\.\d+)?", word):
                flag, equals, value = word.partition("=")
                yield flag, value if equals else following

    def variable(self, key: str) -> str:
        """Return the name under which a person finds the setting."""
        if self.index >= 0 and self.own.get(key) is not None:
            return f"{self.entry}.{key}"
        return f"api_server_{key}"

    @property
    def entry(self) -> str:
        """What people call an entry of the list: its name, or its place where it has none."""
        return f"api_server_instances[{self.own.get('name') or self.index}]"

    @property
    def unit(self) -> str:
        """The systemd unit that runs it."""
        return f"{UNIT}-{self.own.get('name', '')}.service" if self.index >= 0 else f"{UNIT}.service"


@dataclass(frozen=True)
class Peer:
    """Another host's engines, as far as a web host needs them: where they listen."""

    host: str
    listens: tuple[str, ...]


# What must be the same on all hosts that serve one model together.
ALIKE = (
    "api_server_nodes",
    "api_server_nodes_port",
    "api_server_model",
    "api_server_model_revision",
    "api_server_backend",
    "api_server_tp",
    "lmdeploy_version",
    "ray_port",
)


@dataclass(frozen=True)
class Fellow:
    """A host that serves one model together with others: its address, and its values of ALIKE as texts."""

    host: str
    address: str
    values: Mapping[str, str]


@dataclass(frozen=True)
class Desired:
    """All that a host is to become. ``locks`` holds the text of each lock file, None where the file is missing."""

    host: str
    roles: frozenset[str]
    values: Mapping[str, Any]
    engine: str = ""
    locks: Mapping[str, str | None] = field(default_factory=dict)
    command_line: Mapping[str, Any] | None = None
    peers: tuple[Peer, ...] = ()
    clock_offset_seconds: float = 0.0
    fellows: tuple[Fellow, ...] = ()

    def fault(self, check: str, variable: str, value: Any, message: str, fix: str) -> Finding:
        """Return an error."""
        return Finding(check, ERROR, variable, shown(variable, value), self.host, message, fix)

    def warning(self, check: str, variable: str, value: Any, message: str, fix: str) -> Finding:
        """Return a warning, which is shown and stops nothing."""
        return Finding(check, WARNING, variable, shown(variable, value), self.host, message, fix)

    def text(self, name: str) -> str:
        """Return a variable as text, '' where it is not there."""
        value = self.values.get(name)
        return "" if value is None else str(value)

    def items(self, name: str) -> list[Any]:
        """Return a variable that is a list."""
        value = self.values.get(name)
        return list(value) if isinstance(value, list | tuple) else []

    @property
    def engines(self) -> tuple[str, ...]:
        """The engine, or both where the survey must still tell which one ``auto`` means."""
        if "api_server" not in self.roles:
            return ()
        return (self.engine,) if self.engine else ("lmdeploy", "llama_cpp")

    @property
    def instances(self) -> list[Instance]:
        """The engine processes; none on a host without an engine."""
        if "api_server" not in self.roles:
            return []
        listed = [entry for entry in self.items("api_server_instances") if isinstance(entry, dict)]
        if not listed:
            return [Instance(-1, {}, self.values)]
        return [Instance(index, entry, self.values) for index, entry in enumerate(listed)]

    @property
    def environments(self) -> list[Environment]:
        """The conda environments that the roles make here."""
        wanted = set(self.engines) | (self.roles & {"open_webui"})
        return [entry for entry in ENVIRONMENTS if entry.role in wanted]

    @property
    def units(self) -> frozenset[str]:
        """The systemd units that are to run here."""
        engines = {instance.unit for instance in self.instances}
        others = {"open_webui": "open-webui.service", "gateway": GATEWAY_UNIT, "ray": RAY_UNIT}
        return frozenset(engines | {unit for role, unit in others.items() if role in self.roles})

    def endpoints(self) -> Iterator[tuple[str, int | None, str, str]]:
        """Yield (variable, port, address, unit) of everything that will listen."""
        for instance in self.instances:
            yield instance.variable("port"), instance.whole("port"), instance.text("host"), instance.unit
            offset, port = whole(self.values.get("api_server_twin_port_offset")), instance.whole("port")
            if offset and port:
                twin = instance.unit.replace(".service", "-twin.service")
                yield "api_server_twin_port_offset", port + offset, instance.text("host"), twin
        if self.instances and self.items("api_server_nodes"):
            unit, everywhere = self.instances[0].unit, "0.0.0.0"  # noqa: S104 as these programs listen
            if "ray" in self.roles:
                yield "ray_port", whole(self.values.get("ray_port")), everywhere, RAY_UNIT
            else:
                yield "api_server_nodes_port", whole(self.values.get("api_server_nodes_port")), everywhere, unit
        if "open_webui" in self.roles:
            port = whole(self.values.get("open_webui_port"))
            yield "open_webui_port", port, self.text("open_webui_host"), "open-webui.service"
        if "gateway" in self.roles:
            yield "gateway_port", whole(self.values.get("gateway_port")), self.text("gateway_host"), GATEWAY_UNIT
            for name in ("gateway_local_port", "gateway_metrics_port"):
                yield name, whole(self.values.get(name)), "127.0.0.1", GATEWAY_UNIT

    def environment_path(self, environment: Environment) -> str:
        """Return the path that a person activates."""
        return f"{self.text('miniconda_prefix')}/envs/{self.text(environment.name_variable)}"

    def model_path(self, model: str) -> str:
        """Return where a model is on the host; '' for what is no model at all, which the engine's own rules report."""
        try:
            return model_path(model, self.text("api_server_models_dir") or self.text("model_weights_dir"))
        except EngineFault:
            return ""


def whole(value: Any) -> int | None:
    """Return a value as a whole number, None where it is none; numbers in quotes count."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?\d+", value) else None


def is_power_of_two(number: int) -> bool:
    """Tell whether a number is 1, 2, 4, 8, ..."""
    return number > 0 and number & (number - 1) == 0


def version_key(text: str) -> tuple[int, ...] | None:
    """Return a version of numbers and dots as something that compares, None for any other text."""
    return tuple(int(part) for part in text.split(".")) if re.fullmatch(r"\d+(\.\d+)+", text) else None


def overlaps(first: str, second: str) -> bool:
    """Tell whether two addresses can't listen on the same port."""
    spelled = {"localhost": "127.0.0.1"}
    one, other = spelled.get(first, first), spelled.get(second, second)
    return one == other or one in WILDCARDS or other in WILDCARDS


def shown(name: str, value: Any) -> str:
    """Return a value for people: on one line, short, and without any secret."""
    masked = _masked(name, value)
    # A word is shown as it is; what holds blanks, quotes or what can't be seen gets the quotes and escapes of repr().
    is_word = isinstance(masked, str) and re.fullmatch(r"[!-&(-~]+", masked) is not None
    text = str(masked) if is_word or masked == HIDDEN else repr(masked)
    return text if len(text) <= 200 else f"{text[:190]}... ({len(text)} characters)"


def _masked(name: str, value: Any) -> Any:
    if SECRET_NAME.search(name) and value not in (None, "", [], {}):
        return HIDDEN
    if isinstance(value, dict):
        return {str(key): _masked(str(key), entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_masked("", entry) for entry in value]
    return CREDENTIALS_IN_URL.sub("***@", str(value)) if isinstance(value, str) else value


def secrets_in(name: str, value: Any) -> Iterator[str]:
    """Yield every secret text in a variable, so that messages made by others can be cleaned of it."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from secrets_in(str(key) if not SECRET_NAME.search(name) else name, entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from secrets_in(name, entry)
    elif isinstance(value, str) and SECRET_NAME.search(name) and len(value) >= 4:
        yield str(value)


def cleaned(text: str, secrets: Iterable[str]) -> str:
    """Return a text without secrets and without user names and passwords of addresses."""
    for secret in sorted(set(secrets), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return CREDENTIALS_IN_URL.sub("***@", text)
