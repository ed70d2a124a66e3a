"""FP8 means what it means to transformers, and is kept as it came until an adapter is merged."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import ardor
from ardor.adapters.lora import LoraConfig, add_lora, lora_parameters
from ardor.adapters.merge import merge
from ardor.errors import CheckpointError, ConfigError
from ardor.files.json import read_json, write_json
from ardor.load import load_model
from ardor.quant.bnb4 import quantize_4bit
from ardor.quant.fp8 import FP8Experts, FP8Linear, FP8Weight
from ardor.save import save_model
from ardor.train.config import Finetune
from ardor.train.finetune import _require_grad

from ..parity.peer import CLOSE, Case, contents, logits, peer, saved, tokens

BLOCK = (8, 8)
CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [*BLOCK],
}
V3 = Case(
    "deepseek_v3",
    {
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
        "intermediate_size": 32,
    },
)
# No width is a multiple of the block: the last block of each row and column is cut short.
UNEVEN = Case(V3.model_type, {**V3.keys, "kv_lora_rank": 9, "v_head_dim": 7})
QWEN = Case(
    "qwen3", {"head_dim": 8, "num_key_value_heads": 1, "intermediate_size": 16}, in_bfloat16=False
)


def by_hand(packed, scales, block):
    """The reference, number by number."""
    out = torch.empty(packed.shape)
    for i, row in enumerate(packed.float()):
        for j, number in enumerate(row):
            scale = scales if block is None else scales[i // block[0], j // block[1]]
            out[i, j] = number * scale.float()
    return out


def quantized(weight, block=BLOCK):
    """Numbers and scales as such checkpoints are made: the largest of a block becomes 448."""
    rows, columns = block or weight.shape
    grid = (-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    scales = torch.empty(grid)
    packed = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(grid[0]):
        for j in range(grid[1]):
            here = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = weight[here].abs().max() / 448
            packed[here] = (weight[here] / scales[i, j]).to(torch.float8_e4m3fn)
    return packed, scales if block else scales.reshape(())


def checkpoint(folder, case=V3, block=BLOCK, scales=torch.float32, **section):
    """A checkpoint as published in FP8: the linear maps of the layers, as numbers and scales."""
    saved(peer(case).bfloat16(), folder)
    weights = load_file(folder / "model.safetensors")
    for name in [n for n in weights if n.endswith((*ENDINGS,)) and "norm" not in n]:
        packed, found = quantized(weights.pop(name).float(), block)
        weights |= {name: packed, f"{name}_scale_inv": found.to(scales)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "quantization_config": {**CONFIG, **section}})
    return folder


ENDINGS = ("_proj.weight", "_proj_with_mqa.weight")


def dense(folder, place):
    """The same checkpoint with every number written out in float32, by hand."""
    place.mkdir()
    weights = load_file(folder / "model.safetensors")
    for name in [n.removesuffix("_scale_inv") for n in weights if n.endswith("_scale_inv")]:
        scales = weights.pop(f"{name}_scale_inv")
        weights[name] = by_hand(weights[name], scales, BLOCK if scales.ndim else None)
    weights = {n: t for n, t in weights.items() if not n.endswith("activation_scale")}
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    config = read_json(folder / "config.json")
    write_json(place / "config.json", {**config, "quantization_config": None})
    return place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [torch.float32, torch.bfloat16])
def test_all_numbers_are_those_that_transformers_makes_of_them(dtype, scaled):
    numbers = torch.arange(256, dtype=torch.uint8).repeat(16, 2).view(torch.float8_e4m3fn)
    scales = torch.rand(2, 64, generator=torch.Generator().manual_seed(0)).to(scaled)
    ours = FP8Weight(numbers, scales, BLOCK).dequantize(dtype)
    theirs = Fp8Dequantize(None)._dequantize_one(numbers, scales, dtype)
    assert ours.unique().numel() > 500
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(8, 8), (3, 5), (17, 24), (9, 31)])
def test_a_block_at_the_end_may_be_cut_short(shape):
    """Theirs divides such a width into equal blocks, or refuses: 576 rows have 5 scales."""
    packed, scales = quantized(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    found = FP8Weight(packed, scales, BLOCK).dequantize(torch.float32)
    assert torch.equal(found, by_hand(packed, scales, BLOCK))
    if shape[0] % 8:
        with pytest.raises(ValueError, match="not divisible"):
            Fp8Dequantize(None)._dequantize_one(torch.empty(576, 8), torch.empty(5, 1))


@pytest.mark.parametrize("case", [V3, QWEN], ids=["experts", "dense"])
def test_a_published_checkpoint_gives_the_logits_of_transformers(tmp_path, case):
    folder = checkpoint(tmp_path, case)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    theirs = theirs.float().eval()  # which expands FP8 to float32, and leaves the rest as it is
    expected = logits(theirs, tokens())
    assert expected.std() > 0.3
    lm = ardor.load(folder, dtype="float32")
    torch.testing.assert_close(lm.logits(tokens()), expected, **CLOSE)
    kinds = {type(module) for module in lm.model.decoder.modules()}
    assert FP8Linear in kinds and (FP8Experts in kinds) == (case is V3)


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16])
def test_widths_that_are_no_multiple_of_the_block_are_read(tmp_path, scales):
    folder = checkpoint(tmp_path / "fp8", UNEVEN, scales=scales)
    found = ardor.load(folder, dtype="float32").logits(tokens())
    expected = ardor.load(dense(folder, tmp_path / "dense"), dtype="float32").logits(tokens())
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_numbers_and_scales_are_saved_as_they_came(tmp_path, dtype):
    before = checkpoint(tmp_path / "before", UNEVEN)
    ardor.load(before, dtype=dtype).save(tmp_path / "after")
    after, original = contents(tmp_path / "after"), contents(before)
    packed = {name for name in original if name.endswith("_scale_inv") or "_proj." in name}
    assert after.keys() == original.keys() and len(packed) > 20
    same = original if dtype == "auto" else packed
    assert all(after[name] == original[name] for name in same)
    assert read_json(tmp_path / "after" / "config.json")["quantization_config"] == CONFIG


def test_one_scale_for_a_matrix_and_those_of_activations(tmp_path):
    """As Ministral 3 is published; what a GPU would round activations by is kept, unread."""
    folder = checkpoint(
        tmp_path / "fp8", QWEN, None, weight_block_size=None, activation_scheme="static"
    )
    weights = load_file(folder / "model.safetensors")
    names = [name for name in weights if name.endswith("_proj.weight")]
    given = {name.replace("weight", "activation_scale"): torch.tensor(0.5) for name in names}
    save_file({**weights, **given}, folder / "model.safetensors", metadata={"format": "pt"})
    lm = ardor.load(folder, dtype="float32")
    expected = ardor.load(dense(folder, tmp_path / "dense"), dtype="float32").logits(tokens())
    torch.testing.assert_close(lm.logits(tokens()), expected, **CLOSE)
    ardor.load(folder).save(tmp_path / "after")
    assert contents(tmp_path / "after") == contents(folder)


def test_stacked_experts_are_those_one_by_one(tmp_path):
    """The layout of transformers' memory, whose scales are stacked as the numbers are."""
    apart = checkpoint(tmp_path / "apart")
    weights = load_file(apart / "model.safetensors")
    for layer in (1, 2):
        place = f"model.layers.{layer}.mlp.experts"
        for end, new in (("weight", ""), ("weight_scale_inv", "_scale_inv")):
            gate, up, down = (
                [weights.pop(f"{place}.{e}.{name}_proj.{end}") for e in range(4)]
                for name in ("gate", "up", "down")
            )
            joined = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
            weights[f"{place}.gate_up_proj{new}"] = torch.stack(joined)
            weights[f"{place}.down_proj{new}"] = torch.stack(down)
    stacked = tmp_path / "stacked"
    stacked.mkdir()
    save_file(weights, stacked / "model.safetensors", metadata={"format": "pt"})
    write_json(stacked / "config.json", read_json(apart / "config.json"))
    lm = ardor.load(stacked)
    assert torch.equal(lm.logits(tokens()), ardor.load(apart).logits(tokens()))
    lm.save(tmp_path / "after")
    assert contents(tmp_path / "after") == contents(stacked)


