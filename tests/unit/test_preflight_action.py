"""Preflight's controller side: values and specs of the real roles, one survey, one message."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import preflight_hosts as hosts
import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template
from ansible_collections.selfhost.lmdeploy.plugins.action import preflight
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_checks import CHECKS
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_host import OFFICIAL_INDEX
from ansible_collections.selfhost.lmdeploy.plugins.modules import preflight as preflight_page

ENGINE = ["mirrors", "miniconda", "conda_env", "model_weights", "api_server"]
WEB = ["mirrors", "miniconda", "conda_env", "open_webui"]
CPU: dict[str, Any] = {"gpu": hosts.NO_CARD}
GGUF = "/var/lib/models/SmolLM2-135M-Instruct.Q4_1.gguf"


class Run:
    """One run of the action plugin on a host that the test describes."""

    def __init__(self, roles: list[str], variables: dict[str, Any], survey: Any, **arguments: Any) -> None:
        """Run it. ``survey`` is what the host shows, or a result of a module that failed."""
        loader = DataLoader()
        self.asked: dict[str, Any] = {}
        task = MagicMock(
            args={"roles": roles, "timeout_seconds": 1.0, **arguments}, register="x", async_val=0, check_mode=False
        )
        plugin = preflight.ActionModule(
            task=task,
            connection=MagicMock(),
            play_context=MagicMock(),
            loader=loader,
            templar=Templar(loader),
            shared_loader_obj=MagicMock(),
        )
        plugin._execute_module = self.answer(survey)
        task_vars = {name: trusted(value) for name, value in variables.items()}
        hostvars = {"box": task_vars, "gpu1": {}, "gpu2": {"api_server_host": "10.0.0.2"}}
        self.result = plugin.run(task_vars={"inventory_hostname": "box", "hostvars": hostvars, **task_vars})
        self.findings: list[dict[str, str]] = self.result["findings"]
        self.checks = {finding["check"] for finding in self.findings}

    def answer(self, survey: Any) -> Any:
        """Return what stands in for the call of the module."""

        def execute(module_name: str, module_args: dict[str, Any], **_rest: Any) -> Any:
            assert module_name == "selfhost.lmdeploy.host_survey"
            self.asked = module_args
            if "failed" in survey:
                return survey
            silent = {"reached": True, "detail": ""}
            return {"survey": {**survey, "urls": [survey["urls"].get(url, silent) for url in module_args["urls"]]}}

        return execute


def trusted(value: Any) -> Any:
    """Return a value whose texts may be templates, as those of an inventory are."""
    if isinstance(value, dict):
        return {key: trusted(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [trusted(entry) for entry in value]
    return trust_as_template(value) if isinstance(value, str) else value


def box(**changes: Any) -> dict[str, Any]:
    """Return the survey of a good host, now."""
    return {**hosts.host(**changes), "time": time.time()}


def test_the_seeds_recipe_on_two_cards_passes_with_defaults_alone() -> None:
    run = Run([*ENGINE, "open_webui"], {}, box(gpu=hosts.machine("rtx3090_pair")))
    assert run.findings == []
    assert not run.result.get("failed")
    assert (run.result["engine"], run.result["tp"]) == ("lmdeploy", {"api-server.service": 2})
    assert run.asked["ports"] == [8080, 23333]
    assert OFFICIAL_INDEX in run.asked["urls"]


def test_a_host_without_cards_gets_the_cpu_engine() -> None:
    run = Run(ENGINE, {"api_server_model": GGUF}, box(**CPU))
    assert run.findings == []
    assert run.result["engine"] == "llama_cpp"
    assert "tp" not in run.result


def test_unknown_names_are_refused_with_a_guess() -> None:
    run = Run(WEB, {"open_webui_prt": 8081, "api_server_tpp": 2, "mirrors_zzz": 1, "my_own": 1}, box())
    guesses = {finding["variable"]: finding["fix"] for finding in run.findings}
    assert run.checks == {"variable_unknown"}
    assert guesses["open_webui_prt"] == "Did you mean open_webui_port?"
    assert guesses["api_server_tpp"] == "Did you mean api_server_tp?"
    assert set(guesses) == {"open_webui_prt", "api_server_tpp", "mirrors_zzz"}


def test_types_choices_and_nested_names_are_judged_by_the_specs() -> None:
    variables = {
        "api_server_engine": "vllm",
        "api_server_port": "many",
        "api_server_instances": [{"name": "a", "prot": 1}],
        "open_webui_profile": "tiny",
        "open_webui_connections": [{"api_key": "sk-canary-7"}],
    }
    run = Run([*ENGINE, "open_webui"], variables, box(**CPU))
    found = {finding["variable"]: finding for finding in run.findings if finding["check"] == "variable_invalid"}
    assert set(found) == set(variables)
    assert found["api_server_engine"]["value"] == "vllm"
    assert found["api_server_engine"]["fix"] == "Take one of: auto, lmdeploy, llama_cpp."
    assert "prot" in found["api_server_instances"]["message"]
    assert "canary" not in json.dumps(run.result)


def test_expressions_are_computed_and_broken_ones_named() -> None:
    variables = {"ports": {"ui": 70001}, "open_webui_port": "{{ ports.ui }}", "open_webui_host": "{{ no_such_thing }}"}
    run = Run(WEB, variables, box())
    found = {finding["variable"]: finding for finding in run.findings}
    assert found["open_webui_port"]["check"] == "port_range"
    assert found["open_webui_host"]["check"] == "variable_template"
    assert "no_such_thing" in found["open_webui_host"]["message"]


def test_what_an_engine_that_is_not_taken_says_does_not_count() -> None:
    variables = {"lmdeploy_version": [1, 2], "api_server_model": GGUF}
    assert Run(ENGINE, variables, box(**CPU)).findings == []
    assert "variable_invalid" in Run(ENGINE, {"lmdeploy_version": [1, 2]}, box(gpu=hosts.machine("h100"))).checks


def test_all_faults_come_in_one_message() -> None:
    variables = {
        "api_server_tp": 3,
        "api_server_port": 70000,
        "open_webui_admin_password": "hunter2hunt",
        "open_webui_x": 1,
    }
    run = Run([*ENGINE, "open_webui"], variables, box(os_id="fedora", os_version="43", gpu=hosts.machine("h100")))
    assert run.checks == {"tp_form", "port_range", "admin_password", "variable_unknown", "os"}
    assert run.result["failed"]
    assert run.result["msg"].startswith("5 faults on box; nothing was changed.")
    assert "hunter2" not in run.result["msg"]
    assert not run.result["changed"]


def test_a_failed_survey_is_a_finding_beside_the_others() -> None:
    failed = {"failed": True, "msg": "MODULE FAILURE", "module_stderr": "/bin/sh: 1: /usr/bin/python3: not found"}
    run = Run(ENGINE, {"api_server_port": 70000}, failed)
    assert run.checks == {"survey", "port_range"}
    assert "python3: not found" in run.result["msg"]


def test_warnings_are_shown_and_do_not_fail() -> None:
    desktop = box(gpu=hosts.machine("rtx4090_desktop"))
    run = Run(ENGINE, {"api_server_model": "OpenGVLab/InternVL3-1B"}, desktop)
    assert run.checks == {"gpu_busy"}
    assert not run.result.get("failed")
    assert any("2211" in warning for warning in run.result["warnings"])


def test_checks_can_be_skipped_by_their_names_only() -> None:
    survey = box(os_id="fedora", os_version="43", gpu=hosts.machine("h100"))
    assert Run(ENGINE, {}, survey, skipped_checks=["os"]).findings == []
    run = Run(ENGINE, {}, survey, skipped_checks=["os", "dsik"])
    assert [(finding["variable"], finding["fix"]) for finding in run.findings] == [
        ("preflight_skipped_checks", "Did you mean disk?")
    ]


def test_the_report_is_written_for_its_owner_only(tmp_path: Path) -> None:
    variables = {
        "api_server_port": 70000,
        "mirrors_pip_index_url": "https://ann:canary-9@mirror.example.org/simple",
        "api_server_environment": {"HF_TOKEN": "hf_canary4"},
    }
    survey = box(urls={"https://ann:canary-9@mirror.example.org/simple": {"reached": False, "detail": "hf_canary4"}})
    run = Run(ENGINE, variables, survey, report_dir=str(tmp_path / "reports"))
    report = tmp_path / "reports" / "box.json"
    assert run.result["report"] == str(report)
    assert report.stat().st_mode & 0o777 == 0o600
    told = json.loads(report.read_text())
    assert (told["host"], told["passed"]) == ("box", False)
    assert told["survey"]["os_id"] == "ubuntu"
    assert "canary" not in report.read_text() + json.dumps(run.result)


def test_a_web_host_sees_where_other_hosts_listen() -> None:
    variables = {"inventory_hostname": "box"}
    run = Run(WEB, variables, box(), model_servers=["gpu1", "gpu2"])
    assert {finding["variable"] for finding in run.findings} == {"api_server_host of gpu1"}


def test_the_seeds_template_is_refused_with_what_is_known() -> None:
    run = Run(ENGINE, {"api_server_chat_template": "internvl2_5"}, box(gpu=hosts.machine("h100")))
    assert run.checks == {"chat_template"}
    known = json.loads((hosts.CHECKOUT / "roles/lmdeploy/files/cli/0.18.0.json").read_text())["chat_templates"]
    assert all(name in run.findings[0]["message"] for name in known)
    assert "Leave api_server_chat_template empty" in run.findings[0]["fix"]


def test_the_modules_page_lists_every_check() -> None:
    options = yaml.safe_load(preflight_page.DOCUMENTATION)["options"]
    listed = options["skipped_checks"]["description"][1:]
    assert listed == [f"C({name}): {text}." for name, text in CHECKS.items()]


def wanted(variables: dict[str, Any], **changes: Any) -> str:
    """Return the digest of what is wanted of a host with a small engine."""
    own = {"api_server_engine": "llama_cpp", "api_server_model": GGUF, "ansible_host": "10.0.0.9", **variables}
    run = Run(ENGINE, own, box(**{**CPU, **changes}))
    found = run.result["ansible_facts"]["preflight_watched"]
    assert run.asked["watched"] == found["watched"]
    return str(found["wanted"])


def test_the_same_wish_is_the_same_and_another_is_another(tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.write_text("one")
    plain = {"mirrors_ca_file": str(authority)}
    first = wanted(plain)
    assert first == wanted(plain)
    # Variables of the run are no wish.
    assert first == wanted({**plain, "preflight_settled_hours": 3, "ansible_check_mode": True, "omit": "x"})
    others = [
        wanted({**plain, "api_server_port": 23444}),
        wanted({**plain, "ansible_host": "10.0.0.10"}),
        # No role's variable, but something may be made of it.
        wanted({**plain, "of_my_own": 1}),
        wanted({**plain, "firewall_enabled": True}),
        wanted(plain, os_version="13", os_id="debian"),
    ]
    authority.write_text("two")
    others.append(wanted(plain))
    assert len({first, *others}) == 1 + len(others)


def test_a_value_that_is_computed_counts_by_what_it_is() -> None:
    assert wanted({"api_server_port": "{{ other }}", "other": 1234}) != wanted(
        {"api_server_port": "{{ other }}", "other": 1235}
    )


def test_text_that_is_no_path_and_no_unicode_breaks_nothing() -> None:
    assert wanted({"of_my_own": "\ud800", "firewall_ssh_networks": ["\ud800/x"], "firewall_enabled": True})


def test_who_asks_every_engine_in_every_run_is_never_left_alone() -> None:
    assert wanted({"api_server_verified": "always"}) == ""


def facts_set_by_roles() -> set[str]:
    """Return every public fact that a role's task file sets."""
    found: set[str] = set()
    for path in hosts.CHECKOUT.glob("roles/*/tasks/*.yml"):
        for block in re.findall(r"set_fact:\n((?:\s{4,}.*\n)+)", path.read_text()):
            found |= set(re.findall(r"^    (\w+):", block, re.MULTILINE))
    return {name for name in found if not name.startswith("__")}


def test_facts_that_roles_set_are_known() -> None:
    # The last ones are preflight's own, out of its survey.
    assert facts_set_by_roles() | {"preflight_settled", "preflight_watched", "preflight_wsl"} == set(
        preflight.GIVEN_BY_ROLES
    )


@pytest.mark.parametrize("role", ["mirrors", "miniconda", "conda_env", "model_weights", "api_server", "open_webui"])
def test_roles_that_the_playbook_names_exist(role: str) -> None:
    assert preflight.Role(role, DataLoader()).options
    assert f"'{role}'" in (hosts.CHECKOUT / "playbooks/preflight.yml").read_text()
