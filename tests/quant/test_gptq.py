"""GPTQ and AWQ: packers written from the description of the layouts, and what is read of them."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import ardor
from ardor.errors import CheckpointError, ConfigError
from ardor.files.json import read_json, write_json
from ardor.quant.gptq import AWQWeight, GPTQWeight
from ardor.quant.linear import QuantizedLinear

from ..parity.peer import contents, tokens
from .test_loading import LLAMA, PHI3, dense

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(numbers):
    """32-bit words from lists of numbers, the first in the lowest bits: one at a time."""
    bits = 32 // len(numbers[0])
    found = [sum(int(n) << (bits * k) for k, n in enumerate(word)) for word in numbers]
    return [value - 2**32 if value >= 2**31 else value for value in found]


def grid(inputs, outputs, group, bits, seed=0):
    """Random codes [in, out], zeros and scales [g, out]."""
    g = torch.Generator().manual_seed(seed)
    groups = -(-inputs // group)
    codes = torch.randint(0, 2**bits, (inputs, outputs), generator=g)
    zeros = torch.randint(0, 2**bits, (groups, outputs), generator=g)
    scales = (torch.rand(groups, outputs, generator=g) * 0.1 / 2**bits + 0.01 / 2**bits).half()
    return codes, zeros, scales


def packed_gptq(codes, zeros, scales, bits, g_idx=None, less_one=True):
    n, inputs = 32 // bits, len(codes)
    stored = (zeros - 1) % 2**bits if less_one else zeros
    rows = [words(codes[i : i + n].T.tolist()) for i in range(0, inputs, n)]
    columns = [words(row.view(-1, n).tolist()) for row in stored]
    found = {
        "qweight": torch.tensor(rows, dtype=torch.int32),
        "qzeros": torch.tensor(columns, dtype=torch.int32),
        "scales": scales,
    }
    return found if g_idx is None else found | {"g_idx": g_idx.int()}


def packed_awq(codes, zeros, scales):
    def rows(numbers):
        return [words(row.view(-1, 8)[:, AWQ_ORDER].tolist()) for row in numbers]

    return {
        "qweight": torch.tensor(rows(codes), dtype=torch.int32),
        "qzeros": torch.tensor(rows(zeros), dtype=torch.int32),
        "scales": scales,
    }


def expanded(codes, zeros, scales, g_idx):
    """[out, in], by the formula, in float32."""
    return ((codes - zeros[g_idx]) * scales.float()[g_idx]).T.contiguous()


@pytest.mark.parametrize("less_one", [True, False], ids=["v1", "v2"])
@pytest.mark.parametrize("order", ["in order", "by activation"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [32, -1])
def test_gptq_is_its_formula(bits, group, order, less_one):
    inputs, outputs = 96, 48
    per_group = inputs if group == -1 else group
    values = grid(inputs, outputs, per_group, bits)
    g_idx = torch.arange(inputs) // per_group
    if order == "by activation":
        g_idx = g_idx[torch.randperm(inputs, generator=torch.Generator().manual_seed(2))]
    found = packed_gptq(*values, bits, g_idx if order != "in order" else None, less_one)
    ours = GPTQWeight.from_tensors(found, "up", bits, group, less_one)
    assert ours.shape == (outputs, inputs)
    assert torch.equal(ours.dequantize(torch.float32), expanded(*values, g_idx))
    other = GPTQWeight.from_tensors(found, "up", bits, group, not less_one)
    assert not torch.equal(other.dequantize(torch.float32), ours.dequantize(torch.float32))


@pytest.mark.parametrize("group", [32, -1])
def test_awq_is_its_formula(group):
    inputs, outputs = 96, 48
    per_group = inputs if group == -1 else group
    values = grid(inputs, outputs, per_group, 4)
    ours = AWQWeight.from_tensors(packed_awq(*values), "up", group)
    assert ours.shape == (outputs, inputs)
    expected = expanded(*values, torch.arange(inputs) // per_group)
    assert torch.equal(ours.dequantize(torch.float32), expected)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def checkpoints(tmp_path, case, section):
    """A quantized checkpoint, and the dense float32 one that it stands for."""
    folder = dense(tmp_path / "packed", case, torch.float32)
    whole = load_file(folder / "model.safetensors")
    full, packed = dict(whole), dict(whole)
    for seed, name in enumerate(n for n in whole if n.endswith("_proj.weight")):
        outputs, inputs = whole[name].shape
        values = grid(inputs, outputs, 32, 4, seed)
        g_idx = (torch.arange(inputs) // 32)[torch.randperm(inputs)]
        if section["quant_method"] == "awq":
            g_idx = torch.arange(inputs) // 32
            found = packed_awq(*values)
        else:
            found = packed_gptq(*values, 4, g_idx, section.get("checkpoint_format") != "gptq_v2")
        full[name] = 10 * expanded(*values, g_idx)
        del packed[name]
        found["scales"] = (10 * found["scales"].float()).half()
        full[name] = expanded(values[0], values[1], found["scales"], g_idx)
        packed |= {name.removesuffix("weight") + end: tensor for end, tensor in found.items()}
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "quantization_config": section})
    reference = tmp_path / "dense"
    reference.mkdir()
    save_file(full, reference / "model.safetensors", metadata={"format": "pt"})
    write_json(reference / "config.json", config)
    return folder, reference


@pytest.mark.parametrize("case", [LLAMA, PHI3], ids=["llama", "phi3"])
@pytest.mark.parametrize("section", [GPTQ, GPTQ | {"checkpoint_format": "gptq_v2"}, AWQ], ids=str)
def test_a_checkpoint_gives_the_logits_of_its_dense_numbers(tmp_path, case, section):
    folder, reference = checkpoints(tmp_path, case, section)
    lm = ardor.load(folder, dtype="float32")
    expected = ardor.load(reference, dtype="float32").logits(tokens())
    torch.testing.assert_close(lm.logits(tokens()), expected, rtol=1e-5, atol=1e-5)
    held = [m for m in lm.model.decoder.modules() if isinstance(m, QuantizedLinear)]
    assert len(held) == 14 and lm.model.quantization == section["quant_method"]
    assert all(t.dtype != torch.float32 for m in held for t in m.quantized.storage.values())
    ardor.load(folder).save(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    assert read_json(tmp_path / "again" / "config.json")["quantization_config"] == section


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits=3 is not read, only 2, 4, 8"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format='marlin' is not read"),
        ({"dynamic": {"x": {}}}, "dynamic=.* is not read"),
        ({"lm_head": True}, "lm_head=True is not read"),
        ({"rotation": "hadamard"}, "nothing reads rotation, which may change results"),
        ({"group_size": 0}, "group_size=0 is not a whole number above 0"),
        ({"quant_method": "awq", "version": "gemv"}, "version='gemv' is not read, only gemm"),
        ({"quant_method": "awq", "bits": 8}, "bits=8 is not read, only 4"),
        ({"quant_method": "hqq"}, "quantization_config="),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path, change, message):
    folder = dense(tmp_path / "m")
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "quantization_config": GPTQ | change})
    with pytest.raises(ConfigError, match=message):
        ardor.load(folder)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    folder, _ = checkpoints(tmp_path, LLAMA, GPTQ)
    file, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj"
    whole = load_file(file)
    for change, message in (
        ({f"{name}.scales": whole[f"{name}.scales"][:1].clone()}, r"scales are \[1, 128\]"),
        ({f"{name}.g_idx": torch.full((64,), 2, dtype=torch.int32)}, "g_idx .* one of 2 groups"),
        ({f"{name}.qweight": whole[f"{name}.qweight"].float()}, "words of 32 bits"),
    ):
        save_file(whole | change, file)
        with pytest.raises(CheckpointError, match=rf"{name}.weight.*{message}"):
            ardor.load(folder)
