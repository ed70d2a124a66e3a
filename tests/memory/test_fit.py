"""Machines, and what fits them."""

from dataclasses import replace

import pytest

from ardor.errors import ConfigError
from ardor.memory.estimate import Use, estimate
from ardor.memory.fit import as_asked, cheapest, choices, expected, longest, most_rows
from ardor.memory.machine import Machine, host_memory, peak_resident
from ardor.plan import known

LLAMA = known("tinyllama-1.1b").spec
FULL = Use(task="train", weights="float32", compute="float32", rows=8, length=1024)
READ = Use(task="generate", weights="float32", compute="float32", length=512, new_tokens=64)
GIB = 2**30


def changes(use: Use, *gpus: int, ram: int = 4096) -> tuple[str, ...] | None:
    machine = Machine(tuple(size * GIB for size in gpus), ram * GIB)
    found = cheapest(LLAMA, use, machine)
    return None if found is None else found.changes


def test_less_memory_costs_more_quality_step_by_step():
    found = [" ".join(changes(FULL, ram=ram) or ("nothing",)) for ram in (400, 32, 22, 8, 4, 3, 1)]
    assert found[0] == "nothing"  # to change
    assert "accumulation" in found[1] and "bfloat16" not in found[1]
    order = ["batch-size", "--dtype bfloat16", "--method lora", "--method qlora"]
    reached = [
        max((i for i, flag in enumerate(order) if flag in text), default=-1) for text in found
    ]
    assert reached[:6] == sorted(reached[:6]) and {0, 2, 3} <= {*reached}
    assert changes(FULL, ram=1) is None


def test_smaller_batches_keep_the_examples_of_a_step():
    found = cheapest(LLAMA, FULL, Machine((), 32 * GIB))
    assert (
        found is not None and found.fits and not as_asked(LLAMA, FULL, Machine((), 32 * GIB)).fits
    )
    assert found.use.rows * found.use.accumulation == FULL.rows


def test_generation_spreads_before_it_rounds_and_rounds_before_it_offloads():
    assert changes(READ, 8) == ()
    assert changes(READ, 3, 3) == ("--device-map auto",)
    assert changes(READ, 4) == ("--dtype bfloat16",)
    assert changes(READ, 2) == ("--dtype bfloat16", "--quantization nf4")
    assert changes(READ, 1) == ("--dtype bfloat16", "--device-map auto")


def test_a_model_from_scratch_is_not_told_to_be_adapted():
    use = replace(FULL, scratch=True)
    flags = {flag for choice in choices(LLAMA, use, Machine((), GIB)) for flag in choice.changes}
    assert flags and not any("lora" in flag for flag in flags)


def test_the_largest_batch_and_length_fit_and_one_more_does_not():
    machine = Machine((), 16 * GIB)
    use = replace(FULL, method="lora", weights="bfloat16", compute="bfloat16", rows=1)
    choice = as_asked(LLAMA, use, machine)
    rows, length = most_rows(LLAMA, choice, machine, 4096), longest(LLAMA, choice, machine)
    assert rows is not None and length is not None and 1 < rows < 4096

    def fits(**changed) -> bool:
        return as_asked(LLAMA, replace(use, **changed), machine).fits

    assert fits(rows=rows) and not fits(rows=rows + 1)
    assert fits(length=length) and (length == LLAMA.max_positions or not fits(length=length + 1))


def test_what_surely_does_not_fit_is_refused_with_what_would():
    with pytest.raises(
        ConfigError,
        match=r"this run takes about .* GiB .* there are 8.0 GiB .*"
        r"the least change with which it would: --dtype bfloat16 --method lora",
    ):
        expected(LLAMA, FULL, Machine((), 8 * GIB), "this run")
    near = estimate(LLAMA, FULL).bytes
    assert not expected(LLAMA, FULL, Machine((), near), "this run").fits  # not surely
    with pytest.raises(ConfigError, match="smaller model"):
        expected(LLAMA, FULL, Machine((), GIB // 2), "this run")


def test_a_mapped_model_is_not_refused():
    assert not expected(LLAMA, READ, Machine((), GIB), "it").fits


def test_this_machine_has_memory_and_this_process_uses_some():
    peak = peak_resident()
    assert peak is not None and 2**26 < peak < host_memory() < 2**50
