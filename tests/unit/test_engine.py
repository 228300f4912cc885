"""From the role's variables to instances and arguments, and every fault on the way."""

from __future__ import annotations

import json
from typing import Any

import preflight_hosts as hosts
import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.selfhost.lmdeploy.plugins.filter.engine_instances import engine_instances as as_filter
from ansible_collections.selfhost.lmdeploy.plugins.filter.model_path import model_path as path_filter
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import engine
from hypothesis import given
from hypothesis import strategies as st

PLAIN: dict[str, Any] = {
    "model": "OpenGVLab/InternVL3-14B-Instruct",
    "model_name": "",
    "backend": "turbomind",
    "host": "127.0.0.1",
    "port": 23333,
    "tp": "auto",
    "gpus": [],
    "chat_template": "",
    "session_len": None,
    "cache_max_entry_count": None,
    "max_batch_size": None,
    "tool_call_parser": "",
    "trust_remote_code": False,
    "extra_args": [],
    "environment": {},
}
PATH = "/var/lib/models/OpenGVLab--InternVL3-14B-Instruct"


def instances(
    *named: dict[str, Any],
    engine_name: str = "lmdeploy",
    gpus: int = 2,
    networks: list[str] | None = None,
    **plain: Any,
) -> list[dict[str, Any]]:
    """Return the instances for changed variables."""
    host = {"gpus": gpus, "wsl": False, "models": {PATH: "/var/lib/models/.store/x/commit"}}
    settings = {
        "engine": engine_name,
        "models_dir": "/var/lib/models",
        "drain_seconds": 30,
        "allowed_networks": networks or [],
    }
    return engine.engine_instances({**PLAIN, **plain}, list(named), host, settings)


def faults(*named: dict[str, Any], **changes: Any) -> list[str]:
    """Return the faults, one a line."""
    with pytest.raises(engine.EngineFault) as caught:
        instances(*named, **changes)
    return str(caught.value).splitlines()


# -- the seed's command line ------------------------------------------------------------------------------------------


def test_the_plain_variables_give_the_seeds_command_line() -> None:
    (one,) = instances()
    assert one["instance"] == "api-server"
    assert one["launcher"]["arguments"] == [
        "/var/lib/models/.store/x/commit",
        *("--model-name", "InternVL3-14B-Instruct"),
        *("--backend", "turbomind"),
        *("--server-name", "127.0.0.1"),
        *("--server-port", "23333"),
        *("--tp", "2"),
    ]
    assert one["url"] == "http://127.0.0.1:23333"


def test_every_variable_reaches_the_command_line() -> None:
    (one,) = instances(
        session_len=8192,
        cache_max_entry_count=0.5,
        max_batch_size=64,
        chat_template="hf",
        tool_call_parser="qwen2d5",
        trust_remote_code=True,
        extra_args=["--quant-policy", 8],
        gpus=1,
    )
    text = " ".join(one["launcher"]["arguments"])
    for part in (
        "--session-len 8192",
        "--cache-max-entry-count 0.5",
        "--max-batch-size 64",
        "--chat-template hf",
        "--tool-call-parser qwen2d5",
        "--trust-remote-code",
        "--tp 1",
    ):
        assert part in text
    assert text.endswith("--quant-policy 8")
    assert "None" not in text


