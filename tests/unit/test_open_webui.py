"""The variables of the role open_webui: what they become in Open WebUI's environment, and which are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.selfhost.lmdeploy.plugins.filter import open_webui_environment, open_webui_faults
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import open_webui
from hypothesis import given
from hypothesis import strategies as st

ENGINE = {"url": "http://10.0.0.5:23333/v1", "api_key": "sk-engine"}


def config(**changes: Any) -> dict[str, Any]:
    """Return the role's defaults, changed where asked."""
    return {
        "version": "0.12.4",
        "profile": "full",
        "prefix": "/opt/miniconda3",
        "host": "127.0.0.1",
        "port": 8080,
        "url": "",
        "connections": [ENGINE],
        "ollama_urls": [],
        "admin_email": "admin@localhost",
        "admin_name": "Admin",
        "admin_password": "",
        "secret_key": "",
        "data_dir": "/var/lib/open-webui/data",
        "static_dir": "/var/lib/open-webui/static",
        "database": "sqlite",
        "database_url": "",
        "signup_enabled": False,
        "models_public": True,
        "default_models": [],
        "builtin_tools_enabled": False,
        "offline": False,
        "trusted_proxies": ["127.0.0.1"],
        "environment": {},
        "settings": {},
        **changes,
    }


def variables(**changes: Any) -> dict[str, str]:
    """Return the environment that may be shown."""
    return open_webui.environment(config(**changes))["variables"]


@pytest.mark.parametrize(
    ("given_url", "mended"),
    [
        ("http://engine:23333/v1", "http://engine:23333/v1"),
        ("http://engine:23333/v1/", "http://engine:23333/v1"),
        ("http://engine:23333/v1//", "http://engine:23333/v1"),
        ("http://engine:23333", "http://engine:23333/v1"),
        ("http://engine:23333/", "http://engine:23333/v1"),
        (" https://api.example.org/openai/v2 ", "https://api.example.org/openai/v2"),
        ("http://[fd00::5]:23333/", "http://[fd00::5]:23333/v1"),
    ],
)
def test_an_address_is_mended(given_url: str, mended: str) -> None:
    assert open_webui.connection_url(given_url) == mended
    assert variables(connections=[{"url": given_url}])["OPENAI_API_BASE_URLS"] == mended


@given(st.from_regex(r"https?://[a-z]{1,8}(:[1-9][0-9]{0,3})?(/[a-z0-9]{0,5}){0,3}", fullmatch=True))
def test_a_mended_address_stays_as_it_is(url: str) -> None:
    mended = open_webui.connection_url(url)
    assert open_webui.connection_url(mended) == mended
    assert not mended.endswith("/")


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("engine:23333/v1", "no scheme"),
        ("10.0.0.5:23333", "no scheme"),
        ("ftp://engine/v1", "no scheme"),
        ("http:///v1", "no host"),
        ("http://engine:70000/v1", "port"),
        ("http://engine:0/v1", "port"),
        ("http://engine/v1?key=1", "query"),
        ("http://engine/v1;http://other/v1", "semicolon"),
    ],
)
def test_an_address_that_cannot_work_is_refused_by_name_and_value(url: str, fault: str) -> None:
    (message,) = open_webui.faults(config(connections=[{"url": url}]))
    assert message.startswith(f"open_webui_connections[0].url is {url!r}")
    assert fault in message
    with pytest.raises(AnsibleFilterError):
        open_webui_environment.open_webui_environment(config(connections=[{"url": url}]))


