"""What Prometheus is given, what is watched of a fleet, and what the collector says of GPUs, backups and releases."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import prometheus

ROOT = Path(__file__).resolve().parents[2]
ROLE = ROOT / "roles/monitoring"
GPUS = ROOT / "tests/unit/fixtures/gpu_metrics"
SETTINGS = {
    "interval_seconds": 15,
    "rules": ["/etc/monitoring/rules.yml"],
    "alertmanagers": [],
    "keys_dir": "/etc/monitoring/keys",
    "prober": "127.0.0.1:9115",
    "own": "127.0.0.1:9090",
}
ENGINE = {"job": "engine", "host": "gpu-1", "url": "http://10.0.0.5:23333/metrics", "api_key": "secret"}


def load_collector() -> ModuleType:
    spec = importlib.util.spec_from_file_location("collector", ROLE / "files/collector.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


collector = load_collector()


def scrapes(*targets: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    """Return the scrape configurations of targets."""
    return list(prometheus.configuration(targets, {**SETTINGS, **changes})["scrape_configs"][1:])


def test_a_key_is_in_a_file_and_never_in_the_configuration() -> None:
    (scrape,) = scrapes(ENGINE)
    assert scrape["authorization"] == {"credentials_file": "/etc/monitoring/keys/gpu-1-10.0.0.5_23333.key"}
    assert scrape["static_configs"] == [{"targets": ["10.0.0.5:23333"], "labels": {"job": "engine", "host": "gpu-1"}}]
    assert prometheus.key_files([ENGINE]) == {"gpu-1-10.0.0.5_23333.key": "secret"}
    assert "secret" not in json.dumps(prometheus.configuration([ENGINE], SETTINGS))


def test_a_probe_is_asked_by_the_prober_and_named_after_its_address() -> None:
    probe = {"job": "probe", "host": "ui", "url": "https://chat.example.org/health", "tls_verified": False}
    (scrape,) = scrapes(probe)
    assert scrape["params"] == {"module": ["http_unverified"], "target": ["https://chat.example.org/health"]}
    assert scrape["static_configs"][0]["targets"] == ["127.0.0.1:9115"]
    assert scrape["static_configs"][0]["labels"]["instance"] == "https://chat.example.org/health"


def test_two_engines_of_a_host_are_two_targets_and_one_twice_is_one() -> None:
    other = {**ENGINE, "url": "http://10.0.0.5:23334/metrics"}
    assert len(scrapes(ENGINE, other, ENGINE)) == 2


def test_alertmanagers_are_named() -> None:
    made = prometheus.configuration([], {**SETTINGS, "alertmanagers": ["10.0.0.9:9093"]})
    assert made["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] == ["10.0.0.9:9093"]


@pytest.mark.parametrize(
    ("change", "words"), [({"url": "10.0.0.5:1"}, "is no URL"), ({"job": "nod"}, "'nod' is none of")]
)
def test_a_target_that_can_not_work_is_refused(change: dict[str, str], words: str) -> None:
    with pytest.raises(prometheus.MonitoringFault, match=words):
        scrapes({**ENGINE, **change})


def test_the_unit_reaches_its_targets_and_nothing_else() -> None:
    local = {**ENGINE, "url": "http://127.0.0.1:1"}
    assert prometheus.networks([local], []) == ["localhost"]
    assert prometheus.networks([local, ENGINE], ["10.1.0.0/16"]) == ["localhost", "10.1.0.0/16", "10.0.0.5"]
    assert prometheus.networks([{**ENGINE, "url": "http://gpu-1:1"}], []) == []


def rules() -> dict[str, Any]:
    return dict(yaml.safe_load((ROLE / "files/rules.yml").read_text(encoding="utf-8")))


def alerts(content: dict[str, Any]) -> dict[str, Any]:
    """Return alerts by their names."""
    return {rule["alert"]: rule for group in content["groups"] for rule in group["rules"] if "alert" in rule}


def test_an_alert_is_changed_or_taken_out_by_name() -> None:
    made = alerts(prometheus.rules(rules(), {"EngineDown": {"for": "1s"}, "Drift": {"enabled": False}}))
    assert made["EngineDown"]["for"] == "1s"
    assert made["EngineDown"]["expr"] == alerts(rules())["EngineDown"]["expr"]
    assert "Drift" not in made
    assert len(made) == len(alerts(rules())) - 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"EngineDwn": {"for": "1s"}}, "no alert 'EngineDwn'; known are"), ({"Drift": {"fro": "1s"}}, "'fro' is none of")],
)
def test_a_change_that_means_nothing_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(prometheus.MonitoringFault, match=words):
        prometheus.rules(rules(), changes)


def test_every_alert_says_what_is_and_what_to_do_and_is_tested() -> None:
    tested = yaml.safe_load((ROOT / "molecule/monitoring/rules_test.yml").read_text(encoding="utf-8"))["tests"]
    cases = [case for test in tested for case in test.get("alert_rule_test", [])]
    fire = {case["alertname"] for case in cases if case["exp_alerts"]}
    for name, rule in alerts(rules()).items():
        assert rule["annotations"].keys() == {"summary", "action"}, name
        assert rule["labels"]["severity"] in ("critical", "warning"), name
        assert name in fire, f"{name} is never seen to fire in rules_test.yml"


GPU = {"name": "gpu-1", "address": "10.0.0.5", "exporter_host": "127.0.0.1", "exporter_port": 9100}


def watched(monitor: str, **changes: Any) -> list[str]:
    """Return what a monitor watches of one host."""
    return [f"{t['job']} {t['url']}" for t in prometheus.fleet_targets([{**GPU, **changes}], monitor)]


def test_on_one_host_all_is_watched_over_loopback() -> None:
    connections = [{"url": "http://127.0.0.1:23333/v1", "api_key": "k"}]
    assert watched("gpu-1", connections=connections, web_host="0.0.0.0", web_port=8080, gateway_port=8405) == [
        "node http://127.0.0.1:9100/metrics",
        "gateway http://127.0.0.1:8405/metrics",
        "probe http://127.0.0.1:8080/health",
        "engine http://127.0.0.1:23333/metrics",
        "probe http://127.0.0.1:23333/health",
    ]


def test_from_another_host_only_what_was_opened_is_watched() -> None:
    local = [{"url": "http://127.0.0.1:23333/v1", "api_key": "k"}]
    assert watched("mon", connections=local, web_host="127.0.0.1", web_port=8080, gateway_port=8405) == []
    opened = [{"url": "http://10.0.0.5:23333/v1", "api_key": "k"}]
    assert watched("mon", connections=opened, exporter_host="0.0.0.0") == [
        "node http://10.0.0.5:9100/metrics",
        "engine http://10.0.0.5:23333/metrics",
        "probe http://10.0.0.5:23333/health",
    ]


def gpu_page(name: str) -> tuple[int, str]:
    page = collector.Page()
    return collector.gpu_metrics(page, (GPUS / name).read_text(encoding="utf-8")), page.text()


def test_a_gpu_of_a_data_centre_tells_everything() -> None:
    count, text = gpu_page("h100.csv")
    labels = '{gpu="0",uuid="GPU-1aca4ba9-8506-3c10-1dd8-433bcc20f205",model="NVIDIA H100 80GB HBM3"}'
    assert count == 1
    assert f"selfhost_gpu_memory_total_bytes{labels} {81559 * 1024 * 1024}" in text
    assert f"selfhost_gpu_power_watts{labels} 106.38" in text
    assert f"selfhost_gpu_ecc_uncorrected_errors_total{labels} 0" in text
    assert f"selfhost_gpu_thermal_slowdown{labels} 0" in text
    assert text.count("# TYPE") == len(collector.GPU_FIELDS)


def test_what_a_consumer_card_does_not_know_is_left_out() -> None:
    count, text = gpu_page("rtx3090_pair.csv")
    assert count == 2
    assert "ecc" not in text
    assert "remap" not in text
    assert len(re.findall(r"^selfhost_gpu_power_watts\{", text, re.MULTILINE)) == 1
    assert re.search(r'^selfhost_gpu_thermal_slowdown\{gpu="0".*\} 1$', text, re.MULTILINE)
    assert re.search(r'^selfhost_gpu_utilization_ratio\{gpu="0".*\} 0\.97', text, re.MULTILINE)


def test_errors_of_the_driver_are_counted() -> None:
    page = collector.Page()
    collector.xid_metrics(page, "NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus.\n" * 2 + "usb 1-1: new\n")
    assert "selfhost_gpu_xid_errors_total 2\n" in page.text()
    assert 'selfhost_gpu_xid_errors_by_kind_total{bus="0000:01:00",xid="79"} 2\n' in page.text()


def test_a_broken_nvidia_smi_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "nvidia-smi"
    broken.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")
    broken.chmod(0o755)
    text = collector.collect(str(broken), [], tmp_path)
    assert "selfhost_gpu_scrape_success 0\n" in text
    assert "selfhost_gpus 0\n" in text
    assert "selfhost_gpu_scrape_success" not in collector.collect("", [], tmp_path)


def test_backups_and_releases_are_told(tmp_path: Path) -> None:
    for name, moment in (("a.tar", 1000), ("b.tar", 2000)):
        (tmp_path / name).write_text("12345")
        os.utime(tmp_path / name, (moment, moment))
    (tmp_path / "api-server.service").write_text("ExecStart=/opt/miniconda3/releases/lmdeploy/0123abcd/bin/python x\n")
    (tmp_path / "open-webui.service").write_text("ExecStart=/opt/miniconda3/envs/open-webui/bin/open-webui serve\n")
    text = collector.collect("", [f"{tmp_path}/*.tar", f"{tmp_path}/*.none"], tmp_path)
    assert f'selfhost_backup_timestamp_seconds{{path="{tmp_path}/*.tar"}} 2000\n' in text
    assert ".none" not in text
    assert 'selfhost_release_info{unit="api-server.service",env="lmdeploy",release="0123abcd"} 1\n' in text
    assert 'selfhost_release_info{unit="open-webui.service",env="open-webui",release=""} 1\n' in text


def test_labels_are_escaped() -> None:
    page = collector.Page()
    page.add("x", "gauge", "X", 1, a='say "hi"\\\n')
    assert page.text().splitlines()[-1] == 'x{a="say \\"hi\\"\\\\\\n"} 1'