def test_the_environment_and_the_gpus_reach_the_process_and_the_key_is_nowhere() -> None:
    (one,) = instances(gpus=4, environment={"TM_LOG_LEVEL": "INFO", "N": 1}, tp="2")
    assert one["launcher"]["environment"]["TM_LOG_LEVEL"] == "INFO"
    assert one["launcher"]["environment"]["N"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in one["launcher"]["environment"]
    assert "api_key" not in str(one)


def test_llama_cpp_gets_the_same_contract_by_its_own_names() -> None:
    (one,) = instances(
        engine_name="llama_cpp", model="smol.gguf", session_len=2048, host="localhost", extra_args=["n_batch=256"]
    )
    arguments = one["launcher"]["arguments"]
    assert arguments[:2] == ["model.path=/var/lib/models/smol.gguf", 'hostnames=["127.0.0.1"]']
    assert {"port=23333", "n_ctx=2048", "n_parallel=4", "endpoint_metrics=true", "ui=false"} <= set(arguments)
    assert arguments[-1] == "n_batch=256"
    assert one["model_name"] == "smol"
    assert instances(engine_name="llama_cpp", max_batch_size=2)[0]["launcher"]["arguments"].count("n_parallel=2") == 1


# -- several instances ------------------------------------------------------------------------------------------------


def test_named_instances_take_from_the_plain_variables_what_they_do_not_say() -> None:
    first, second = instances(
        {"name": "vision", "gpus": [0]}, {"name": "text", "port": 23334, "model": "a/b", "gpus": [1, 2, 3]}, gpus=8
    )
    assert [first["instance"], second["instance"]] == ["api-server-vision", "api-server-text"]
    assert (first["tp"], second["tp"]) == (1, 2)
    assert second["model_path"] == "/var/lib/models/a--b"
    assert second["launcher"]["environment"]["CUDA_VISIBLE_DEVICES"] == "1,2,3"
    assert second["launcher"]["variables"]["--tp"] == "api_server_instances[text].tp"


def test_a_plain_model_name_stays_with_the_plain_model() -> None:
    first, second = instances(
        {"name": "a", "backend": None}, {"name": "b", "port": 1, "model": "x/other"}, model_name="mine"
    )
    assert (first["model_name"], second["model_name"]) == ("mine", "other")
    assert first["backend"] == "turbomind"


def test_two_instances_on_one_port_are_refused() -> None:
    (fault,) = faults({"name": "a"}, {"name": "b"})
    assert "api_server_instances[a].port and api_server_instances[b].port are both 23333" in fault
    assert faults({"name": "a"}, {"name": "b", "host": "0.0.0.0"}, networks=["any"])
    assert len(instances({"name": "a"}, {"name": "b", "host": "127.0.0.2"})) == 2


@pytest.mark.parametrize("name", ["", "Vision", "a/b", "x" * 40, "-a", "a b"])
def test_names_that_make_no_unit_are_refused(name: str) -> None:
    assert any(repr(name) in fault for fault in faults({"name": name}))


def test_one_name_twice_is_refused() -> None:
    assert "api_server_instances has the name 'a' more than once" in faults({"name": "a"}, {"name": "a", "port": 1})


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"port": 70000}, "api_server_port is 70000"),
        ({"port": 0}, "api_server_port is 0"),
        ({"model": "/home/me/model"}, "the unit sees nothing under /home/"),
        ({"model": "a/b/c"}, "'a/b/c' is no model"),
        ({"host": "10.0.0.5"}, "api_server_allowed_networks is empty"),
        ({"host": "0.0.0.0"}, "api_server_allowed_networks is empty"),
        ({"tp": "many"}, "api_server_tp is 'many'"),
        ({"extra_args": ["--api-keys", "secret"]}, "keys are set by api_server_api_key"),
        ({"extra_args": ["--server-port=1"]}, "set api_server_port instead"),
        ({"engine_name": "llama_cpp", "tool_call_parser": "qwen"}, "which the engine llama_cpp does not have"),
    ],
)
def test_a_fault_names_variable_value_and_way_out(changes: dict[str, Any], text: str) -> None:
    assert text in "\n".join(faults(**changes))


def test_faults_are_told_together() -> None:
    assert len(faults(port=70000, host="10.0.0.5", extra_args=["--tp", "2"])) == 3


def test_the_filters_tell_the_faults_as_ansible_does() -> None:
    with pytest.raises(AnsibleFilterError, match="no model"):
        path_filter("a/../b")
    with pytest.raises(AnsibleFilterError, match="70000"):
        as_filter({**PLAIN, "port": 70000}, [], {}, {"engine": "lmdeploy", "models_dir": "/m", "allowed_networks": []})


# -- cards ------------------------------------------------------------------------------------------------------------


def on_machine(name: str, *named: dict[str, Any], wsl: bool = False, **plain: Any) -> list[dict[str, Any]]:
    """Return the instances on a machine of the fixtures; the model's files are not there yet."""
    numa = plain.pop("numa_affinity", "auto")
    gpu = hosts.machine(name)
    host = {"gpus": len(gpu["cards"]), "gpu": gpu, "wsl": wsl, "models": {}, "model_facts": {}}
    settings = {"engine": "lmdeploy", "models_dir": "/m", "drain_seconds": 30, "allowed_networks": []}
    return engine.engine_instances({**PLAIN, **plain}, list(named), host, {**settings, "numa_affinity": numa})


