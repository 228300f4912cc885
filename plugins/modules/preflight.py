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
    description: Identifiers of checks whose findings don't count.
    type: list
    elements: str
    default: []
  report_dir:
    description: Folder on the controller that gets a JSON report C(HOST.json); empty writes none.
    type: str
    default: ''
  timeout_seconds:
    description: Seconds that mirrors and nvidia-smi may take to answer.
    type: float
    default: 4.0
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
report:
  description: Path of the report on the controller.
  returned: when O(report_dir) is set
  type: str
"""
