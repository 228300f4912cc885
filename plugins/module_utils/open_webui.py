# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Open WebUI's configuration as pure functions: what is wrong with it, and the environment that says it.

Names and meanings are those of Open WebUI 0.12 (its env.py and config.py).
"""

from __future__ import annotations

import ipaddress
import posixpath
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from ansible_collections.selfhost.lmdeploy.plugins.module_utils.addresses import split_address
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.environment_file import NAME, text_of
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.webui_backup import LIBPQ

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Older ones let a user run code and take over chats (CVE-2026-45349, CVE-2026-45395); 0.12.4 is what was tested.
VERSION_FLOOR = (0, 12, 4)
PASSWORD_CHARACTERS_MIN = 12
# bcrypt reads no more, and Open WebUI refuses what is longer.
PASSWORD_BYTES_MAX = 72
SECRET_KEY_BYTES_MIN = 32

# What open_webui_settings must not set, and the variable of the role to use instead, or the reason that there is none.
OWNERS = {
    "BYPASS_MODEL_ACCESS_CONTROL": "open_webui_models_public",
    "DATABASE_HOST": "open_webui_database_url",
    "DATABASE_NAME": "open_webui_database_url",
    "DATABASE_PASSWORD": "open_webui_database_url",
    "DATABASE_PORT": "open_webui_database_url",
    "DATABASE_SCHEMA": "backups save the schema public",
    "DATABASE_TYPE": "open_webui_database",
    "DATABASE_URL": "open_webui_database_url",
    "DATABASE_USER": "open_webui_database_url",
    "DATA_DIR": "open_webui_data_dir",
    "DEFAULT_MODELS": "open_webui_default_models",
    "ENABLE_OLLAMA_API": "open_webui_ollama_urls",
    "ENABLE_OPENAI_API": "open_webui_connections",
    "ENABLE_PERSISTENT_CONFIG": "the variables are the one place of configuration",
    "ENABLE_SIGNUP": "open_webui_signup_enabled",
    "FORWARDED_ALLOW_IPS": "open_webui_trusted_proxies",
    "HOST": "open_webui_host",
    "OFFLINE_MODE": "open_webui_offline",
    "OLLAMA_BASE_URL": "open_webui_ollama_urls",
    "OLLAMA_BASE_URLS": "open_webui_ollama_urls",
    "OPENAI_API_BASE_URL": "open_webui_connections",
    "OPENAI_API_BASE_URLS": "open_webui_connections",
    "OPENAI_API_CONFIGS": "open_webui_connections",
    "OPENAI_API_KEY": "open_webui_connections",
    "OPENAI_API_KEYS": "open_webui_connections",
    "PORT": "open_webui_port",
    "STATIC_DIR": "open_webui_static_dir",
    "USE_SLIM_DOCKER": "open_webui_profile",
    "WEBUI_AUTH": "the admin's account stands in the way, and without accounts anybody who comes by is admin",
    "WEBUI_ADMIN_EMAIL": "open_webui_admin_email",
    "WEBUI_ADMIN_NAME": "open_webui_admin_name",
    "WEBUI_ADMIN_PASSWORD": "open_webui_admin_password",
    "WEBUI_SECRET_KEY": "open_webui_secret_key",
    "WEBUI_URL": "open_webui_url",
}

# Closed or quiet unless open_webui_settings says otherwise: code from the net, code in chats, calls home.
CLOSED: dict[str, Any] = {
    "AIOHTTP_CLIENT_TIMEOUT_MODEL_LIST": 3,
    "ANONYMIZED_TELEMETRY": False,
    "DO_NOT_TRACK": True,
    "ENABLE_CODE_EXECUTION": False,
    "ENABLE_CODE_INTERPRETER": False,
    "ENABLE_COMMUNITY_SHARING": False,
    "ENABLE_PIP_INSTALL_FRONTMATTER_REQUIREMENTS": False,
    "ENABLE_PLUGINS": False,
    "ENABLE_VERSION_UPDATE_CHECK": False,
    "ENV": "prod",
    "RAG_EMBEDDING_MODEL_TRUST_REMOTE_CODE": False,
    "RAG_RERANKING_MODEL_TRUST_REMOTE_CODE": False,
    "SCARF_NO_ANALYTICS": True,
}

# A browser sends some 26 built-in tools with each chat, which LMDeploy refuses unless it has a parser for them.
WITHOUT_TOOLS: dict[str, Any] = {
    "DEFAULT_MODEL_METADATA": {"capabilities": {"builtin_tools": False}},
    "DEFAULT_MODEL_PARAMS": {"function_calling": "legacy"},
}

# Variables that are text, also where they look like numbers.
TEXTS = (
    "admin_email", "admin_name", "admin_password", "data_dir", "database_url", "host", "profile", "secret_key",
    "static_dir", "url", "version",
)  # fmt: skip
CONNECTION_TEXTS = ("url", "api_key", "prefix")

# What ProtectHome= and PrivateTmp= keep from the unit.
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - nothing is written there
INSTALLERS = ("PIP_", "UV_", "CONDA_")


def connection_url(url: str) -> str:
    """Return the address as Open WebUI wants it: no slash at its end, and ``/v1`` where no path is given.

    Raises ValueError with the fault where it is no address of an HTTP server.
    """
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https"):
        raise ValueError("has no scheme: write http:// or https:// before it")
    if not parts.hostname:
        raise ValueError("names no host")
    if parts.query or parts.fragment or ";" in url or any(char.isspace() for char in parts.geturl()):
        raise ValueError("must end with its path: no query, no fragment, no semicolon, no space")
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0:
        raise ValueError("has a port that is not between 1 and 65535")
    return urlunsplit(parts._replace(path=parts.path.rstrip("/") or "/v1"))


def ollama_url(url: str) -> str:
    """Return the address of an Ollama server without a slash at its end; the same faults as ``connection_url``."""
    cleaned = connection_url(url)
    return cleaned[: -len("/v1")] if urlsplit(url.strip()).path in ("", "/") else cleaned


def database_url(url: str) -> str:
    """Return a database's address with the driver that Open WebUI has in all profiles, psycopg 3.

    SQLAlchemy would take its predecessor. Raises ValueError with the fault, which shows nothing of the address.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("postgresql", "postgres"):
        raise ValueError("does not begin with postgresql://")
    if re.search(r"[^!#%&()*+,./:;=?@\[\]^_{|}~0-9A-Za-z-]", url):
        raise ValueError("has a character that an address can't hold: write it as %, then its two hexadecimal digits")
    try:
        named = (parts.hostname or "host=" in parts.query) and parts.port != 0
    except ValueError:
        named = False
    if not named or not parts.username or not parts.path.strip("/"):
        raise ValueError("must name account, host and database, and no port or one between 1 and 65535")
    unknown = [name for name, _value in parse_qsl(parts.query, keep_blank_values=True) if name not in LIBPQ]
    if unknown:
        raise ValueError(f"has the parameter {unknown[0]}, known are {', '.join(LIBPQ)}")
    return f"postgresql+psycopg://{url.partition('://')[2]}"