def test_cards_are_dealt_and_reach_the_process_by_their_place_on_the_bus() -> None:
    first, second = on_machine(
        "a6000_8_pairs", {"name": "a", "tp": 2}, {"name": "b", "port": 23334, "model": "OpenGVLab/InternVL3-8B"}
    )
    environment = second["launcher"]["environment"]
    assert (first["gpus"], second["gpus"]) == ([4, 5], [0, 1, 2, 3])
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["CUDA_DEVICE_ORDER"]) == ("0,1,2,3", "PCI_BUS_ID")
    assert second["launcher"]["arguments"][-2:] == ["--tp", "4"]
    assert second["unit_lines"] == ["NUMAPolicy=preferred", "NUMAMask=0", "CPUAffinity=numa"]


def test_heads_bound_tp_also_in_the_role() -> None:
    (one,) = on_machine("h100_8_nvlink", model="OpenGVLab/InternVL3-8B")
    assert (one["tp"], one["gpus"]) == (4, [0, 1, 2, 3])
    (one,) = on_machine("h100_8_nvlink")
    assert one["tp"] == 8
    assert one["unit_lines"] == []


def test_one_card_needs_no_choice() -> None:
    (one,) = on_machine("rtx3090")
    assert "CUDA_VISIBLE_DEVICES" not in one["launcher"]["environment"]
    assert (one["tp"], one["gpus"], one["unit_lines"]) == (1, [], [])


def test_a_unit_is_bound_to_no_node_on_wsl_or_when_told_so() -> None:
    assert on_machine("h100_8_nvlink", tp=2)[0]["unit_lines"]
    assert on_machine("h100_8_nvlink", tp=2, numa_affinity="off")[0]["unit_lines"] == []
    assert on_machine("h100_8_nvlink", tp=2, wsl=True)[0]["unit_lines"] == []


@pytest.mark.parametrize(
    ("name", "plain", "text"),
    [
        (
            "rtx3090_pair",
            {"tp": 4},
            "api_server_tp is 4: It takes 4 cards, and the host has 2: 0 (NVIDIA GeForce RTX 3090)",
        ),
        (
            "rtx3090_pair",
            {"tp": 2, "gpus": [1]},
            "api_server_gpus names 1. Set api_server_tp to auto, or to at most 1.",
        ),
        ("rtx3090_pair", {"gpus": [7]}, "api_server_gpus is [7]: There is no card 7; the host has 0 (NVIDIA"),
        ("h100_8_one_lost", {"gpus": [5]}, "api_server_gpus is [5]: Card 5 does not answer: GPU is lost."),
    ],
)
def test_what_the_cards_do_not_allow_is_refused(name: str, plain: dict[str, Any], text: str) -> None:
    with pytest.raises(engine.EngineFault) as caught:
        on_machine(name, **plain)
    assert text in str(caught.value)


def test_engines_that_would_fight_over_a_card_are_refused() -> None:
    pair = ({"name": "a"}, {"name": "b", "port": 23334, "cache_max_entry_count": 0.4})
    with pytest.raises(engine.EngineFault) as caught:
        on_machine("rtx3090", *pair, model="OpenGVLab/InternVL3-1B")
    assert "api_server_instances[a].cache_max_entry_count is None: api-server-a and api-server-b share card 0" in str(
        caught.value
    )
    assert len(on_machine("rtx3090", *pair, model="OpenGVLab/InternVL3-1B", cache_max_entry_count=0.5)) == 2


# -- small rules ------------------------------------------------------------------------------------------------------


def test_tp_where_nothing_but_the_number_of_cards_is_known() -> None:
    assert [engine.tensor_parallel("auto", gpus, wsl=False) for gpus in (0, 1, 3, 8)] == [1, 1, 2, 8]
    assert engine.tensor_parallel("auto", 8, wsl=True) == 1
    assert engine.tensor_parallel("2", 8, wsl=True) == 2


@given(st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,20}/[A-Za-z0-9_-][A-Za-z0-9._-]{0,20}", fullmatch=True))
def test_a_repository_id_never_stays_a_model_path(model: str) -> None:
    path = engine.model_path(model, "/var/lib/models")
    assert path.startswith("/var/lib/models/")
    assert path.count("/") == 4
    assert engine.model_path(path, "/elsewhere") == path


@pytest.mark.parametrize(
    ("host", "loopback", "url"),
    [
        ("127.0.0.1", True, "http://127.0.0.1:1"),
        ("localhost", True, "http://127.0.0.1:1"),
        ("::1", True, "http://[::1]:1"),
        ("0.0.0.0", False, "http://127.0.0.1:1"),
        ("::", False, "http://[::1]:1"),
        ("10.0.0.5", False, "http://10.0.0.5:1"),
        ("model.lan", False, "http://model.lan:1"),
    ],
)
def test_where_a_client_on_the_host_asks(host: str, loopback: bool, url: str) -> None:
    assert engine.is_loopback(host) is loopback
    assert engine.url(host, 1) == url


