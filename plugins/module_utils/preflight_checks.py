# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""All checks in their order, and what people read of their findings. Pure, no Ansible."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_desired import ERROR, Finding, cleaned
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_gpu import CPU_CHECKS, GPU_CHECKS
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_host import HOST_CHECKS
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_values import (
    VALUE_CHECKS,
    check_rules_of_roles,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_desired import Desired
    from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_survey import Survey

# Every check by its id, which preflight_skipped_checks takes.
CHECKS = {
    "admin_password": "a given administrator's password has at least 12 characters",
    "api_key": "a given key has at least 32 characters",
    "architecture": "engine and installer exist for the host's processor",
    "chat_template": "the chat template is one that the wanted LMDeploy knows",
    "clock": "the host's clock agrees with the controller's",
    "compute_capability": "the wheels carry code for the cards",
    "data_dir": "data and models lie outside of conda's folder, the database on a local disk",
    "disk": "there is room for what is not there yet",
    "engine_unknown": "warning: nothing is known about this LMDeploy's command line",
    "env_shared": "each program has a conda environment of its own",
    "exposed": "warning: an engine is open to every network",
    "flag": "extra arguments are known to the wanted LMDeploy and not set by a variable",
    "gpu_busy": "warning: others compute on the engine's cards",
    "gpu_driver": "NVIDIA's driver answers and is new enough for the wheels",
    "gpu_idle": "warning: cards stay without work, with the reason",
    "gpu_index": "the cards that an instance names exist",
    "gpu_lost": "every card answers; an error only where an instance names the lost one",
    "gpu_missing": "a host of LMDeploy has an NVIDIA card",
    "gpu_mixed": "warning: one engine runs on unequal cards",
    "gpu_shared": "engines on one card have cache ratios that fit together",
    "gpu_topology": "warning: one engine's cards talk across processors",
    "hostile_text": "names, paths and addresses hold nothing that means more in a unit or an environment file",
    "instance_name": "names of instances are plain and stand once",
    "libc": "the host's glibc is new enough for LMDeploy's wheels",
    "lock": "the lock exists, pins the wanted version and has a hash for every requirement",
    "loopback": "a web host can reach the engines of other hosts",
    "memory": "the model and one whole session fit into the cards' memory, or into the host's on the CPU",
    "memory_host": "warning: loading the model wants more memory than the host has",
    "mig": "the engine's cards are not cut into slices",
    "mirror": "every place that something must still be fetched from answers",
    "model_format": "llama.cpp gets a GGUF file, LMDeploy none",
    "model_missing": "a model that is a path or a file is on the host, or a package brings it",
    "nodes": "hosts that serve one model together agree on it",
    "number": "numbers are 0 or more, and not beyond what programs hold",
    "os": "the operating system is one that the roles are tested on",
    "path": "paths are absolute",
    "port_clash": "no two of our services want one port",
    "port_held": "nobody else listens on our ports",
    "port_privileged": "ports are not among those that are root's",
    "port_range": "a port is a number from 1 to 65535",
    "privilege": "the tasks run as root",
    "reasoning_parser": "the reasoning parser is one that the wanted LMDeploy knows",
    "role_rule": "what a role itself would refuse later",
    "sha256": "a SHA-256 is 64 hexadecimal digits",
    "shm": "shared memory is 1 GiB or more where an engine runs on several cards",
    "survey": "the host could be looked at",
    "systemd": "systemd runs the host",
    "tool_call_parser": "the tool call parser is one that the wanted LMDeploy knows",
    "tp_form": "tp is auto or a power of two",
    "tp_gpus": "tp is not above the number of cards",
    "tp_heads": "the model's attention can be split over tp cards",
    "url": "an address has a scheme and a host",
    "variable_invalid": "each value fits the type and the choices in its role's argument spec",
    "variable_template": "each value can be computed",
    "variable_unknown": "each variable with a prefix of ours exists",
    "version_floor": "no release below the security floor",
    "wsl_driver": "no Linux driver is installed inside WSL",
    "wsl_models": "on WSL the models lie on the Linux disk",
    "wsl_tp": "warning: one engine on several cards under WSL",
}


def judge(desired: Desired, survey: Survey | None) -> list[Finding]:
    """Return every finding; without a survey only those that the inventory alone shows."""
    found = [finding for check in VALUE_CHECKS for finding in check(desired)]
    found += check_rules_of_roles(desired, found)
    if survey is not None:
        found += [finding for check in HOST_CHECKS for finding in check(desired, survey)]
        checks = {"lmdeploy": GPU_CHECKS, "llama_cpp": CPU_CHECKS}.get(desired.engine, ())
        if "api_server" in desired.roles:
            found += [finding for check in checks for finding in check(desired, survey)]
    return found


def without_secrets(findings: Iterable[Finding], secrets: Sequence[str]) -> list[Finding]:
    """Return the findings with every secret in every text hidden, each finding once."""
    unique: dict[Finding, None] = {}
    for finding in findings:
        texts = {name: cleaned(getattr(finding, name), secrets) for name in ("value", "message", "fix")}
        unique[replace(finding, **texts)] = None
    return list(unique)


def split(findings: Iterable[Finding], skipped: Iterable[str]) -> tuple[list[Finding], list[Finding]]:
    """Return errors and warnings, without those of the skipped checks."""
    kept = [finding for finding in findings if finding.check not in set(skipped)]
    return [f for f in kept if f.severity == ERROR], [f for f in kept if f.severity != ERROR]


def block(finding: Finding) -> str:
    """Return a finding as people read it."""
    return (
        f"{finding.variable} = {finding.value}\n"
        f"    Why: {finding.message}\n"
        f"    Fix: {finding.fix}\n"
        f"    (host {finding.host}, check {finding.check})"
    )


def report(errors: Sequence[Finding], host: str) -> str:
    """Return the one message of a host that did not pass."""
    count = "1 fault" if len(errors) == 1 else f"{len(errors)} faults"
    blocks = "\n".join(f"{number}. {block(finding)}" for number, finding in enumerate(errors, 1))
    return f"{count} on {host}; nothing was changed.\n{blocks}"


def as_json(findings: Iterable[Finding]) -> list[dict[str, str]]:
    """Return the findings as data for reports."""
    return [asdict(finding) for finding in findings]