def as_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables with numbers as text where text is meant: a password of digits alone is a number in YAML."""

    def texts(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        return {n: str(v) if n in names and isinstance(v, int | float) else v for n, v in values.items()}

    connections = [texts(entry, CONNECTION_TEXTS) for entry in config["connections"]]
    return {**texts(config, TEXTS), "connections": connections}


def merged(default: Any, given: Any) -> Any:
    """Return ``given`` over ``default``: dicts key by key, everything else replaced."""
    if isinstance(default, dict) and isinstance(given, dict):
        return {**default, **{key: merged(default.get(key), value) for key, value in given.items()}}
    return given


def environment(config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return Open WebUI's environment from the role's variables (names without their prefix).

    ``variables`` holds what may be shown, ``secrets`` the keys of the connections and the database's address. The
    secret key and the admin's password are not here: they are made on the host and don't leave it.
    """
    config = as_text(config)
    connections: Sequence[Mapping[str, Any]] = config["connections"]
    values: dict[str, Any] = {
        **CLOSED,
        **({} if config["builtin_tools_enabled"] else WITHOUT_TOOLS),
        **({"CORS_ALLOW_ORIGIN": _origin(config["url"])} if config["url"] else {}),
        "WEBUI_SESSION_COOKIE_SECURE": config["url"].startswith("https://"),
    }
    for name, value in config["settings"].items():
        values[name] = merged(values.get(name), value)
    # What tells pip, uv and conda where to fetch is nothing that the service needs.
    passed = {name: value for name, value in config["environment"].items() if not name.startswith(INSTALLERS)}
    values.update(passed)
    values.update(_bypass(passed, [entry["url"] for entry in connections] + list(config["ollama_urls"])))
    values.update(
        {
            "BYPASS_MODEL_ACCESS_CONTROL": config["models_public"],
            "DATA_DIR": config["data_dir"],
            "ENABLE_OLLAMA_API": bool(config["ollama_urls"]),
            "ENABLE_OPENAI_API": bool(connections),
            "ENABLE_PERSISTENT_CONFIG": False,
            "ENABLE_SIGNUP": config["signup_enabled"],
            "FORWARDED_ALLOW_IPS": ",".join(config["trusted_proxies"]),
            "OFFLINE_MODE": config["offline"],
            "OPENAI_API_BASE_URLS": ";".join(connection_url(entry["url"]) for entry in connections),
            "OPENAI_API_CONFIGS": {str(index): _connection(entry) for index, entry in enumerate(connections)},
            "STATIC_DIR": config["static_dir"],
            "USE_SLIM_DOCKER": config["profile"] == "slim",
            "WEBUI_ADMIN_EMAIL": config["admin_email"],
            "WEBUI_ADMIN_NAME": config["admin_name"],
        }
    )
    if config["ollama_urls"]:
        values["OLLAMA_BASE_URLS"] = ";".join(ollama_url(url) for url in config["ollama_urls"])
    if config["default_models"]:
        values["DEFAULT_MODELS"] = ",".join(config["default_models"])
    if config["url"]:
        values["WEBUI_URL"] = config["url"].rstrip("/")
    secrets = {"OPENAI_API_KEYS": ";".join(entry.get("api_key") or "" for entry in connections)}
    if config["database"] == "postgresql" and config["database_url"]:
        secrets["DATABASE_URL"] = database_url(config["database_url"])
    return {
        "variables": {name: text_of(value) for name, value in values.items() if value is not None},
        "secrets": secrets,
    }


