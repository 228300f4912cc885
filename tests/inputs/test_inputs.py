"""Inventories with faults: each is refused with the name of a variable, or accepted and harmless.

INPUTS is how many (150; script/test --full takes 1,000), INPUTS_SEED which ones. The counts are printed.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import figures
import pytest
from generate import BASES, Case, cases, catalogue
from judge import Harm, Verdict, verdict, verify

COUNT = int(os.environ.get("INPUTS", "1000" if os.environ.get("TEST_FULL") == "1" else "150"))
SEED = int(os.environ.get("INPUTS_SEED", "5"))
# Refused whatever else is so: the role that would read them runs on every host here.
ALWAYS_REFUSED = {"unknown", "missing", "choice"}
NOT_PLAYED = ("lmdeploy_", "llama_cpp_")


def names(variable: str) -> tuple[str, ...]:
    """Return what a message may call a variable: an engine's setting is also one of a named instance."""
    return (variable, f"].{variable.removeprefix('api_server_')} ")


def judged(case: Case) -> tuple[Verdict | None, str]:
    """Return the verdict, and what is wrong with it."""
    try:
        found = verdict(case)
    except Harm as harm:
        return None, f"HARM {harm}"
    except Exception as error:  # noqa: BLE001  # whatever breaks is what this test looks for
        return None, f"BROKE {type(error).__name__}: {str(error)[:300]}"
    if "Traceback" in found.message:
        return found, "a traceback"
    if found.refused and not any(word in found.message for fault in case.faults for word in names(fault.variable)):
        return found, f"refused without the variable's name: {found.message[:400]}"
    strict = [f for f in case.faults if f.kind in ALWAYS_REFUSED and not f.variable.startswith(NOT_PLAYED)]
    if not found.refused and strict:
        return found, f"accepted, though {strict[0].variable} is {strict[0].kind}"
    return found, ""


@pytest.mark.parametrize("base", sorted(BASES))
def test_an_inventory_without_faults_is_accepted(base: str) -> None:
    found = verdict(Case(0, base, BASES[base], (), trusted=True))
    assert not found.refused, found.message


def test_every_kind_of_fault_is_known() -> None:
    known = {kind: len(faults) for kind, faults in catalogue().items()}
    assert set(known) == {"type", "range", "choice", "hostile", "missing", "unknown", "contradiction"}
    assert sum(known.values()) > 1000, known


def test_faulty_inventories_are_refused_by_name_or_harmless(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fates: Counter[str] = Counter()
    kinds: Counter[tuple[str, str]] = Counter()
    wrong: list[str] = []
    units: dict[str, str] = {}
    for case in cases(COUNT, SEED):
        found, fault = judged(case)
        if fault:
            wrong.append(f"{case}\n    {fault}")
        fate = "wrong" if fault or found is None else "refused" if found.refused else "accepted"
        fates[fate] += 1
        kinds.update((each.kind, fate) for each in case.faults)
        if found and found.files:
            for name, text in found.files.units.items():
                if text not in units.values():
                    units[f"case-{case.number}-{name}"] = text
    said = verify(units, tmp_path)
    with capsys.disabled():
        print(f"\ninputs: {sum(fates.values())} inventories, seed {SEED}: {dict(sorted(fates.items()))};", end=" ")
        print(f"{len(units)} different units verified by systemd")
        for kind in sorted({kind for kind, _ in kinds}):
            print(f"  {kind:14}", {fate: n for (k, fate), n in sorted(kinds.items()) if k == kind})
    figures.note("inputs", seed=SEED, units_verified=len(units), **{"refused": 0, "accepted": 0, "wrong": 0, **fates})
    assert not wrong, f"{len(wrong)} of {COUNT}:\n" + "\n".join(wrong)
    assert not said, "\n".join(said)
