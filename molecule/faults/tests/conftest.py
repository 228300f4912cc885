"""Counts the faults for `script/bench trust`: each test is one, but for those that cut at many moments."""

from __future__ import annotations

import figures
import pytest

# Counted by the campaign of moments itself.
MOMENTS = ("test_after_a_cut_at_any_moment", "test_a_redeploy_that_was_cut")
FATES: dict[str, str] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember how a test ended; one that was left out is no fault."""
    name = report.nodeid.partition("::")[2]
    if not name.startswith(MOMENTS) and not report.skipped and (report.when == "call" or report.failed):
        FATES[name] = "survived" if report.passed else "not survived"


def pytest_sessionfinish() -> None:
    """Keep the figures; of a fault that was not tried in this run, those of the run before."""
    if FATES:
        fates = {**figures.noted().get("faults", {}).get("fates", {}), **FATES}
        survived = [name for name, fate in fates.items() if fate == "survived"]
        figures.note("faults", tried=len(fates), survived=len(survived), fates=fates)