def test_several_engines_keep_their_order_keys_and_models() -> None:
    engines = [ENGINE, {"url": "https://api.example.org", "models": ["m1", "m2"], "prefix": "far"}]
    result = open_webui.environment(config(connections=engines))
    assert result["variables"]["OPENAI_API_BASE_URLS"] == "http://10.0.0.5:23333/v1;https://api.example.org/v1"
    assert result["secrets"] == {"OPENAI_API_KEYS": "sk-engine;"}
    near, far = (json.loads(result["variables"]["OPENAI_API_CONFIGS"])[index] for index in ("0", "1"))
    assert near == {"enable": True, "model_ids": [], "prefix_id": "", "connection_type": "local", "auth_type": "bearer"}
    assert (far["model_ids"], far["prefix_id"], far["auth_type"]) == (["m1", "m2"], "far", "none")
    assert far["connection_type"] == "external"
    assert "sk-engine" not in json.dumps(result["variables"])


def test_without_a_connection_nothing_outside_is_asked() -> None:
    assert variables(connections=[])["ENABLE_OPENAI_API"] == "False"
    assert variables()["ENABLE_OPENAI_API"] == "True"
    assert variables()["ENABLE_OLLAMA_API"] == "False"


def test_ollama_hosts_turn_ollama_on() -> None:
    result = variables(ollama_urls=["http://ollama:11434/", "http://other:11434"])
    assert result["ENABLE_OLLAMA_API"] == "True"
    assert result["OLLAMA_BASE_URLS"] == "http://ollama:11434;http://other:11434"


def test_it_is_closed_and_declarative_by_default() -> None:
    result = variables()
    closed = [
        "ENABLE_CODE_EXECUTION",
        "ENABLE_CODE_INTERPRETER",
        "ENABLE_COMMUNITY_SHARING",
        "ENABLE_PERSISTENT_CONFIG",
        "ENABLE_PIP_INSTALL_FRONTMATTER_REQUIREMENTS",
        "ENABLE_PLUGINS",
        "ENABLE_SIGNUP",
        "ENABLE_VERSION_UPDATE_CHECK",
        "RAG_EMBEDDING_MODEL_TRUST_REMOTE_CODE",
        "RAG_RERANKING_MODEL_TRUST_REMOTE_CODE",
        "WEBUI_SESSION_COOKIE_SECURE",
    ]
    assert {name: result[name] for name in closed} == dict.fromkeys(closed, "False")


def test_chats_carry_no_tools_unless_the_engine_can_take_them() -> None:
    result = variables()
    assert json.loads(result["DEFAULT_MODEL_PARAMS"]) == {"function_calling": "legacy"}
    assert json.loads(result["DEFAULT_MODEL_METADATA"]) == {"capabilities": {"builtin_tools": False}}
    assert "DEFAULT_MODEL_PARAMS" not in variables(builtin_tools_enabled=True)


def test_own_model_parameters_do_not_bring_the_tools_back() -> None:
    result = variables(
        settings={
            "DEFAULT_MODEL_PARAMS": {"temperature": 0.2},
            "DEFAULT_MODEL_METADATA": {"capabilities": {"vision": True}},
        }
    )
    assert json.loads(result["DEFAULT_MODEL_PARAMS"]) == {"function_calling": "legacy", "temperature": 0.2}
    assert json.loads(result["DEFAULT_MODEL_METADATA"]) == {"capabilities": {"builtin_tools": False, "vision": True}}


def test_settings_open_what_is_closed_and_drop_what_is_null() -> None:
    result = variables(settings={"ENABLE_CODE_EXECUTION": True, "ENV": None, "WEBUI_BANNERS": [{"id": "b"}]})
    assert result["ENABLE_CODE_EXECUTION"] == "True"
    assert "ENV" not in result
    assert result["WEBUI_BANNERS"] == '[{"id": "b"}]'


def test_a_public_address_narrows_origins_and_secures_cookies() -> None:
    result = variables(url="https://chat.example.org/")
    assert result["WEBUI_URL"] == "https://chat.example.org"
    assert result["CORS_ALLOW_ORIGIN"] == "https://chat.example.org"
    assert result["WEBUI_SESSION_COOKIE_SECURE"] == "True"
    assert "CORS_ALLOW_ORIGIN" not in variables()


