"""Groupwise integers stay within their stated error, and zero stays zero."""

import pytest
import torch

from ardor.errors import CheckpointError, ShapeError
from ardor.quant import groupwise
from ardor.quant.groupwise import GroupWeight, quantize_groups
from ardor.quant.packed import Rows


def weight(shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) * torch.rand(shape[0], 1, generator=g)).to(dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("inputs", "group"), [(128, 128), (256, 64), (96, 64), (40, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_stays_within_the_stated_bound(bits, inputs, group, dtype):
    # Both signs, one sign only, and ranges that put the zero on a half step.
    w = torch.cat([weight((16, inputs)), weight((16, inputs)).abs(), -weight((16, inputs)).abs()])
    w = torch.cat([w, torch.linspace(-1, 14, inputs)[None], torch.full((1, inputs), 3.0)]).to(dtype)
    q = quantize_groups(w, bits, group)
    error = (w.float() - q.dequantize(torch.float32)).abs()
    bound = q.error_bound().repeat_interleave(group, 1)[:, :inputs]
    assert (error <= bound).all()
    assert (error > 0.9 * bound).any()  # and it is not a loose one
    groups = -(-inputs // group)
    assert q.bytes == w.numel() * bits // 8 + 5 * groups * len(w)


def test_bits_per_weight():
    w = weight((64, 1024))
    for bits, group, expected in [(4, 128, 4.3125), (4, 32, 5.25), (8, 128, 8.3125)]:
        assert quantize_groups(w, bits, group).bytes * 8 / w.numel() == expected


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_is_exact_wherever_the_range_lies(bits):
    w = torch.cat([weight((8, 64)), weight((8, 64)).abs() + 1, torch.zeros(2, 64)])
    w[:, ::3] = 0
    assert not quantize_groups(w, bits, 32).dequantize()[:, ::3].any()


def test_input_2j_is_the_low_half_of_a_byte():
    w = torch.tensor([[0.0, 15.0, 3.0, 4.0]])
    assert quantize_groups(w, 4, 4).packed.tolist() == [[0xF0, 0x43]]


@pytest.mark.parametrize("bits", [4, 8])
def test_chunks_leave_no_seam(monkeypatch, bits):
    w = weight((37, 96))
    whole = quantize_groups(w, bits, 64)
    dense = whole.dequantize()
    monkeypatch.setattr(groupwise, "_CHUNK", 300)
    parts = quantize_groups(w, bits, 64)
    for name, tensor in whole.storage.items():
        assert torch.equal(parts.storage[name], tensor), name
    assert torch.equal(parts.dequantize(), dense)


@pytest.mark.parametrize("bits", [4, 8])
def test_parts_are_rows_and_files_come_back(bits):
    q = quantize_groups(weight((24, 96)), bits, 64)
    dense = q.dequantize()
    interleaved = dense.view(4, 6, 96)[:, 2:5].flatten(0, 1)
    assert torch.equal(q.rows(Rows(2, 3, groups=4)).dequantize(), interleaved)
    back = GroupWeight.from_tensors(q.tensors(), "up", bits, 64, torch.float32)
    assert torch.equal(back.dequantize(), dense)


def test_what_does_not_fit_is_refused():
    found = quantize_groups(weight((24, 128)), 4, 64).tensors()
    with pytest.raises(CheckpointError, match=r"up: found scales .*groups of 32 has \[24, 4\]"):
        GroupWeight.from_tensors(found, "up", 4, 32, torch.float32)
    with pytest.raises(CheckpointError, match=r"not a complete int4 weight.*\['weight_zeros'\]"):
        GroupWeight.from_tensors(
            {k: found[k] for k in ("weight", "weight_scales")}, "up", 4, 64, torch.float32
        )
    with pytest.raises(ShapeError, match=r"whole bytes for each output, found .* \(4, 7\)"):
        quantize_groups(torch.randn(4, 7), 4, 32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_damaged_weight_is_refused(bad):
    w = weight((4, 70))
    w[3, 69] = bad
    with pytest.raises(CheckpointError, match=r"shape \(4, 70\) holds NaN or infinity"):
        quantize_groups(w, 8, 32)