def adapted(folder):
    model = load_model(folder, dtype="float32")
    model.adapter = LoraConfig(exclude_modules=r".*\.experts\..*", r=2)
    add_lora(model.decoder, model.adapter, generator=torch.Generator().manual_seed(0))
    for parameter in lora_parameters(model.decoder):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    return model


def test_an_adapter_trains_on_it_and_merged_the_model_is_bfloat16(tmp_path):
    folder = checkpoint(tmp_path / "fp8", UNEVEN)
    weights = load_file(folder / "model.safetensors")
    for end in ("eh_proj.weight", "eh_proj.weight_scale_inv"):  # a layer that drafts, kept unread
        name = next(n for n in weights if n.endswith(end.replace("eh_proj", "o_proj")))
        weights[f"model.layers.3.{end}"] = weights[name].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = adapted(folder)
    for parameter in lora_parameters(model.decoder):
        parameter.requires_grad_(True)
    model.decoder.logits(model.decoder.hidden(tokens())).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in lora_parameters(model.decoder))

    with torch.no_grad():
        before = model.decoder.logits(model.decoder.hidden(tokens()))
        merge(model.decoder)
        after = model.decoder.logits(model.decoder.hidden(tokens()))
    assert torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), 0) > 0.99
    save_model(model, tmp_path / "merged")
    assert "quantization_config" not in read_json(tmp_path / "merged" / "config.json")
    found = contents(tmp_path / "merged")
    assert not any("scale_inv" in name for name in found)
    drafting = found["model.layers.3.eh_proj.weight"]
    assert drafting[0] == "torch.bfloat16"
    name = "model.layers.1.mlp.experts.2.down_proj.weight"  # no adapter was on it
    weight = by_hand(weights[name], weights[f"{name}_scale_inv"], BLOCK).bfloat16()
    assert found[name][2] == weight.view(torch.uint8).numpy().tobytes()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ours = ardor.load(tmp_path / "merged", dtype="float32").logits(tokens())
    torch.testing.assert_close(ours, logits(theirs, tokens()), **CLOSE)


