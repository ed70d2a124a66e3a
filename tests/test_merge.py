"""Merging onto a packed base: experts too, what was dense, and into a folder that is not there."""

import json

import pytest
import torch
from safetensors.torch import load_file

import ardor
from ardor.adapters.initial import dense_weight
from ardor.adapters.lora import LoraConfig, add_lora, lora_modules, lora_parameters
from ardor.cli.main import main
from ardor.errors import ConfigError
from ardor.merge import merge
from ardor.quant.experts import QuantizedExperts
from ardor.quant.linear import QuantizedLinear

from .parity.peer import Case, peer, saved, tokens

SIZES = {
    "vocab_size": 53,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA = Case("llama", sizes=SIZES)
EXPERTS = Case(
    "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}, sizes=SIZES
)


def adapter_on(base, folder, quantization, config=None, size=0.1):
    """An adapter as if trained on `base` quantized so, and the model that it was trained in."""
    lm = ardor.load(base, quantization=quantization, dtype="float32")
    config = config or LoraConfig(r=4)
    add_lora(lm.model.decoder, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in lora_parameters(lm.model.decoder):
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    lm.model.adapter = config
    lm.save(folder)
    return lm


def packed(folder):
    kinds = (QuantizedLinear, QuantizedExperts)
    decoder = ardor.load(folder).model.decoder
    return {name: module for name, module in decoder.named_modules() if isinstance(module, kinds)}


@pytest.mark.parametrize("onto", ["dequantized", "requantized"])
@pytest.mark.parametrize("format", ["nf4", "int4-g32", "llm-int8"])
def test_experts_are_merged_onto_their_packed_base(tmp_path, format, onto):
    base = saved(peer(EXPERTS), tmp_path / "base")
    lm = adapter_on(base, tmp_path / "a", format)
    with torch.no_grad():
        found = [*lora_modules(lm.model.decoder)]
        exact = {name: module.merged(dense_weight(module.base)) for name, module in found}
    report = merge(tmp_path / "a", tmp_path / "m", onto=onto)
    found = packed(tmp_path / "m")
    assert bool(found) == (onto == "requantized")
    experts = [one for one in report.residuals if ".experts." in one.name]
    assert len(experts) == 6 and len(report.residuals) == len(exact) == 14
    decoder = ardor.load(tmp_path / "m").model.decoder
    for one in report.residuals:
        weight = dense_weight(decoder.get_submodule(one.name))
        change = exact[one.name] - dense_weight(lm.model.decoder.get_submodule(one.name).base)
        lost = float((weight - exact[one.name]).norm() / change.norm())
        # What the report says of each map is what the file shows.
        expected = one.requantized if onto == "requantized" else one.rounding
        assert lost == pytest.approx(expected, rel=0.02)


def test_experts_that_no_adapter_touches_are_expanded_too(tmp_path):
    base = saved(peer(EXPERTS), tmp_path / "base")
    lm = adapter_on(base, tmp_path / "a", "nf4", LoraConfig(r=4, target_modules=("q_proj",)))
    report = merge(tmp_path / "a", tmp_path / "m", onto="dequantized")
    assert len(report.residuals) == 2 and not packed(tmp_path / "m")
    decoder = ardor.load(tmp_path / "m").model.decoder
    for name, module in lm.model.decoder.named_modules():
        if isinstance(module, QuantizedExperts):
            weight = decoder.get_submodule(name).weight
            assert torch.equal(weight, module.dequantized(torch.bfloat16))


SKIPPED = {"format": "nf4", "skip_modules": ["self_attn"]}
THRESHOLD = {"load_in_8bit": True, "llm_int8_threshold": 3.0, "llm_int8_skip_modules": ["o_proj"]}


@pytest.mark.parametrize("stored", [False, True], ids=["packed when loaded", "packed on disk"])
@pytest.mark.parametrize("asked", [SKIPPED, THRESHOLD], ids=["nf4", "llm-int8"])
def test_requantized_packs_what_was_packed_and_nothing_else(tmp_path, asked, stored):
    base, given = saved(peer(LLAMA), tmp_path / "base"), asked
    if stored:
        ardor.load(base, quantization=asked).save(tmp_path / "q")
        base, given = tmp_path / "q", None
    lm = adapter_on(base, tmp_path / "a", given)
    kept = "mixer" if asked is SKIPPED else "mixer.o_proj"
    merge(tmp_path / "a", tmp_path / "m", onto="requantized")
    found = packed(tmp_path / "m")
    expected = {n for n, _ in lora_modules(lm.model.decoder) if kept not in n}
    assert {*found} == expected and len(expected) in (6, 12)
    # Of what stayed dense, nothing is lost but one rounding.
    decoder = ardor.load(tmp_path / "m", dtype="float32").model.decoder
    for name, module in lora_modules(lm.model.decoder):
        if name not in expected:
            exact = module.merged(dense_weight(module.base))
            torch.testing.assert_close(
                decoder.get_submodule(name).weight, exact, rtol=1e-5, atol=1e-5
            )
    section = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    if asked is THRESHOLD:
        assert section["llm_int8_threshold"] == 3.0
        assert {module.quantized.threshold for module in found.values()} == {3.0}


def test_an_adapter_of_zero_requantized_gives_the_codes_it_was_trained_on(tmp_path):
    base = saved(peer(EXPERTS), tmp_path / "base")
    ardor.load(base, quantization="nf4").save(tmp_path / "q")
    adapter_on(tmp_path / "q", tmp_path / "a", None, size=0.0)
    merge(tmp_path / "a", tmp_path / "m", onto="requantized")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("q", "m"))
    assert one.keys() == two.keys()
    codes = [name for name in one if name.endswith("weight") and one[name].dtype == torch.uint8]
    assert len(codes) == 2 * (4 + 3 * 4)
    assert all(torch.equal(one[name], two[name]) for name in codes)


@pytest.mark.parametrize("onto", ["16bit", "dequantized", "requantized"])
def test_folders_that_are_not_there_are_made(tmp_path, capsys, onto):
    base = saved(peer(LLAMA), tmp_path / "base")
    adapter_on(base, tmp_path / "a", "nf4")
    output = tmp_path / "not" / "yet" / "there"
    assert main(["merge", str(tmp_path / "a"), "-o", str(output), "--onto", onto]) == 0
    assert ardor.load(output).logits(tokens()).isfinite().all()
    assert [path.name for path in output.parent.iterdir()] == ["there"]  # nothing is left behind
    (tmp_path / "file").write_text("")
    capsys.readouterr()
    where = tmp_path / "file" / "under"
    assert main(["merge", str(tmp_path / "a"), "-o", str(where), "--onto", onto]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error and "Traceback" not in error


def test_experts_that_files_hold_in_one_tensor_are_not_requantized(tmp_path):
    case = Case("gpt_oss", {"head_dim": 16, "num_local_experts": 4}, sizes=SIZES)
    base = saved(peer(case), tmp_path / "base")
    adapter_on(base, tmp_path / "a", "nf4")
    with pytest.raises(ConfigError, match=r"all experts of layers\.0\.ffn.*--onto dequantized"):
        merge(tmp_path / "a", tmp_path / "m", onto="requantized")
    assert not (tmp_path / "m").exists()
    merge(tmp_path / "a", tmp_path / "m", onto="dequantized")
    assert not packed(tmp_path / "m")
