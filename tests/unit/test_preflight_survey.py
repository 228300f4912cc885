"""The parsers of preflight's survey: /proc, /etc and nvidia-smi."""

from __future__ import annotations

import ipaddress
import struct

import preflight_hosts as hosts
import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import preflight_survey as facts
from hypothesis import given
from hypothesis import strategies as st

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def socket_line(address: bytes, port: int, state: str, inode: int) -> str:
    """Return a line of /proc/net/tcp or tcp6 as a little-endian kernel prints it."""
    words = struct.unpack(f"<{len(address) // 4}I", address)
    place = "".join(f"{word:08X}" for word in words) + f":{port:04X}"
    return (
        f"   0: {place} {'0' * 8}:0000 {state} 00000000:00000000 00:00000000 00000000     0        0 {inode} 1 0 100\n"
    )


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)), st.integers(1, 65535), st.integers(1, 2**31))
def test_a_listening_socket_is_read_back(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int, inode: int
) -> None:
    mapped = getattr(address, "ipv4_mapped", None)
    text = HEAD + socket_line(address.packed, port, "0A", inode) + socket_line(address.packed, port, "01", inode + 1)
    assert facts.parse_listeners(text) == [(str(mapped or address), port, inode)]


def test_the_unit_of_a_process_is_the_innermost_service() -> None:
    assert facts.unit_of_cgroup("0::/system.slice/ssh.service\n") == "ssh.service"
    nested = "0::/user.slice/user-1000.slice/user@1000.service/app.slice/jupyter.service/worker\n"
    assert facts.unit_of_cgroup(nested) == "jupyter.service"
    assert facts.unit_of_cgroup("0::/user.slice/user-0.slice/session-3.scope\n") == "session-3.scope"
    assert facts.unit_of_cgroup("0::/\n") == ""


def test_the_file_system_is_that_of_the_innermost_mount() -> None:
    mounts = (
        "/dev/a / ext4 rw 0 0\nsrv:/x /srv nfs4 rw 0 0\n/dev/b /srv/fast xfs rw 0 0\n/dev/c /my\\040disk vfat rw 0 0\n"
    )
    assert facts.file_system_of("/var/lib", mounts) == "ext4"
    assert facts.file_system_of("/srv", mounts) == "nfs4"
    assert facts.file_system_of("/srv/fast/models", mounts) == "xfs"
    assert facts.file_system_of("/srv/faster", mounts) == "nfs4"
    assert facts.file_system_of("/my disk/x", mounts) == "vfat"


def test_os_release_and_meminfo() -> None:
    assert facts.parse_os_release('ID=debian\nVERSION_ID="12"\n# x\n') == {"ID": "debian", "VERSION_ID": "12"}
    assert facts.parse_meminfo("MemTotal:        8 kB\nMemAvailable:    4 kB\nHugePages_Total:  0\n") == {
        "MemTotal": 8192,
        "MemAvailable": 4096,
    }


def test_wsl_conf_asks_for_systemd_below_boot_only() -> None:
    assert facts.wsl_conf_systemd("[boot]\nsystemd = true # on\n")
    assert not facts.wsl_conf_systemd("[user]\nsystemd=true\n[boot]\nsystemd=false\n")
    assert not facts.wsl_conf_systemd("")


def test_systemctl_show_gives_a_block_for_each_unit() -> None:
    text = "Id=a.service\nActiveState=active\n\nId=b.service\nActiveState=failed"
    assert [block["Id"] for block in facts.parse_properties(text)] == ["a.service", "b.service"]


def test_a_recorded_pair_of_cards() -> None:
    gpu = hosts.machine("h200_pair_recorded")
    assert [(card["index"], card["name"], card["memory_mib"], card["used_mib"]) for card in gpu["cards"]] == [
        (0, "NVIDIA H200", 143771, 1643),
        (1, "NVIDIA H200", 143771, 1643),
    ]
    assert gpu["cards"][0]["driver"] == "580.159.04"
    assert gpu["cards"][0]["compute_capability"] == "9.0"
    assert not gpu["cards"][0]["mig"]
    assert [(process["pid"], process["process"], process["used_mib"]) for process in gpu["processes"]] == [
        (547, "python3", 1634),
        (547, "python3", 1634),
    ]
    assert gpu["links"] == [{"first": 0, "second": 1, "link": "NV18"}]


