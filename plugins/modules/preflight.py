#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Documentation of the action plugin preflight, which runs on the controller and calls the module host_survey."""

from __future__ import annotations

DOCUMENTATION = r"""
module: preflight
short_description: Find everything that would fail on a host before anything is changed
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Checks the variables of the roles that are to run on a host against the roles' argument specs, against each other
    and against the host, which is looked at in one call of M(selfhost.lmdeploy.host_survey).
  - Fails once, with all findings, each with the variable, its value, the cause and a way out. Warnings don't fail.
  - Changes nothing, needs no facts and nothing of this collection on the host. Values of secrets never appear.
options:
  roles:
    description:
      - Roles of this collection that will run on the host. With C(api_server) the role of the engine, which
        C(api_server_engine) names, is added.
    type: list
    elements: str
    required: true
  model_servers:
    description: Hosts that run engines, to which the host's Open WebUI connects.
    type: list
    elements: str
    default: []
  skipped_checks:
    description:
      - Identifiers of checks whose findings don't count.
      - "C(admin_password): a given administrator's password has at least 12 characters."
      - "C(api_key): a given key has at least 32 characters."
      - "C(architecture): engine and installer exist for the host's processor."
      - "C(chat_template): the chat template is one that the wanted LMDeploy knows."
      - "C(clock): the host's clock agrees with the controller's."
      - "C(compute_capability): the wheels carry code for the cards."
      - "C(data_dir): data and models lie outside of conda's folder, the database on a local disk."
      - "C(disk): there is room for what is not there yet."
      - "C(engine_unknown): warning: nothing is known about this LMDeploy's command line."
      - "C(env_shared): each program has a conda environment of its own."
      - "C(exposed): warning: an engine is open to every network."
      - "C(flag): extra arguments are known to the wanted LMDeploy and not set by a variable."
      - "C(gpu_busy): warning: others compute on the engine's cards."
      - "C(gpu_driver): NVIDIA's driver answers and is new enough for the wheels."
      - "C(gpu_idle): warning: cards stay without work, with the reason."
      - "C(gpu_index): the cards that an instance names exist."
      - "C(gpu_lost): every card answers; an error only where an instance names the lost one."
      - "C(gpu_missing): a host of LMDeploy has an NVIDIA card."
      - "C(gpu_mixed): warning: one engine runs on unequal cards."
      - "C(gpu_shared): engines on one card have cache ratios that fit together."
      - "C(gpu_topology): warning: one engine's cards talk across processors."
      - "C(hostile_text): names, paths and addresses hold nothing that means more in a unit or an environment file."
      - "C(instance_name): names of instances are plain and stand once."
      - "C(libc): the host's glibc is new enough for LMDeploy's wheels."
      - "C(lock): the lock exists, pins the wanted version and has a hash for every requirement."
      - "C(loopback): a web host can reach the engines of other hosts."
      - "C(memory): the model and one whole session fit into the cards' memory, or into the host's on the CPU."
      - "C(memory_host): warning: loading the model wants more memory than the host has."
      - "C(mig): the engine's cards are not cut into slices."
      - "C(mirror): every place that something must still be fetched from answers."
      - "C(model_format): llama.cpp gets a GGUF file, LMDeploy none."
      - "C(model_missing): a model that is a path or a file is on the host, or a package brings it."
      - "C(nodes): hosts that serve one model together agree on it."
      - "C(number): numbers are 0 or more, and not beyond what programs hold."
      - "C(os): the operating system is one that the roles are tested on."
      - "C(path): paths are absolute."
      - "C(port_clash): no two of our services want one port."
      - "C(port_held): nobody else listens on our ports."
      - "C(port_privileged): ports are not among those that are root's."
      - "C(port_range): a port is a number from 1 to 65535."
      - "C(privilege): the tasks run as root."
      - "C(reasoning_parser): the reasoning parser is one that the wanted LMDeploy knows."
      - "C(role_rule): what a role itself would refuse later."
      - "C(sha256): a SHA-256 is 64 hexadecimal digits."
      - "C(shm): shared memory is 1 GiB or more where an engine runs on several cards."
      - "C(survey): the host could be looked at."
      - "C(systemd): systemd runs the host."
      - "C(tool_call_parser): the tool call parser is one that the wanted LMDeploy knows."
      - "C(tp_form): tp is auto or a power of two."
      - "C(tp_gpus): tp is not above the number of cards."
      - "C(tp_heads): the model's attention can be split over tp cards."
      - "C(url): an address has a scheme and a host."
      - "C(variable_invalid): each value fits the type and the choices in its role's argument spec."
      - "C(variable_template): each value can be computed."
      - "C(variable_unknown): each variable with a prefix of ours exists."
      - "C(version_floor): no release below the security floor."
      - "C(wsl_driver): no Linux driver is installed inside WSL."
      - "C(wsl_models): on WSL the models lie on the Linux disk."
      - "C(wsl_tp): warning: one engine on several cards under WSL."
    type: list
    elements: str
    default: []
  report_dir:
    description: Folder on the controller that gets a JSON report C(HOST.json); empty writes none.
    type: str
    default: ''
  timeout_seconds:
    description: Seconds that mirrors may take to answer, all together.
    type: float
    default: 4.0
  others:
    description:
      - Hosts of the inventory that tell this one something, such as addresses and keys of engines. It is left alone
        only where they are as they were, too.
    type: list
    elements: str
    default: []
  settled_hours:
    description:
      - How long a host that a whole run found as wanted may be left alone; see M(selfhost.lmdeploy.settled_hosts).
    type: float
    default: 24.0
attributes:
  check_mode:
    support: full
    description: Never changes anything on the host.
"""

EXAMPLES = r"""
- name: Find what would fail
  selfhost.lmdeploy.preflight:
    roles: [mirrors, miniconda, conda_env, model_weights, api_server]
"""

RETURN = r"""
findings:
  description: Errors, then warnings.
  returned: when the task is registered
  type: list
  elements: dict
  contains:
    check:
      description: Identifier of the check, for O(skipped_checks).
      type: str
    severity:
      description: C(error) or C(warning).
      type: str
    variable:
      description: The variable at fault.
      type: str
    value:
      description: Its value; secrets are hidden.
      type: str
    host:
      description: The host in the inventory.
      type: str
    message:
      description: The cause.
      type: str
    fix:
      description: The way out.
      type: str
engine:
  description: The engine of the host, C(lmdeploy) or C(llama_cpp); empty where none is wanted.
  returned: always
  type: str
tp:
  description: For each unit of LMDeploy the number of cards that it will use.
  returned: when the engine is LMDeploy
  type: dict
gpus:
  description: For each unit of LMDeploy the numbers of the cards that it will use.
  returned: when the engine is LMDeploy
  type: dict
report:
  description: Path of the report on the controller.
  returned: when O(report_dir) is set
  type: str
"""
