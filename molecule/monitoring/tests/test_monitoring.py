"""What a person who watches a fleet notices: true figures, alerts that come and go, closed doors, no shown key."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hardening import exposure

ROOT = Path(__file__).resolve().parents[3]
VARIABLES = yaml.safe_load((ROOT / "molecule/monitoring/vars.yml").read_text())
KEY = VARIABLES["api_server_api_key"]
VARIABLES["monitoring_targets"][0]["api_key"] = KEY
UNITS = ("prometheus", "prometheus-node-exporter", "prometheus-blackbox-exporter", "monitoring-collector")
MOST_SECONDS = 40


def ask(host: Any, query: str) -> list[dict[str, Any]]:
    """Return what Prometheus says to a query."""
    url = "http://127.0.0.1:9090/api/v1/query"
    code = (
        "import sys, urllib.parse, urllib.request as r;"
        f"print(r.urlopen('{url}?' + urllib.parse.urlencode({{'query': sys.argv[1]}})).read().decode())"
    )
    answer = host.check_output(f"python3 -c {shlex.quote(code)} {shlex.quote(query)}")
    return list(json.loads(answer)["data"]["result"])


def answers(host: Any, queries: list[str]) -> dict[str, list[Any]]:
    """Return what Prometheus says to each query; one that it refuses fails."""
    code = (
        "import json, sys, urllib.parse, urllib.request as r; ask = lambda q: json.load(r.urlopen("
        "'http://127.0.0.1:9090/api/v1/query?' + urllib.parse.urlencode({'query': q})))['data']['result'];"
        "print(json.dumps({q: ask(q) for q in json.load(sys.stdin)}))"
    )
    answer = host.check_output(f"printf %s {shlex.quote(json.dumps(queries))} | python3 -c {shlex.quote(code)}")
    return dict(json.loads(answer))


def until(host: Any, query: str, *, there: bool = True) -> list[dict[str, Any]]:
    """Wait until a query has an answer, or none."""
    began = time.monotonic()
    while bool(found := ask(host, query)) != there:
        assert time.monotonic() - began < MOST_SECONDS, query
        time.sleep(0.5)
    return found


def test_every_target_is_scraped_the_engine_with_its_key(host: Any) -> None:
    assert until(host, 'up{job="engine"} == 1')
    assert until(host, "llamacpp:n_decode_total > 0")
    assert until(host, 'up{job="node"} == 1')
    assert until(host, 'probe_success{job="probe"} == 1')
    (release,) = until(host, 'selfhost_release_info{unit="api-server.service"}')
    running = host.check_output("sed -n 's/^# Release //p' /etc/systemd/system/api-server.service")
    assert release["metric"]["release"] == running
    assert until(host, 'selfhost_gpu_power_watts{model="NVIDIA H100 80GB HBM3"}')[0]["value"][1] == "106.38"
    assert until(host, 'node_systemd_unit_state{name="api-server.service",state="active"} == 1')


@pytest.mark.parametrize("unit", UNITS)
def test_units_are_closed(host: Any, unit: str) -> None:
    assert exposure(host, f"{unit}.service") <= 2.0


def test_everything_listens_on_the_host_alone(host: Any) -> None:
    listening = host.check_output("ss --listening --tcp --numeric --no-header")
    assert set(re.findall(r"(\S+):(?:9090|9100|9115)\b", listening)) == {"127.0.0.1"}


def test_the_key_is_shown_nowhere(host: Any) -> None:
    found = host.check_output("ls -l /etc/monitoring/keys | tail -n 1")
    assert re.match(r"-rw-r-----\.? 1 root prometheus ", found)
    assert KEY not in host.check_output("cat /etc/monitoring/*.yml; ps axww -o args; systemctl show prometheus")
    assert host.check_output("su -s /bin/sh nobody -c 'cat /etc/monitoring/prometheus.yml 2>&1 || true'").endswith(
        "Permission denied"
    )


def test_every_alert_fires_when_it_must_and_rests_otherwise(host: Any, tmp_path: Path) -> None:
    host.run("rm -rf /root/rules && mkdir /root/rules")
    for name in ("molecule/monitoring/rules_test.yml", "roles/monitoring/files/rules.yml"):
        text = (ROOT / name).read_text()
        host.check_output(f"cat > /root/rules/{Path(name).name} <<'END_OF_FILE'\n{text}\nEND_OF_FILE")
    tested = host.run("cd /root/rules && promtool test rules rules_test.yml")
    assert tested.rc == 0, tested.stdout + tested.stderr


def test_every_panel_of_the_dashboard_has_something_to_show(host: Any) -> None:
    host.check_output("mkdir -p /var/backups/open-webui && touch /var/backups/open-webui/open-webui-1.tar.gz")
    until(host, "selfhost_backup_timestamp_seconds")
    # A rate wants two looks within its time.
    until(host, "engine:tokens:rate")
    board = json.loads((ROOT / "roles/monitoring/files/dashboards/fleet.json").read_text())
    shown = [target["expr"].replace("$host", ".*") for panel in board["panels"] for target in panel.get("targets", [])]
    assert len(shown) > 20
    # No https here, so no certificate.
    shown = [query for query in shown if "probe_ssl_earliest_cert_expiry" not in query]
    assert [query for query, found in answers(host, shown).items() if not found] == []


def test_every_rule_names_metrics_that_exist(host: Any) -> None:
    rules = yaml.safe_load((ROOT / "roles/monitoring/files/rules.yml").read_text())
    text = " ".join(rule["expr"] for group in rules["groups"] for rule in group["rules"])
    named = set(re.findall(r"\b(?:lmdeploy:|llamacpp:|engine:|haproxy_|node_|selfhost_|probe_)[\w:]+", text))
    known = {sample["metric"]["__name__"] for sample in ask(host, '{__name__!=""}')}
    # What this host can't have: a certificate; drift is told by a playbook.
    known |= {"probe_ssl_earliest_cert_expiry", "selfhost_drift_changes"}
    assert named - known == set()
    assert len(named) > 25


def test_an_alert_comes_when_the_engine_dies_and_goes_when_it_is_back(host: Any) -> None:
    host.check_output("systemctl stop api-server.service")
    began = time.monotonic()
    until(host, 'ALERTS{alertname="EngineDown",alertstate="firing",host="mol-monitoring"}')
    print(f"EngineDown after {time.monotonic() - began:.1f} s")
    host.check_output("systemctl start api-server.service")
    until(host, 'ALERTS{alertname="EngineDown",alertstate="firing"}', there=False)
    until(host, 'up{job="engine"} == 1')


def test_a_backup_that_only_its_own_user_may_read_is_seen(host: Any) -> None:
    host.check_output("chmod 0700 /var/backups/open-webui && touch -d @1000000000 /var/backups/open-webui/*")
    assert until(host, "selfhost_backup_timestamp_seconds == 1000000000")


def test_a_broken_driver_is_seen(host: Any) -> None:
    host.check_output("mv /srv/recorded/h100.csv /srv/recorded/away")
    until(host, "selfhost_gpu_scrape_success == 0")
    host.check_output("mv /srv/recorded/away /srv/recorded/h100.csv")
    until(host, "selfhost_gpu_scrape_success == 1")


def playbook(name: str, **variables: object) -> str:
    """Run a playbook as a person does, and return what it said."""
    command = [str(Path(sys.executable).with_name("ansible-playbook")), str(ROOT / "playbooks" / name)]
    command += ["-i", str(ROOT / "molecule/inventory/hosts.yml"), "--limit", "mol-monitoring"]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"}
    done = subprocess.run(
        [*command, "-e", json.dumps(variables)], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_drift_is_told(host: Any, tmp_path: Path) -> None:
    # A module of the collection: the run inside is to find what this one finds.
    task = {"selfhost.lmdeploy.config_files": {"files": [{"path": "/root/drifted", "content": "x"}]}}
    play = {"hosts": "mol-monitoring", "gather_facts": False, "tasks": [task, task]}
    (tmp_path / "site.yml").write_text(json.dumps([play]))
    playbook("drift.yml", drift_playbook=str(tmp_path / "site.yml"))
    until(host, "selfhost_drift_changes == 2")
    assert not host.file("/root/drifted").exists


def test_a_report_for_strangers_holds_no_key(host: Any, tmp_path: Path) -> None:
    host.check_output(f"systemd-run --unit prometheus-talker --property RemainAfterExit=yes echo the key is {KEY}")
    playbook("doctor.yml", doctor_file=str(tmp_path / "report.md"))
    text = (tmp_path / "report.md").read_text()
    for word in ("## mol-monitoring", "### api-server.service", "SmolLM2-135M-Instruct", "127.0.0.1:9090", "### Disks"):
        assert word in text
    assert "the key is (hidden)" in text
    assert KEY not in text


def test_a_change_is_reloaded_and_what_promtool_refuses_changes_nothing(host: Any, play: Callable[..., Any]) -> None:
    pid = host.check_output("systemctl show --property MainPID --value prometheus.service")
    changed = {**VARIABLES, "monitoring_alerts": {"EngineDown": {"expr": 'up{job="engine"} == ('}}}
    assert "rules.yml" in play("monitoring", **changed).message()
    assert "== (" not in host.file("/etc/monitoring/rules.yml").content_string
    changed["monitoring_alerts"] = {"Drift": {"enabled": False}}
    assert play("monitoring", **changed).changed() == 2
    assert "Drift" not in host.file("/etc/monitoring/rules.yml").content_string
    assert host.check_output("systemctl show --property MainPID --value prometheus.service") == pid
    assert play("monitoring", check=True, **changed).changed() == 0


def test_an_exporter_that_dies_at_once_fails_the_run_with_its_journal(host: Any, play: Callable[..., Any]) -> None:
    said = play("monitoring", "exporters", **VARIABLES, monitoring_exporter_port=1).message()
    assert "prometheus-node-exporter.service did not get to started" in said
    assert "127.0.0.1:1: bind: permission denied" in said


def test_uninstalling_keeps_the_measurements(host: Any, play: Callable[..., Any]) -> None:
    assert play("monitoring", "uninstall").changed() > 0
    left = host.check_output("ls -d /etc/monitoring /usr/local/lib/monitoring /etc/systemd/system/prometheus* || true")
    assert left == ""
    assert host.file("/var/lib/monitoring/data").exists
    # The packages' own files, and the measurements.
    assert play("monitoring", "uninstall", monitoring_data_removed=True).changed() == 2
    assert host.check_output("ls -d /var/lib/monitoring /etc/default/prometheus* || true") == ""
