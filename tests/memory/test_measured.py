"""Predictions against processes that ran: within 10 % of VmHWM."""

import pytest

from .measured import CASES, Case, measure

QUICK = [
    Case(preset="llama-42m", stored="float32", what="generate"),
    Case(preset="llama-42m", stored="float32", what="full"),
    Case(preset="llama-42m", stored="bfloat16", what="lora"),
]


@pytest.mark.parametrize("case", QUICK[:2], ids=lambda case: case.name)
def test_a_small_model_takes_what_is_predicted(case, tmp_path):
    found = measure(case, tmp_path)
    assert 0.9 < found.ratio < 1.1, found
    if found.terms:  # the probe can tell: without the weights it would not agree
        assert (found.predicted - found.terms["weights"]) / found.measured < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("case", [*QUICK[2:], *CASES], ids=lambda case: case.name)
def test_a_published_shape_takes_what_is_predicted(case, tmp_path):
    found = measure(case, tmp_path)
    assert 0.9 < found.ratio < 1.1, found