def test_who_may_talk_to_the_unit() -> None:
    assert instances()[0]["allowed_networks"] == []
    assert instances(host="10.0.0.5", networks=["10.0.0.0/24"])[0]["allowed_networks"] == ["10.0.0.0/24", "10.0.0.5"]
    assert instances(host="0.0.0.0", networks=["any"])[0]["allowed_networks"] == ["any"]


NODES = ["10.0.0.1", "10.0.0.2"]
HOST: dict[str, Any] = {"gpus": 2, "wsl": False, "models": {PATH: "/var/lib/models/.store/x/commit"}}
TOGETHER: dict[str, Any] = {
    "engine": "lmdeploy",
    "models_dir": "/var/lib/models",
    "drain_seconds": 30,
    "allowed_networks": [],
    "nodes": NODES,
    "nodes_port": 23399,
}


@pytest.mark.parametrize(("address", "rank"), [("10.0.0.1", 0), ("10.0.0.2", 1)])
def test_hosts_of_one_model_get_their_ranks(address: str, rank: int) -> None:
    plain = {**PLAIN, "tp": "4", "host": "10.0.0.1"}
    settings = {**TOGETHER, "allowed_networks": ["10.0.0.0/24"]}
    instance = engine.engine_instances(plain, [], {**HOST, "addresses": [address]}, settings)[0]
    words = " ".join(instance["launcher"]["arguments"])
    assert f"--nnodes 2 --node-rank {rank} --dist-init-addr 10.0.0.1:23399" in words
    assert "--tp 4" in words
    assert set(NODES) <= set(instance["allowed_networks"])
    assert (instance["launcher"]["rank"], instance["launcher"]["head"]) == (rank, "10.0.0.1:23399")
    # Only the first one is to be asked.
    assert instance["host"] == ("127.0.0.1" if rank else "10.0.0.1")


def test_pytorch_over_several_hosts_is_one_engine_on_ray() -> None:
    plain = {**PLAIN, "tp": "4", "backend": "pytorch"}
    first = engine.engine_instances(plain, [], {**HOST, "addresses": ["10.0.0.1"]}, TOGETHER)[0]
    assert first["launcher"]["arguments"][-2:] == ["--distributed-executor-backend", "ray"]
    assert engine.engine_instances(plain, [], {**HOST, "addresses": ["10.0.0.2"]}, TOGETHER) == []


@pytest.mark.parametrize(
    ("plain", "named", "settings", "words"),
    [
        ({"tp": "auto"}, [], {}, "api_server_tp is auto: over several hosts give the number"),
        ({"tp": "3"}, [], {}, "api_server_tp is 3: over 2 hosts it is a multiple of 2"),
        ({"tp": "4"}, [{"name": "a"}], {}, "beside api_server_instances"),
        ({"tp": "4"}, [], {"engine": "llama_cpp"}, "the engine is llama_cpp: only LMDeploy"),
        ({"tp": "4"}, [], {"nodes": ["gpu-1", "10.0.0.2"]}, "api_server_nodes has 'gpu-1'"),
        ({"tp": "4"}, [], {"nodes": ["10.0.0.1"]}, "give two hosts or more"),
        ({"tp": "4"}, [], {"nodes": ["10.0.0.8", "10.0.0.9"]}, "of which this host has 0"),
        (
            {"tp": "4", "extra_args": ["--nnodes", "2"]},
            [],
            {},
            "extra_args holds --nnodes: set api_server_nodes instead",
        ),
    ],
)
def test_hosts_of_one_model_that_can_not_work_are_refused(
    plain: dict[str, Any], named: list[dict[str, Any]], settings: dict[str, Any], words: str
) -> None:
    host = {**HOST, "addresses": ["10.0.0.1"]}
    with pytest.raises(engine.EngineFault, match=words):
        engine.engine_instances({**PLAIN, **plain}, named, host, {**TOGETHER, **settings})


def test_the_flags_of_several_hosts_are_lmdeploys() -> None:
    known = json.loads((hosts.CHECKOUT / "roles/lmdeploy/files/cli/0.18.0.json").read_text())["flags"]
    assert set(engine.NODE_FLAGS) <= set(known)
    assert "ray" in known["--distributed-executor-backend"]["choices"]