def faults(config: Mapping[str, Any]) -> list[str]:
    """Return every fault of the role's variables, each as one sentence with variable, value and way out."""
    config = as_text(config)
    return [
        *_version_faults(config),
        *_address_faults(config),
        *_connection_faults(config),
        *_account_faults(config),
        *_database_faults(config),
        *_folder_faults(config),
        *_settings_faults(config),
    ]


def _origin(url: str) -> str:
    """Return scheme, host and port of an address: what a browser sends as Origin."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _connection(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return how Open WebUI is to use one connection."""
    return {
        "enable": True,
        "model_ids": list(entry.get("models") or []),
        "prefix_id": entry.get("prefix") or "",
        "connection_type": "local" if _is_local(connection_url(entry["url"])) else "external",
        "auth_type": "bearer" if entry.get("api_key") else "none",
    }


def _bypass(environment: Mapping[str, Any], urls: Sequence[str]) -> dict[str, str]:
    """Return what keeps the own network's servers from being asked through the proxy that leads to the internet."""
    if not any(name.lower() in ("http_proxy", "https_proxy") for name in environment):
        return {}
    given = str(environment.get("NO_PROXY") or environment.get("no_proxy") or "")
    local = [urlsplit(url.strip()).hostname or "" for url in urls if _is_local(url.strip())]
    hosts = [*(host.strip() for host in given.split(",")), "localhost", "127.0.0.1", "::1", *local]
    bypass = ",".join(dict.fromkeys(host for host in hosts if host))
    return {"NO_PROXY": bypass, "no_proxy": bypass}


