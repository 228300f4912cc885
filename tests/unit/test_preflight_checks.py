"""Preflight's checks of the inventory and of a host without its cards: each fires, and none on what is right."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import preflight_hosts as hosts
import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_checks import (
    CHECKS,
    as_json,
    judge,
    report,
    split,
    without_secrets,
)
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_desired import (
    HIDDEN,
    Desired,
    Fellow,
    Peer,
    cleaned,
    overlaps,
    secrets_in,
    shown,
)
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_host import sources, survey_request
from hypothesis import given
from hypothesis import strategies as st
from preflight_hosts import GB, checks, host, path_facts, the, wish

# Made by the action plugin out of argument specs and a failed survey.
MADE_BY_THE_PLUGIN = {"variable_invalid", "variable_template", "variable_unknown", "survey"}

LISTENER = {"address": "0.0.0.0", "port": 8080, "pid": 77, "process": "nginx", "unit": "nginx.service"}
WSL = {"is_wsl": True, "has_gpu_device": True, "conf_systemd": False, "linux_drivers": []}
PAIR = hosts.machine("rtx3090_pair")
INSTANCES = [{"name": "one", "port": 23333, "gpus": [0]}, {"name": "two", "port": 23334, "gpus": [1]}]
SMALL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def two(**second: Any) -> list[dict[str, Any]]:
    """Return two instances, the second one changed."""
    return [INSTANCES[0], {**INSTANCES[1], **second}]


# Everything that must be found: check, what the inventory says, what the host shows, words that the person must read.
FAULTS: list[tuple[str, Desired, dict[str, Any], list[str]]] = [
    ("port_range", wish(api_server_port=70000), {}, ["api_server_port", "70000", "65535"]),
    ("port_range", wish(open_webui_port=0), {}, ["open_webui_port"]),
    ("number", wish(open_webui_start_timeout_seconds=-1), {}, ["open_webui_start_timeout_seconds", "-1"]),
    ("number", wish(api_server_max_batch_size=2**31), {}, ["api_server_max_batch_size"]),
    ("port_clash", wish(open_webui_port=23333), {}, ["open_webui_port", "api-server.service", "api_server_port"]),
    ("port_clash", wish(open_webui_port=23333, open_webui_host="0.0.0.0"), {}, ["23333"]),
    (
        "port_clash",
        wish(api_server_instances=two(port=23333)),
        {"gpu": PAIR},
        ["api_server_instances[two].port", "api-server-one.service", "api_server_instances[one].port"],
    ),
    (
        "instance_name",
        wish(api_server_instances=two(name="a b")),
        {"gpu": PAIR},
        ["api_server_instances[a b].name", "small letters"],
    ),
    ("instance_name", wish(api_server_instances=two(name="one")), {"gpu": PAIR}, ["Another instance"]),
    ("tp_form", wish(api_server_tp=3), {}, ["api_server_tp", "3", "power of two", "1, 2, 4 or 8"]),
    ("tp_form", wish(api_server_tp="many"), {}, ["= many"]),
    ("tp_form", wish(api_server_tp=0), {}, ["= 0"]),
    ("version_floor", wish(lmdeploy_version="0.17.1"), {}, ["lmdeploy_version", "0.17.1", "0.18.0"]),
    ("version_floor", wish(lmdeploy_version="latest"), {}, ["no version"]),
    ("version_floor", wish(open_webui_version="0.7.2"), {}, ["open_webui_version", "0.12.4"]),
    ("lock", wish(lmdeploy_version="0.18.1"), {}, ["lmdeploy_lock", "0.18.0", "0.18.1", "lmdeploy_version"]),
    ("lock", wish(_locks={"lmdeploy_lock": None}), {}, ["no such file", "/locks/lmdeploy-0.18.0.txt"]),
    ("lock", wish(_locks={"lmdeploy_lock": "timm==1.0.0 --hash=sha256:0"}), {}, ["doesn't pin lmdeploy"]),
    ("lock", wish(_locks={"lmdeploy_lock": "lmdeploy==0.18.0\n"}), {}, ["sha256"]),
    ("lock", wish(_locks={"open_webui_lock": "open_webui==0.12.5 \\\n --hash=sha256:0"}), {}, ["0.12.5"]),
    (
        "chat_template",
        wish(api_server_chat_template="internvl2_5"),
        {},
        [
            "api_server_chat_template",
            "internvl2_5",
            "base, internvl-zh, llama2",
            "Leave api_server_chat_template empty",
        ],
    ),
    ("tool_call_parser", wish(api_server_tool_call_parser="qwen9"), {}, ["qwen2d5, qwen3"]),
    ("reasoning_parser", wish(api_server_extra_args=["--reasoning-parser", "x"]), {}, ["default, qwen-qwq"]),
    ("flag", wish(api_server_extra_args=["--enable-prefix-cashing"]), {}, ["Did you mean --enable-prefix-caching?"]),
    ("flag", wish(api_server_extra_args=["--log-level", "LOUD"]), {}, ["--log-level LOUD", "ERROR, INFO, WARNING"]),
    ("flag", wish(api_server_extra_args=["--api-keys=abc"]), {}, ["api_server_api_key"]),
    ("flag", wish(api_server_extra_args=["--tp", "2"]), {}, ["api_server_tp"]),
    ("engine_unknown", wish(_command_line=None), {}, ["lmdeploy_version"]),
    ("url", wish(open_webui_connections=[{"url": "HOST:23333/v1"}]), {}, ["open_webui_connections[0].url", "http://"]),
    ("url", wish(open_webui_connections=[{"url": "http:///v1"}]), {}, ["names a host"]),
    ("url", wish(open_webui_ollama_urls=["ollama:11434"]), {}, ["open_webui_ollama_urls[0]"]),
    ("url", wish(mirrors_pip_index_url="mirror/simple"), {}, ["mirrors_pip_index_url"]),
    ("url", wish(mirrors_hf_endpoint="https://[hub"), {}, ["mirrors_hf_endpoint"]),
    ("url", wish(mirrors_bundle_dir="['a']"), {}, ["mirrors_bundle_dir", "whole path"]),
    ("data_dir", wish(open_webui_data_dir="/opt/miniconda3/envs/open-webui/data"), {}, ["miniconda_prefix"]),
    ("data_dir", wish(model_weights_dir="/opt/miniconda3"), {}, ["model_weights_dir"]),
    (
        "data_dir",
        wish(),
        {"paths": {"/var/lib/open-webui/data": path_facts(file_system="nfs4")}},
        ["nfs4", "open_webui_data_dir"],
    ),
    ("admin_password", wish(open_webui_admin_password="elevenchars"), {}, ["11 characters", "12", HIDDEN]),
    ("sha256", wish(miniconda_installer_sha256="abc"), {}, ["miniconda_installer_sha256", "64 hexadecimal"]),
    ("sha256", wish(model_weights_packages=[{"package": "p", "sha256": "z" * 64}]), {}, ["packages[0].sha256"]),
    (
        "hostile_text",
        wish(api_server_model_name='x"\nExecStartPre=/bin/sh'),
        {},
        ["api_server_model_name", "line break"],
    ),
    ("hostile_text", wish(open_webui_host="--api-keys"), {}, ["open_webui_host", "--api-keys", "a dash at its start"]),
    ("hostile_text", wish(api_server_model="/m/100%h"), {}, ["percent"]),
    ("hostile_text", wish(open_webui_connections=[{"url": "http://h/{{ x }}"}]), {}, ["template"]),
    ("hostile_text", wish(open_webui_data_dir="/var/lib/it's"), {}, ["quote"]),
    ("hostile_text", wish(open_webui_admin_email="a$b@c"), {}, ["dollar"]),
    ("hostile_text", wish(model_weights_dir="/my models"), {}, ["blank"]),
    ("hostile_text", wish(open_webui_admin_name="Ann\nEvil"), {}, ["line break"]),
    ("hostile_text", wish(api_server_instances=two(model="a'b")), {"gpu": PAIR}, ["api_server_instances[two].model"]),
    ("path", wish(model_weights_dir="models"), {}, ["no absolute path"]),
    ("env_shared", wish(open_webui_env_name="lmdeploy"), {}, ["open_webui_env_name", "lmdeploy_env_name"]),
    ("loopback", wish(_peers=(Peer("gpu1", ("127.0.0.1",)),)), {}, ["api_server_host of gpu1", "Open WebUI on box"]),
    ("exposed", wish(api_server_host="0.0.0.0", api_server_allowed_networks=["any"]), {}, ["Every network"]),
    ("role_rule", wish(api_server_host="10.0.0.7"), {}, ["api_server_allowed_networks is empty", "10.0.0.0/24"]),
    ("role_rule", wish(api_server_model="/home/ann/x-1B"), {}, ["sees nothing under /home/"]),
    ("role_rule", wish(open_webui_settings={"PORT": 1}), {}, ["open_webui_settings", "open_webui_port"]),
    ("role_rule", wish(open_webui_admin_email="ann"), {}, ["name@host.domain"]),
    ("api_key", wish(api_server_api_key="sk-short"), {}, ["8 characters", "32", HIDDEN]),
    ("model_format", wish(api_server_model="/m/x-7B.Q4_0.gguf"), {}, ["GGUF", "llama_cpp"]),
    ("model_format", wish("llama_cpp"), {"gpu": hosts.NO_CARD}, ["OpenGVLab/InternVL3-8B", ".gguf"]),
    ("privilege", wish(), {"is_root": False}, ["ansible_become"]),
    ("os", wish(), {"os_id": "fedora", "os_version": "43"}, ["fedora 43", "Ubuntu 22.04 and 24.04, Debian 12 and 13"]),
    ("os", wish(), {"os_id": "ubuntu", "os_version": "20.04"}, ["ubuntu 20.04"]),
    ("systemd", wish(), {"init": "sshd", "systemd_state": ""}, ["sshd"]),
    ("systemd", wish(), {"systemd_state": "offline"}, ["offline"]),
    (
        "systemd",
        wish(),
        {"init": "init", "systemd_state": "", "wsl": WSL},
        ["systemd=true", "wsl.conf", "wsl --shutdown"],
    ),
    ("systemd", wish(), {"init": "init", "wsl": {**WSL, "conf_systemd": True}}, ["already", "wsl --shutdown"]),
    ("architecture", wish(miniconda_installer=""), {"architecture": "aarch64"}, ["LMDeploy", "x86_64", "aarch64"]),
    (
        "architecture",
        wish("llama_cpp", api_server_model="/m/x-1B.gguf"),
        {"architecture": "aarch64", "gpu": hosts.NO_CARD},
        ["miniconda_installer", "the aarch64 file"],
    ),
    ("libc", wish(), {"libc_version": "2.27"}, ["2.27", "2.28"]),
    ("clock", wish(_clock_offset_seconds=-400.0), {}, ["400 s behind", "timedatectl"]),
    ("clock", wish(_clock_offset_seconds=200000.0), {}, ["ahead of"]),
    ("port_held", wish(), {"listeners": [LISTENER]}, ["nginx.service", "77", "open_webui_port", "8080"]),
    ("port_held", wish(), {"listeners": [{**LISTENER, "unit": "", "process": "python3"}]}, ["process 77 (python3)"]),
    ("port_held", wish(), {"listeners": [{**LISTENER, "unit": "", "pid": 0}]}, ["can't be seen"]),
    (
        "port_held",
        wish(),
        {"listeners": [{**LISTENER, "unit": "api-server-old.service"}]},
        ["api-server-old.service", "no longer wants"],
    ),
    ("port_privileged", wish(open_webui_port=443), {}, ["1024", "443"]),
    ("wsl_models", wish(model_weights_dir="/mnt/c/models"), {"wsl": WSL}, ["model_weights_dir", "Windows"]),
    ("wsl_models", wish(api_server_model="/mnt/d/InternVL3"), {"wsl": WSL}, ["api_server_model", "Linux disk"]),
    ("data_dir", wish(open_webui_data_dir="/mnt/c/chats"), {"wsl": WSL}, ["SQLite", "Linux disk"]),
    ("wsl_driver", wish(), {"wsl": {**WSL, "linux_drivers": ["/usr/lib/x86_64-linux-gnu/libcuda.so.1"]}}, ["libcuda"]),
]


@pytest.mark.parametrize(
    ("check", "desired", "changes", "words"), FAULTS, ids=[f"{n}-{case[0]}" for n, case in enumerate(FAULTS)]
)
def test_a_fault_is_found_alone_and_explained(
    check: str, desired: Desired, changes: dict[str, Any], words: list[str]
) -> None:
    finding = the(check, desired, host(**changes))
    text = report([finding], "box")
    assert [word for word in words if word not in text] == []
    assert finding.message.endswith(".")
    assert finding.fix.endswith((".", "?"))
    assert finding.host == "box"


def test_every_check_is_seen_to_fire() -> None:
    from test_preflight_gpu import FAULTS as GPU_FAULTS

    elsewhere = {"disk", "mirror", "model_missing", "nodes"} | MADE_BY_THE_PLUGIN
    assert {case[0] for case in FAULTS} | {case[0] for case in GPU_FAULTS} | elsewhere == set(CHECKS)


GOOD: list[tuple[Desired, dict[str, Any]]] = [
    (wish(), {}),
    (wish(api_server_tp=1, open_webui_admin_password="twelve chars"), {}),
    (wish(api_server_tp="1"), {}),
    (wish(api_server_instances=INSTANCES), {"gpu": PAIR}),
    (wish(api_server_host="10.0.0.7", api_server_allowed_networks=["10.0.0.0/24"]), {}),
    (wish(api_server_extra_args=["--reasoning-parser", "qwen-qwq"], api_server_api_key="k" * 32), {}),
    # One port on two addresses that don't meet.
    (wish(open_webui_port=23333, open_webui_host="127.0.0.2"), {}),
    (wish(api_server_chat_template="/etc/template.json", api_server_tool_call_parser="qwen3"), {}),
    (wish(api_server_extra_args=["--quant-policy", "8", "--enable-prefix-caching"]), {}),
    # A slash at the end is taken off by the role; a proxy's password may need %XX.
    (wish(open_webui_connections=[{"url": "https://h/v1/", "api_key": 'it\'s "100%"'}]), {}),
    (wish(mirrors_pip_index_url="https://ann:p%40ss@mirror.example.org/simple"), {}),
    (wish(_peers=(Peer("box", ("127.0.0.1",)), Peer("gpu1", ("10.0.0.2",)))), {}),
    (wish(_peers=(Peer("gpu1", ("127.0.0.1",)),), open_webui_connections=[{"url": "http://gw/v1"}]), {}),
    (wish(_locks={"lmdeploy_lock": hosts.LOCK, "open_webui_lock": "open-webui==0.12.4 \\\n --hash=sha256:0"}), {}),
    (wish(), {"os_id": "debian", "os_version": "13", "systemd_state": "degraded"}),
    (wish(_clock_offset_seconds=30.0), {}),
    (wish(open_webui_port=443), {"unprivileged_port": 0}),
    # The role wsl turns systemd on before anything else happens.
    (wish(_roles={"wsl"}), {"init": "init", "systemd_state": "", "wsl": WSL}),
    # Our own units hold our ports, and one may move to the other's.
    (wish(), {"listeners": [{**LISTENER, "unit": "open-webui.service"}]}),
    (wish(open_webui_port=8081, api_server_port=8080), {"listeners": [{**LISTENER, "unit": "open-webui.service"}]}),
    (wish(), {"listeners": [{**LISTENER, "address": "10.0.0.9"}]}),
    (wish("llama_cpp", api_server_model="/m/x-135M.Q4_1.gguf"), {"gpu": hosts.NO_CARD, "architecture": "x86_64"}),
]


@pytest.mark.parametrize(("desired", "changes"), GOOD)
def test_what_is_right_passes(desired: Desired, changes: dict[str, Any]) -> None:
    assert [report([finding], "") for finding in judge(desired, host(**changes))] == []


def test_web_host_alone_is_not_judged_as_an_engine() -> None:
    roles = hosts.ROLES - {"api_server", "model_weights", "lmdeploy"}
    desired = wish(_roles=roles, _engine="", api_server_tp=3, api_server_port=8080, api_server_model="x'")
    assert checks(Desired(**{**desired.__dict__, "engine": ""}), host(gpu=hosts.NO_CARD)) <= {"hostile_text"}


def test_without_a_survey_the_inventory_is_still_judged() -> None:
    assert checks(wish(api_server_port=70000, api_server_tp=3)) == {"port_range", "tp_form"}


def test_several_faults_stand_in_one_message() -> None:
    desired = wish(api_server_port=70000, api_server_tp=3, open_webui_admin_password="short")
    errors, warnings = split(judge(desired, host(os_id="arch", os_version="")), [])
    text = report(errors, "box")
    assert text.startswith("4 faults on box; nothing was changed.\n1. ")
    assert all(name in text for name in ("api_server_port", "api_server_tp", "open_webui_admin_password", "arch"))
    assert warnings == []


def test_a_check_can_be_left_out_by_its_id() -> None:
    findings = judge(wish(api_server_tp=3), host(os_id="arch"))
    assert {finding.check for finding in split(findings, ["os"])[0]} == {"tp_form"}


# Disk

FULL = {"free_bytes": 20 * GB}


def disks(**free: int) -> dict[str, Any]:
    """Return paths on three disks with that many gigabytes free."""
    conda, models = (
        path_facts(device=1, free_bytes=free["conda"] * GB),
        path_facts(device=2, free_bytes=free["models"] * GB),
    )
    places = dict.fromkeys(host()["paths"], conda)
    return {**places, "/var/lib/models": models}


def test_room_is_summed_for_each_disk() -> None:
    # Miniconda 1, LMDeploy 10, Open WebUI 8 and, on the other disk, 1.1 times the 16 GB of InternVL3-8B.
    assert "disk" not in checks(wish(), host(paths=disks(conda=19, models=18)))
    conda = the("disk", wish(), host(paths=disks(conda=18, models=18)))
    assert conda.variable == "miniconda_prefix"
    assert "19.0 GB are needed" in conda.message
    assert "18.0 GB are free" in conda.message
    models = the("disk", wish(), host(paths=disks(conda=19, models=17)))
    assert models.variable == "model_weights_dir"
    assert "the table of InternVL3 sizes" in models.message


def test_the_slim_profile_needs_less() -> None:
    assert "disk" not in checks(wish(open_webui_profile="slim"), host(paths=disks(conda=12, models=18)))


def test_what_is_installed_needs_no_room() -> None:
    paths = disks(conda=0, models=0)
    paths["/opt/miniconda3"] = path_facts(exists=True, device=1, free_bytes=0)
    installed = {
        "/opt/miniconda3/envs/lmdeploy": {"exists": True, "packages": {"lmdeploy": "0.18.0"}},
        "/opt/miniconda3/envs/open-webui": {"exists": True, "packages": {"open-webui": "0.12.4"}},
    }
    models: dict[str, Any] = {
        "/var/lib/models/OpenGVLab--InternVL3-8B": {
            "exists": True, "weight_bytes": 16 * GB, "layers": 28, "heads": 28, "kv_heads": 4, "head_dim": 128,
            "max_session": 32768,
        }
    }  # fmt: skip
    survey = host(paths=paths, environments=installed, models=models)
    assert checks(wish(), survey) == set()
    # Another version is built beside the running one.
    assert checks(wish(open_webui_version="0.12.9"), survey) == {"disk"}


# Mirrors

DOWN = {"reached": False, "detail": "[Errno -2] Name or service not known"}


def test_the_places_that_are_asked() -> None:
    urls = {source.url: source.variable for source in sources(wish())}
    assert urls == {
        "https://pypi.org/simple/": "mirrors_pip_index_url",
        "https://conda.anaconda.org/conda-forge/": "mirrors_conda_channels",
        "https://example.org/Miniconda3-py311_26.9.4-1-Linux-x86_64.sh": "miniconda_installer_url",
        "https://huggingface.co": "mirrors_hf_endpoint",
    }
    offline = {source.url for source in sources(wish(mirrors_offline=True, miniconda_installer_url="file:///srv/m.sh"))}
    assert offline == {"https://pypi.org/simple/", "https://conda.anaconda.org/conda-forge/", "file:///srv/m.sh"}
    own_hub = sources(wish(mirrors_offline=True, mirrors_hf_endpoint="http://hub:8000"))
    assert "http://hub:8000" in {source.url for source in own_hub}
    local = wish(api_server_model="/models/x-7B", model_weights_hub="modelscope")
    assert "https://huggingface.co" not in {source.url for source in sources(local)}


@pytest.mark.parametrize("url", [source.url for source in sources(wish())])
def test_a_place_that_does_not_answer_is_named(url: str) -> None:
    finding = the("mirror", wish(), host(urls={url: DOWN}))
    assert url in finding.value
    assert "not known" in finding.message


def test_a_foreign_certificate_points_to_the_ca_variable() -> None:
    detail = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate"
    finding = the("mirror", wish(), host(urls={"https://pypi.org/simple/": {"reached": False, "detail": detail}}))
    assert "mirrors_ca_file" in finding.fix


def test_a_place_that_is_not_needed_may_be_down() -> None:
    installed = {
        "/opt/miniconda3/envs/lmdeploy": {"exists": True, "packages": {"lmdeploy": "0.18.0"}},
        "/opt/miniconda3/envs/open-webui": {"exists": True, "packages": {"open-webui": "0.12.4"}},
    }
    survey = host(environments=installed, urls=dict.fromkeys(("https://pypi.org/simple/",), DOWN))
    assert "mirror" not in checks(wish(), survey)


def test_offline_a_model_must_come_from_somewhere() -> None:
    finding = the("mirror", wish(mirrors_offline=True), host())
    assert (finding.variable, finding.value) == ("api_server_model", "OpenGVLab/InternVL3-8B")
    assert "model_weights_source_dir" in finding.fix
    assert checks(wish(mirrors_offline=True, model_weights_source_dir="/media/usb"), host()) == set()
    assert checks(wish(mirrors_offline=True, mirrors_hf_endpoint="http://hub:8000"), host()) == set()


def test_a_model_that_is_a_path_must_be_there() -> None:
    sizes = ("weight_bytes", "layers", "heads", "kv_heads", "head_dim", "max_session")
    nothing = {"exists": False, **dict.fromkeys(sizes, 0)}
    survey = host(gpu=hosts.NO_CARD, models={"/var/lib/models/small.gguf": nothing, "/srv/m.gguf": nothing})
    finding = the("model_missing", wish("llama_cpp", api_server_model="/srv/m.gguf"), survey)
    assert (finding.variable, finding.value) == ("api_server_model", "/srv/m.gguf")
    assert "Nothing is at /srv/m.gguf" in finding.message
    brought = {"package": "llm-small", "version": "1", "sha256": "0" * 64, "member": "llm_small/small.gguf"}
    for model in ("/var/lib/models/small.gguf", "small.gguf"):
        assert "model_missing" in checks(wish("llama_cpp", api_server_model=model), survey)
        given = wish("llama_cpp", api_server_model=model, model_weights_packages=[brought])
        assert "model_missing" not in checks(given, survey)


# What the host is asked


def test_the_survey_asks_once_for_everything() -> None:
    request = survey_request(wish(mirrors_https_proxy="http://proxy:3128", api_server_instances=INSTANCES))
    assert request["ports"] == [8080, 23333, 23334]
    assert request["models"] == ["/var/lib/models/OpenGVLab--InternVL3-8B"]
    assert {entry["path"] for entry in request["environments"]} == {
        "/opt/miniconda3/envs/lmdeploy",
        "/opt/miniconda3/envs/open-webui",
    }
    assert request["proxies"]["https_proxy"] == "http://proxy:3128"


def test_with_engine_auto_both_engines_are_asked_for() -> None:
    request = survey_request(Desired("box", hosts.ROLES, hosts.VALUES))
    assert {entry["packages"][0] for entry in request["environments"]} == {"lmdeploy", "xllamacpp", "open-webui"}


# Secrets

SECRETS: dict[str, Any] = {
    "open_webui_admin_password": "correct horse",
    "api_server_api_key": "sk-canary-1",
    "open_webui_connections": [{"url": "https://ann:canary-2@h/v1", "api_key": "sk-canary-3"}],
    "api_server_environment": {"HF_TOKEN": "hf_canary4", "PATH": "/bin"},
    "model_weights_token": "hf_canary5",
}


def test_no_secret_is_shown() -> None:
    text = " ".join(shown(name, value) for name, value in SECRETS.items())
    assert not re.search(r"canary|horse", text)
    assert "/bin" in text
    assert "https://***@h/v1" in text


def test_messages_of_others_are_cleaned() -> None:
    secrets = [secret for name, value in SECRETS.items() for secret in secrets_in(name, value)]
    dirty = "hf_canary4 or sk-canary-3 at https://ann:canary-2@h/v1, correct horse, sk-canary-1, hf_canary5"
    assert "canary" not in cleaned(dirty, secrets)
    assert "horse" not in cleaned(dirty, secrets)


def test_a_finding_carries_no_secret() -> None:
    desired = wish(open_webui_connections=[{"url": "h/v1", "api_key": "sk-canary"}], open_webui_admin_password="canary")
    secrets = ["sk-canary", "canary"]
    findings = without_secrets(judge(desired, host()), secrets)
    assert {finding.check for finding in findings} == {"url", "admin_password"}
    assert "canary" not in str(as_json(findings))


@given(st.text(min_size=4), st.text(), st.text())
def test_a_secret_leaves_every_text(secret: str, before: str, after: str) -> None:
    text = cleaned(before + secret + after, [secret])
    assert secret not in text or secret in HIDDEN or secret in "***@"


@given(
    st.sampled_from(["127.0.0.1", "0.0.0.0", "::", "10.0.0.1", "localhost", ""]),
    st.sampled_from(["127.0.0.1", "0.0.0.0", "::", "10.0.0.1", "localhost", ""]),
)
def test_addresses_meet_both_ways(first: str, second: str) -> None:
    assert overlaps(first, second) == overlaps(second, first)
    assert overlaps(first, first)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "url", "port", "id"]), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(hosts.VALUES)), JUNK, max_size=6))
def test_no_value_breaks_a_check(values: dict[str, Any]) -> None:
    for finding in judge(wish(**values), host()):
        assert finding.variable
        assert finding.message
        assert finding.fix


def together(*others: tuple[str, str, dict[str, str]]) -> Desired:
    """Return a host that serves one model together with others: their names, addresses and differences."""
    nodes = ["10.0.0.1", "10.0.0.2"]
    mine = {"api_server_nodes": str(nodes), "lmdeploy_version": "0.18.0"}
    fellows = [Fellow("gpu-1", "10.0.0.1", mine), *(Fellow(name, at, {**mine, **new}) for name, at, new in others)]
    return replace(wish(api_server_nodes=nodes, api_server_tp="2"), host="gpu-1", fellows=tuple(fellows))


def test_hosts_of_one_model_agree() -> None:
    """Each difference is one finding, with both values; and a host that is missing is noticed."""
    assert "nodes" not in checks(together(("gpu-2", "10.0.0.2", {})))
    found = the("nodes", together(("gpu-2", "10.0.0.2", {"lmdeploy_version": "0.19.0"})))
    assert (found.variable, found.value) == ("lmdeploy_version", "0.18.0")
    assert "gpu-2" in found.message
    assert "0.19.0" in found.message
    found = the("nodes", together())
    assert found.variable == "api_server_nodes"
    assert "gpu-1" in found.message