def test_nf4_is_made_of_what_the_numbers_say(tmp_path):
    lm = ardor.load(checkpoint(tmp_path), quantization="nf4")
    linear = lm.model.decoder.layers[0].mixer.o_proj
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    weight = by_hand(weights[name], weights[f"{name}_scale_inv"], BLOCK).bfloat16()
    assert torch.equal(linear.packed, quantize_4bit(weight).packed)


def test_joined_maps_are_read_where_each_has_scales_of_its_own(tmp_path):
    keys = {"head_dim": 8, "num_key_value_heads": 3, "intermediate_size": 16}
    folder = checkpoint(tmp_path / "even", Case("phi3", keys))
    found = ardor.load(folder, dtype="float32")
    expected = ardor.load(dense(folder, tmp_path / "dense"), dtype="float32").logits(tokens())
    torch.testing.assert_close(found.logits(tokens()), expected, **CLOSE)
    found.save(tmp_path / "after")
    packed = {n: t for n, t in contents(folder).items() if "_proj." in n}
    assert packed.items() <= contents(tmp_path / "after").items()
    uneven = checkpoint(tmp_path / "uneven", Case("phi3", {**keys, "intermediate_size": 12}))
    with pytest.raises(CheckpointError, match=r"gate_up_proj.*not each of .* has scales"):
        ardor.load(uneven)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"fmt": "e5m2"}, "fmt='e5m2' is not implemented, only 'e4m3'"),
        ({"expert_dtype": "fp4"}, "expert_dtype='fp4' is not implemented"),
        ({"modules_to_convert": ["embed"]}, "modules_to_convert="),
        ({"weight_block_size": [128]}, r"weight_block_size=\[128\]"),
        ({"bits": 3}, "nothing reads bits=3"),
        ({"quant_method": "hqq"}, "quantization_config=.*hqq"),
    ],
)
def test_another_kind_of_eight_bits_is_refused_by_name(tmp_path, section, says):
    folder = checkpoint(tmp_path, **section)
    with pytest.raises(ConfigError, match=says):
        ardor.load(folder)


def test_files_that_do_not_fit_their_config_are_refused(tmp_path):
    folder = checkpoint(tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    for changed, says in (
        ({**weights, name: weights[name][:1]}, r"o_proj.weight_scale_inv gives .* the shape \[1,"),
        ({**weights, name: weights[name].to(torch.uint8)}, "is torch.uint8, in a quantized format"),
        ({n: t for n, t in weights.items() if n != name}, "is torch.float8_e4m3fn"),
        (
            {**weights, "model.norm.weight_scale_inv": weights[name].clone()},
            "holds norm in FP8, which only linear maps",
        ),
    ):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=says):
            ardor.load(folder)


def test_it_cannot_be_trained_whole(tmp_path):
    model = load_model(checkpoint(tmp_path))
    with pytest.raises(ConfigError, match="stored in FP8, which full fine-tuning cannot change"):
        _require_grad(Finetune(model="v3", data="rows.jsonl", method="full"), model)
