"""docs/DOCTOR.md names every rule and every known failure, and nothing that is not there."""

import re
from itertools import chain
from pathlib import Path

from ardor.doctor.repair import REPAIRS
from ardor.doctor.rules import RULES, SUBJECTS

from . import cases_text, test_adapters, test_behaviour, test_data, test_rules, test_runs

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "DOCTOR.md").read_text()
TABLE = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if line.startswith("| ")]
COUNTS = {"A": 14, "B": 11, "C": 14, "D": 8, "E": 9, "F": 10, "G": 6, "H": 24, "I": 7}
ITEMS = [f"{letter}{i}" for letter, count in COUNTS.items() for i in range(1, count + 1)]
ITEMS += [f"T{i:02}" for i in range(1, 36)]


def test_every_rule_has_its_line_with_what_its_docstring_says():
    said = {cells[1].strip("`"): cells for cells in TABLE if cells[0] in SUBJECTS}
    assert [*said] == [*RULES]
    for name, rule in RULES.items():
        first = re.sub(r"\s+", " ", (rule.__doc__ or "").strip().partition("\n\n")[0])
        assert said[name][2] == first and (said[name][-1] == "yes") is (name in REPAIRS), name


def test_every_known_failure_has_its_line():
    lines = {cells[0]: cells[2] for cells in TABLE if re.fullmatch(r"[A-IT]\d+", cells[0])}
    assert [*lines] == ITEMS
    for item, where in lines.items():
        named = re.findall(r"`([^`]+)`", where)
        assert named or where in ("there is none", "FSDP is not built yet"), item
        for name in named:
            file, _, test = name.partition("::")
            if file.startswith("tests/"):
                assert not test or f"def {test}(" in (ROOT / file).read_text(), name
                assert (ROOT / file).exists(), name
            else:
                facts = ("padding", "limits", "ids", "tokens", "doctor --fix")
                assert name in RULES or name in facts, name


def test_every_rule_has_a_case_that_triggers_it_and_one_that_does_not():
    parts = (test_rules, cases_text, test_data, test_runs, test_behaviour)
    cases = {*chain(*(part.CASES for part in parts))} | test_adapters.COVERED
    well = {*chain(*(part.WELL for part in parts))} | test_adapters.COVERED
    # Of these the whole model is the neighbour: nothing else looks alike.
    whole = {"config-file", "config-value", "weights-file", "tensor-missing", "tensor-shape"}
    whole |= {"not-finite", "vocabulary"}
    assert cases == {*RULES} - {"tied-head"} and well | whole == cases
    assert hasattr(test_adapters, "test_tied_head")