def _is_local(url: str) -> bool:
    """Tell whether a server stands in the own network: the UI marks it so, and keeps its title tasks there."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host


def _version_faults(config: Mapping[str, Any]) -> list[str]:
    version = str(config["version"])
    if re.fullmatch(r"\d+\.\d+\.\d+", version) is None:
        return [f"open_webui_version is {version!r}, not a release such as 0.12.4"]
    if tuple(int(part) for part in version.split(".")) < VERSION_FLOOR:
        floor = ".".join(str(part) for part in VERSION_FLOOR)
        return [
            f"open_webui_version {version} is below {floor}, and older ones have known holes: take {floor} or later"
        ]
    return []


def _address_faults(config: Mapping[str, Any]) -> list[str]:
    found = []
    if not 1 <= int(config["port"]) <= 65535:
        found.append(f"open_webui_port is {config['port']}: take one between 1 and 65535")
    if not re.fullmatch(r"[A-Za-z0-9.:-]+", config["host"]):
        found.append(
            f"open_webui_host is {config['host']!r}: give an address or name, 127.0.0.1 or 0.0.0.0 for example"
        )
    page = split_address(config["url"])
    if config["url"] and (page.scheme not in ("http", "https") or not page.hostname):
        found.append(
            f"open_webui_url is {config['url']!r}: give the whole address, https://chat.example.org for example"
        )
    return found


def _connection_faults(config: Mapping[str, Any]) -> list[str]:
    found = []
    seen: dict[tuple[str, str], int] = {}
    for index, entry in enumerate(config["connections"]):
        name = f"open_webui_connections[{index}]"
        if fault := _url_fault(entry["url"]):
            found.append(f"{name}.url is {entry['url']!r} and {fault}")
            continue
        key = entry.get("api_key") or ""
        if ";" in key or key != key.strip() or not key.isprintable():
            found.append(
                f"{name}.api_key has a semicolon, an outer space or a control character, where Open WebUI cuts it"
            )
        url = connection_url(entry["url"])
        first = seen.setdefault((url, entry.get("prefix") or ""), index)
        if first != index:
            found.append(
                f"{name}.url is {url!r}, as open_webui_connections[{first}] already is: drop one or give it a prefix"
            )
    found.extend(
        f"open_webui_ollama_urls[{index}] is {url!r} and {_url_fault(url)}"
        for index, url in enumerate(config["ollama_urls"])
        if _url_fault(url)
    )
    return found


def _url_fault(url: str) -> str:
    """Return what is wrong with an address, or nothing."""
    try:
        connection_url(url)
    except ValueError as fault:
        return str(fault)
    return ""


def _account_faults(config: Mapping[str, Any]) -> list[str]:
    found = []
    email, password, key = config["admin_email"], config["admin_password"], config["secret_key"]
    if re.fullmatch(r"[^@\s]+@(localhost|[^@\s]+\.[^@\s]+)", email) is None:
        found.append(f"open_webui_admin_email is {email!r}: Open WebUI takes name@host.domain or name@localhost")
    if password and len(password) < PASSWORD_CHARACTERS_MIN:
        found.append(
            f"open_webui_admin_password has {len(password)} characters: give at least {PASSWORD_CHARACTERS_MIN}, "
            "or none to have one generated"
        )
    if len(password.encode()) > PASSWORD_BYTES_MAX:
        found.append(
            f"open_webui_admin_password has more than {PASSWORD_BYTES_MAX} bytes, and Open WebUI reads no more"
        )
    if password != password.strip() or not password.isprintable():
        found.append("open_webui_admin_password has an outer space or a control character: leave it out")
    if key and len(key.encode()) < SECRET_KEY_BYTES_MIN:
        found.append(
            f"open_webui_secret_key has {len(key.encode())} bytes: give at least {SECRET_KEY_BYTES_MIN}, "
            "or none to have one generated"
        )
    if key != key.strip() or not key.isprintable():
        found.append("open_webui_secret_key has an outer space or a control character: leave it out")
    return found


def _database_faults(config: Mapping[str, Any]) -> list[str]:
    url = config["database_url"]
    kind = config["database"]
    if url and kind != "postgresql":
        return [f"open_webui_database_url is given and open_webui_database is {kind}: take postgresql, or no address"]
    try:
        if url:
            database_url(url)
    except ValueError as fault:
        return [
            f"open_webui_database_url {fault}. It is an address such as postgresql://USER:PASSWORD@HOST:5432/DATABASE"
        ]
    return []


def _folder_faults(config: Mapping[str, Any]) -> list[str]:
    found = []
    for name in ("data_dir", "static_dir"):
        path = config[name]
        if not path.startswith("/") or posixpath.normpath(path) in (
            "/",
            "/etc",
            "/usr",
            "/var",
            "/var/lib",
            "/opt",
            "/srv",
        ):
            found.append(f"open_webui_{name} is {path!r}: give the absolute path of a folder of its own")
        elif any(char in path for char in " \t\n\"'\\%$;:"):
            found.append(
                f"open_webui_{name} is {path!r}: a unit can't name a path with spaces, quotes or one of \\ % $ ; :"
            )
        elif _is_inside(path, config["prefix"]):
            found.append(
                f"open_webui_{name} is {path!r}, inside {config['prefix']}, where an upgrade would leave it behind: "
                f"take /var/lib/open-webui/{name.removesuffix('_dir')} or another folder outside"
            )
        elif any(_is_inside(path, hidden) for hidden in HIDDEN):
            found.append(
                f"open_webui_{name} is {path!r}: the unit sees no home or temporary folder, take one elsewhere"
            )
    apart = not (
        _is_inside(config["data_dir"], config["static_dir"]) or _is_inside(config["static_dir"], config["data_dir"])
    )
    if not found and not apart:
        found.append(
            f"open_webui_static_dir {config['static_dir']!r} and open_webui_data_dir {config['data_dir']!r} lie in one "
            "another, and Open WebUI empties the static one at each start: keep them apart"
        )
    return found


def _is_inside(path: str, folder: str) -> bool:
    """Tell whether ``path`` is ``folder`` or lies below it, by their names alone."""
    path, folder = posixpath.normpath(path), posixpath.normpath(folder)
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _settings_faults(config: Mapping[str, Any]) -> list[str]:
    found = []
    # Both end in one file, so what is refused in one is no way around in the other.
    for variable in ("settings", "environment"):
        for name, value in config[variable].items():
            if NAME.match(str(name)) is None:
                found.append(f"open_webui_{variable} has {name!r}, which is not a name for an environment variable")
            elif name in OWNERS:
                owner = OWNERS[name]
                way_out = f"use {owner}" if owner.startswith("open_webui_") else f"leave it out, since {owner}"
                found.append(f"open_webui_{variable} has {name}, which is the role's own: {way_out}")
            elif re.search(r"[\0\ud800-\udfff]", text_of(value)):
                found.append(f"open_webui_{variable}.{name} holds a NUL character, or what is no text: leave it out")
    return found