def test_topology_lists_each_pair_once_also_without_its_first_tab() -> None:
    text = (hosts.MACHINES / "h100_8_nvlink" / "topology.txt").read_text()
    assert len(facts.parse_topology(text)) == 28
    assert facts.parse_topology(text.strip()) == facts.parse_topology(text)
    assert facts.parse_topology("nvidia-smi: error\n") == []


def test_topology_tells_the_node_and_the_cpus_of_each_card() -> None:
    def nodes(name: str) -> dict[int, tuple[int, str]]:
        return facts.parse_nodes((hosts.MACHINES / name / "topology.txt").read_text())

    assert nodes("v100_8_mesh")[4] == (1, "20-39,60-79")
    assert nodes("a100_8_four_nodes")[2] == (1, "8-15,72-79")
    assert nodes("h100_4_small_nodes")[2] == (7, "7,15,23,31")
    assert nodes("v100_4_no_nodes") == dict.fromkeys(range(4), (-1, "0-31"))
    assert nodes("rtx3090_8_switches")[7] == (-1, "14-27"), "an old driver tells no nodes"
    one = "\t\x1b[4mGPU0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\nGPU0\t X \t0-15\t0-1\t\tN/A\n"
    assert facts.parse_nodes(one) == {0: (-1, "0-15")}, "a card between two nodes"


def test_a_lost_card_keeps_its_number_and_has_its_fault() -> None:
    cards = hosts.machine("h100_8_one_lost")["cards"]
    assert [(card["index"], card["fault"]) for card in cards[4:7]] == [(4, ""), (5, "GPU is lost"), (6, "")]
    gone = hosts.machine("rtx3090_4_one_gone")
    assert len(gone["cards"]) == 3
    assert gone["lost"] == ["Unable to determine the device handle for GPU2: 0000:81:00.0: Unknown Error"]
    text = "[Unknown Error], GPU-1, NVIDIA L4, 1.1, [Unknown Error], 1, [N/A], 8.9\n"
    assert [(card["index"], card["fault"]) for card in facts.parse_gpus(text)] == [(0, "Unknown Error")]


def test_what_the_driver_does_not_tell_is_marked() -> None:
    wsl = hosts.machine("wsl_rtx4090")
    assert wsl["processes"][0]["used_mib"] == -1
    assert hosts.machine("gtx1080_driver470")["cards"][0]["compute_capability"] == ""
    assert hosts.machine("h100_mig")["cards"][0]["mig"]


def test_a_process_name_may_hold_commas() -> None:
    assert hosts.machine("rtx4090_desktop")["processes"][0]["process"] == "/opt/games/bin/render, preview"


@given(st.text())
def test_no_text_breaks_a_parser(text: str) -> None:
    facts.parse_gpus(text)
    facts.parse_gpu_processes(text)
    facts.parse_topology(text)
    facts.parse_nodes(text)
    facts.parse_lost(text)
    facts.parse_properties(text)
    facts.unit_of_cgroup(text)
    facts.file_system_of("/x", text)
    facts.wsl_conf_systemd(text)


@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_no_config_breaks_the_reading_of_a_model(config: object) -> None:
    assert facts.model_facts(config, 1)["weight_bytes"] == 1


@pytest.mark.parametrize("key", ["llm_config", "text_config", None])
def test_a_models_config_may_nest_its_language_part(key: str | None) -> None:
    part = {"num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "hidden_size": 5120}
    read = facts.model_facts({key: part, "num_hidden_layers": 1} if key else part, 30)
    assert (read["layers"], read["heads"], read["kv_heads"], read["head_dim"]) == (48, 40, 8, 128)
