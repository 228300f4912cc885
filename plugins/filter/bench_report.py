# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Figures of a bench for people, compared with the last run."""

from __future__ import annotations

DOCUMENTATION = r"""
name: bench_report
short_description: Return the figures of a bench as a table and a plot, compared with the last run
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Levels of two runs are compared when host, address, model, kind and number of clients are the same.
positional: last
options:
  _input:
    description: A run, with C(moment) and C(levels); a level is what M(selfhost.lmdeploy.engine_bench) returned, with
      C(host).
    type: dict
    required: true
  last:
    description: The last run; empty without one.
    type: dict
    default: {}
"""

EXAMPLES = r"""
- name: Show the figures
  ansible.builtin.debug:
    msg: "{{ (run | selfhost.lmdeploy.bench_report(last)).table }}"
"""

RETURN = r"""
_value:
  description: C(table), lines of text; C(plot), an SVG picture with the last run dashed; C(run), the run with C(change)
    of each level, in percent; C(bad), the number of answers that were not good.
  type: dict
"""

from typing import TYPE_CHECKING, Any

from ansible_collections.selfhost.lmdeploy.plugins.module_utils import bench

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def bench_report(run: Mapping[str, Any], last: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the report (see DOCUMENTATION)."""
    bad = sum(level["requests"] - level["good"] for level in run["levels"])
    last = last or {}
    told = {"table": bench.table(run, last), "plot": bench.plot(run, last), "run": bench.compared(run, last)}
    return {**told, "bad": bad}


class FilterModule:
    """Ansible's way in."""

    def filters(self) -> dict[str, Callable[..., dict[str, Any]]]:
        """Return the filter by its name."""
        return {"bench_report": bench_report}