def test_the_rest_of_the_variables_arrives() -> None:
    result = variables(
        profile="slim",
        offline=True,
        models_public=False,
        default_models=["a", "b"],
        trusted_proxies=["10.0.0.1", "::1"],
    )
    assert result["USE_SLIM_DOCKER"] == "True"
    assert result["OFFLINE_MODE"] == "True"
    assert result["BYPASS_MODEL_ACCESS_CONTROL"] == "False"
    assert result["DEFAULT_MODELS"] == "a,b"
    assert result["FORWARDED_ALLOW_IPS"] == "10.0.0.1,::1"


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"version": "0.9.5"}, ["open_webui_version 0.9.5", "0.12.4"]),
        ({"version": "latest"}, ["open_webui_version", "'latest'"]),
        ({"port": 70000}, ["open_webui_port is 70000", "65535"]),
        ({"host": "a b"}, ["open_webui_host", "'a b'"]),
        ({"url": "chat.example.org"}, ["open_webui_url", "'chat.example.org'", "https://"]),
        ({"url": "https://[chat"}, ["open_webui_url", "'https://[chat'", "https://"]),
        ({"connections": [{**ENGINE, "api_key": "a;b"}]}, ["open_webui_connections[0].api_key", "semicolon"]),
        ({"connections": [ENGINE, {"url": "http://10.0.0.5:23333"}]}, ["[1].url", "[0]", "prefix"]),
        ({"ollama_urls": ["ollama:11434"]}, ["open_webui_ollama_urls[0]", "no scheme"]),
        ({"admin_email": "admin"}, ["open_webui_admin_email", "'admin'"]),
        ({"admin_password": "elevenchars"}, ["open_webui_admin_password has 11 characters", "at least 12"]),
        ({"admin_password": "ü" * 37}, ["open_webui_admin_password", "72 bytes"]),
        ({"admin_password": " twelve chars"}, ["open_webui_admin_password", "outer space"]),
        ({"secret_key": "short"}, ["open_webui_secret_key has 5 bytes", "at least 32"]),
        ({"data_dir": "/opt/miniconda3/envs/open-webui/data"}, ["open_webui_data_dir", "/opt/miniconda3", "upgrade"]),
        ({"data_dir": "data"}, ["open_webui_data_dir", "absolute"]),
        ({"data_dir": "/var/lib"}, ["open_webui_data_dir", "'/var/lib'", "its own"]),
        ({"data_dir": "/home/me/data"}, ["open_webui_data_dir", "'/home/me/data'", "home"]),
        ({"data_dir": "/srv/my data"}, ["open_webui_data_dir", "spaces"]),
        ({"static_dir": "/var/lib/open-webui/data/static"}, ["open_webui_static_dir", "empties"]),
        ({"settings": {"OPENAI_API_BASE_URLS": "x"}}, ["OPENAI_API_BASE_URLS", "open_webui_connections"]),
        ({"settings": {"not a name": "x"}}, ["open_webui_settings", "'not a name'"]),
        ({"settings": {"X": "a\0b"}}, ["open_webui_settings.X", "NUL"]),
    ],
)
def test_bad_input_is_named_with_its_value_and_the_way_out(changes: dict[str, Any], parts: list[str]) -> None:
    (message,) = open_webui.faults(config(**changes))
    assert all(part in message for part in parts), message


def test_faults_come_together_and_good_input_has_none() -> None:
    assert open_webui.faults(config()) == []
    assert len(open_webui.faults(config(port=0, admin_password="short", data_dir="data"))) == 3


def test_no_fault_prints_a_secret() -> None:
    changes = {
        "admin_password": "hunter2 ",
        "secret_key": "hunter2\t",
        "connections": [{**ENGINE, "api_key": "hunter2;"}],
    }
    found = open_webui.faults(config(**changes))
    assert len(found) == 5
    assert "hunter2" not in "".join(found)


@pytest.mark.parametrize("name", sorted(open_webui.OWNERS))
def test_a_setting_with_an_owner_is_refused(name: str) -> None:
    (message,) = open_webui.faults(config(settings={name: "x"}))
    assert name in message


