"""MXFP4 means what it means to transformers, and is never changed."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import ardor
from ardor.errors import CheckpointError, ConfigError
from ardor.files.json import read_json, write_json
from ardor.load import load_model
from ardor.quant.mxfp4 import MXFP4Experts, MXFP4Weight
from ardor.train.config import Finetune
from ardor.train.finetune import _require_grad

from ..parity.peer import Case, contents, logits, peer, saved, tokens

OSS = Case(
    "gpt_oss",
    {"head_dim": 8, "hidden_size": 64, "intermediate_size": 32, "num_local_experts": 5},
)
CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
}


def random_bytes(*shape: int, low: int = 0, high: int = 256, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_bytes_are_the_numbers_that_transformers_makes_of_them(dtype):
    blocks, scales = random_bytes(3, 10, 40, 16), random_bytes(3, 10, 40)
    ours = MXFP4Weight(blocks, scales).dequantize(dtype)  # (3, 10, 1280)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)  # [E, in, out]
    assert ours.unique().numel() > 1000
    torch.testing.assert_close(ours, theirs.mT, rtol=0, atol=0, equal_nan=True)  # inf * 0


def test_numbers_are_exact_in_bfloat16():
    weight = MXFP4Weight(random_bytes(10, 4, 16), random_bytes(10, 4, low=30, high=220))
    assert torch.equal(weight.dequantize(torch.bfloat16).float(), weight.dequantize(torch.float32))


def packed_checkpoint(folder):
    """A gpt-oss as it is published: experts as blocks and scales, in the place of their weights."""
    saved(peer(OSS).bfloat16(), folder)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj") and ".experts." in name]:
        count, inputs, outputs = weights.pop(name).shape
        shape = (count, outputs, inputs // 32)
        weights[f"{name}_blocks"] = random_bytes(*shape, 16, seed=len(weights))
        weights[f"{name}_scales"] = random_bytes(*shape, low=119, high=123, seed=len(weights))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "quantization_config": CONFIG})
    return folder


def test_a_published_gpt_oss_gives_the_logits_of_transformers(tmp_path):
    folder = packed_checkpoint(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=Mxfp4Config(dequantize=True),
    ).eval()
    expected = logits(theirs, tokens())
    assert expected.std() > 0.3
    lm = ardor.load(folder, dtype="float32")
    torch.testing.assert_close(lm.logits(tokens()), expected, rtol=1e-5, atol=1e-5)
    up = lm.model.decoder.layers[0].ffn.experts.up_proj
    assert isinstance(up, MXFP4Experts) and up.blocks.dtype == torch.uint8


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_blocks_and_scales_are_saved_as_they_came(tmp_path, dtype):
    before = packed_checkpoint(tmp_path / "before")
    ardor.load(before, dtype=dtype).save(tmp_path / "after")
    after, original = contents(tmp_path / "after"), contents(before)
    assert after.keys() == original.keys()
    packed = [name for name in original if name.endswith(("_blocks", "_scales"))]
    assert len(packed) == 12
    same = original if dtype == "auto" else packed
    assert all(after[name] == original[name] for name in same)
    assert read_json(tmp_path / "after" / "config.json")["quantization_config"] == CONFIG


def test_gradients_pass_through_packed_experts():
    experts = MXFP4Experts(2, 64, 6, bias=True)
    experts.blocks.copy_(random_bytes(2, 6, 2, 16))
    experts.scales.copy_(random_bytes(2, 6, 2, low=125, high=129))
    torch.nn.init.normal_(experts.bias, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weight = MXFP4Weight(experts.blocks[1], experts.scales[1]).dequantize(torch.float32)
    y = experts.of(1, x)
    torch.testing.assert_close(y, x @ weight.T + experts.bias[1])
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1))


def test_blocks_of_another_kind_are_refused(tmp_path):
    folder = packed_checkpoint(tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_scales"
    save_file({**weights, name: weights[name].float()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj_scales is stored as torch.float32"):
        ardor.load(folder)


def test_other_quantizations_are_refused(tmp_path):
    folder = packed_checkpoint(tmp_path)
    config = read_json(folder / "config.json")
    for section in ({"quant_method": "awq"}, {**CONFIG, "bits": 3}):
        write_json(folder / "config.json", {**config, "quantization_config": section})
        with pytest.raises(ConfigError, match="quantization_config"):
            ardor.load(folder)


def test_packed_experts_cannot_be_trained_whole(tmp_path):
    model = load_model(packed_checkpoint(tmp_path))
    with pytest.raises(ConfigError, match="stored in MXFP4, which full fine-tuning cannot change"):
        _require_grad(Finetune(model="oss", data="rows.jsonl", method="full"), model)
