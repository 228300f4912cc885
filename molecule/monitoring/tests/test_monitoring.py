"""What a person who watches a fleet notices: true figures, alerts that come and go, closed doors, no shown key."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
VARIABLES = yaml.safe_load((ROOT / "molecule/monitoring/vars.yml").read_text())
KEY = VARIABLES["api_server_api_key"]
VARIABLES["monitoring_targets"][0]["api_key"] = KEY
UNITS = ("prometheus", "prometheus-node-exporter", "prometheus-blackbox-exporter")
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
    assert until(host, 'selfhost_release_info{unit="api-server.service"}')
    assert until(host, 'node_systemd_unit_state{name="api-server.service",state="active"} == 1')


@pytest.mark.parametrize("unit", UNITS)
def test_units_are_closed(host: Any, unit: str) -> None:
    security = host.run(f"systemd-analyze security --no-pager {unit}.service").stdout
    score = float(re.search(r"Overall exposure level for \S+: ([0-9.]+)", security)[1])
    print(f"{unit}: {score}")
    assert score <= 2.0, security


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


def expressions() -> list[str]:
    """Return the expressions of dashboards and rules."""
    board = json.loads((ROOT / "roles/monitoring/files/dashboards/fleet.json").read_text())
    shown = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    rules = yaml.safe_load((ROOT / "roles/monitoring/files/rules.yml").read_text())
    return [*shown, *(rule["expr"] for group in rules["groups"] for rule in group["rules"])]


def test_every_expression_names_metrics_that_exist(host: Any) -> None:
    rules = {
        "groups": [
            {"name": "all", "rules": [{"record": f"x{n}", "expr": expr} for n, expr in enumerate(expressions())]}
        ]
    }
    text = json.dumps(rules)
    checked = host.run(f"cat > /root/all.yml <<'END_OF_FILE'\n{text}\nEND_OF_FILE\npromtool check rules /root/all.yml")
    assert "SUCCESS" in checked.stdout, checked.stdout + checked.stderr
    recorded = "".join(path.read_text() for path in (ROOT / "tests/unit/fixtures/metrics").glob("*.txt"))
    known = {line.split()[1] for line in recorded.splitlines()}
    known |= {sample["metric"]["__name__"] for sample in ask(host, '{__name__!=""}')}
    # What this host can't have: GPUs, a certificate, drift.
    known |= set(re.findall(r"selfhost_\w+", (ROOT / "roles/monitoring/files/collector.py").read_text()))
    known |= {"probe_ssl_earliest_cert_expiry", "selfhost_drift_changes"}
    named = set(re.findall(r"\b(?:lmdeploy:|llamacpp:|engine:|haproxy_|node_|selfhost_|probe_)[\w:]+", text))
    assert {name.removesuffix("_bucket") for name in named} - known == set()
    assert len(named) > 30


def test_an_alert_comes_when_the_engine_dies_and_goes_when_it_is_back(host: Any) -> None:
    host.check_output("systemctl stop api-server.service")
    began = time.monotonic()
    until(host, 'ALERTS{alertname="EngineDown",alertstate="firing",host="mol-monitoring"}')
    print(f"EngineDown after {time.monotonic() - began:.1f} s")
    host.check_output("systemctl start api-server.service")
    until(host, 'ALERTS{alertname="EngineDown",alertstate="firing"}', there=False)
    until(host, 'up{job="engine"} == 1')


def test_a_new_backup_is_seen(host: Any) -> None:
    assert ask(host, "selfhost_backup_timestamp_seconds") == []
    host.check_output("mkdir -p /var/backups && touch /var/backups/selfhost-1.tar")
    assert until(host, "selfhost_backup_timestamp_seconds > 0")


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


def test_uninstalling_keeps_the_measurements(host: Any, play: Callable[..., Any]) -> None:
    assert play("monitoring", "uninstall").changed() > 0
    left = host.check_output("ls -d /etc/monitoring /usr/local/lib/monitoring /etc/systemd/system/prometheus* || true")
    assert left == ""
    assert host.file("/var/lib/monitoring/data").exists
    assert play("monitoring", "uninstall", monitoring_data_removed=True).changed() == 1
    assert not host.file("/var/lib/monitoring").exists