def test_every_variable_that_the_role_sets_has_an_owner_or_a_default_that_may_be_changed() -> None:
    full = variables(url="https://a.example", default_models=["m"], ollama_urls=["http://o:1"])
    free = {*open_webui.CLOSED, *open_webui.WITHOUT_TOOLS, "CORS_ALLOW_ORIGIN", "WEBUI_SESSION_COOKIE_SECURE"}
    assert set(full) - free <= set(open_webui.OWNERS)


def test_the_hosts_certificates_and_proxies_reach_the_service_and_its_installers_do_not() -> None:
    given_values = {"SSL_CERT_FILE": "/etc/ssl/ca", "PIP_INDEX_URL": "https://user:word@mirror", "UV_INDEX": "x"}
    result = variables(environment=given_values)
    assert result["SSL_CERT_FILE"] == "/etc/ssl/ca"
    assert not {"PIP_INDEX_URL", "UV_INDEX"} & set(result)


def test_a_proxy_to_the_internet_is_not_asked_for_engines_of_the_own_network() -> None:
    engines = [ENGINE, {"url": "http://gpu-1:23333/v1"}, {"url": "https://api.example.org/v1"}]
    proxy = {"https_proxy": "http://proxy:3128", "NO_PROXY": ".example.lan, gpu-1"}
    result = variables(connections=engines, environment=proxy, ollama_urls=["http://192.168.1.9:11434"])
    assert result["NO_PROXY"] == ".example.lan,gpu-1,localhost,127.0.0.1,::1,10.0.0.5,192.168.1.9"
    assert result["no_proxy"] == result["NO_PROXY"]
    assert "NO_PROXY" not in variables(connections=engines)


def test_filters_are_found_by_their_names() -> None:
    assert open_webui_faults.FilterModule().filters()["open_webui_faults"](config()) == []
    environment = open_webui_environment.FilterModule().filters()["open_webui_environment"](config())
    assert environment["secrets"] == {"OPENAI_API_KEYS": "sk-engine"}


def test_a_databases_address_is_a_secret_and_names_the_driver_that_is_there() -> None:
    given_url = "postgres://ui:p%40ss@db.lan:5433/chats?sslmode=verify-full"
    result = open_webui.environment(config(database="postgresql", database_url=given_url))
    assert result["secrets"]["DATABASE_URL"] == "postgresql+psycopg://ui:p%40ss@db.lan:5433/chats?sslmode=verify-full"
    assert "DATABASE_URL" not in result["variables"]
    assert "DATABASE_URL" not in open_webui.environment(config())["secrets"]
    local = "postgresql://open-webui@/open-webui?host=/run/postgresql&port=5432"
    assert open_webui.faults(config(database="postgresql", database_url=local)) == []


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://ui:secretword@db/chats", "begin with postgresql://"),
        ("postgresql://ui:secretword$@db/chats", "hexadecimal"),
        ('postgresql://ui:secretword"@db/chats', "hexadecimal"),
        ("postgresql://ui:secretword\n@db/chats", "hexadecimal"),
        ("postgresql://ui:secretword@db", "database"),
        ("postgresql://ui:secretword@db:99999/chats", "65535"),
        ("postgresql://db/chats", "account"),
        ("postgresql://ui:secretword@db/chats?sslmod=require", "sslmod, known are"),
    ],
)
def test_a_databases_address_that_cant_be_is_refused_and_not_shown(url: str, words: str) -> None:
    (fault,) = open_webui.faults(config(database="postgresql", database_url=url))
    assert words in fault
    assert "secretword" not in fault


def test_an_address_beside_sqlite_is_a_contradiction() -> None:
    (fault,) = open_webui.faults(config(database_url="postgresql://ui:secretword@db/chats"))
    assert "open_webui_database is sqlite" in fault
    assert "secretword" not in fault
