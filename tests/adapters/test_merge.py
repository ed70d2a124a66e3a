"""A merged model computes what the adapted one did, and nothing is quantized twice."""

import pytest
import torch
from torch import nn

from ardor.adapters.embedding import TrainableTokens
from ardor.adapters.lora import (
    LoraConfig,
    LoraLinear,
    add_lora,
    lora_modules,
    lora_parameters,
)
from ardor.adapters.merge import merge
from ardor.arch.decoder import Embedding
from ardor.arch.linear import Linear
from ardor.errors import ConfigError
from ardor.quant.linear import QuantizedLinear, quantize_decoder


def test_merged_computes_what_unmerged_did(pair):
    decoder = pair.ours()
    base = pair.logits(decoder)
    names = add_lora(decoder, LoraConfig(r=4, trainable_token_indices=(3, 7)))
    pair.randomise(lora_parameters(decoder))
    unmerged = pair.logits(decoder)
    assert merge(decoder).names == (*names, "embed_tokens")
    torch.testing.assert_close(pair.logits(decoder), unmerged, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(unmerged, base, rtol=1e-2, atol=1e-2)  # there was much to merge
    assert not any(isinstance(m, LoraLinear | TrainableTokens) for m in decoder.modules())
    assert type(decoder.embed_tokens) is Embedding
    assert not any(parameter.requires_grad for parameter in decoder.parameters())


def test_merging_restores_the_module_tree(pair):
    decoder, plain = pair.ours(), pair.ours()
    add_lora(decoder, LoraConfig(r=4, trainable_token_indices=(1,)))
    merge(decoder)
    assert str(decoder) == str(plain) and (decoder.lm_head is None) == (plain.lm_head is None)
    state, expected = decoder.state_dict(), plain.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)  # B was zero


def test_the_sum_is_float32_and_rounded_once():
    base = Linear(64, 32)
    nn.init.normal_(base.weight)
    holder = nn.ModuleDict({"embed_tokens": nn.Identity(), "x": base.to(torch.bfloat16)})
    lora = LoraLinear(base, r=4, alpha=4.0)
    nn.init.normal_(lora.lora_B, std=0.01)
    holder["x"] = lora
    exact = base.weight.float() + lora.delta()
    twice = base.weight + lora.delta().to(torch.bfloat16)
    merge(holder)
    merged = holder["x"].get_parameter("weight")
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.to(torch.bfloat16)) and not torch.equal(merged, twice)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_quantized_base_becomes_dense_and_keeps_small_adapters(llama, dtype):
    decoder = llama.ours()
    quantize_decoder(decoder, "nf4")
    add_lora(decoder, LoraConfig(r=4))
    with torch.no_grad():
        for parameter in lora_parameters(decoder):
            parameter.normal_(std=0.02)  # far below a step between levels: requantizing erases it
    unmerged = llama.logits(decoder)
    name, module = next(lora_modules(decoder))
    assert isinstance(module.base, QuantizedLinear)
    before, delta = module.base.dequantized(torch.float32), module.delta()
    merge(decoder, dtype)
    merged = decoder.get_submodule(name).get_parameter("weight")
    assert type(decoder.get_submodule(name)) is Linear and merged.dtype == (dtype or torch.float32)
    if dtype is None:
        torch.testing.assert_close(merged - before, delta, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(llama.logits(decoder), unmerged, rtol=1e-4, atol=1e-4)
    again = QuantizedLinear.from_weight(before + delta, None, "nf4").dequantized(torch.float32)
    kept = torch.corrcoef(torch.stack([(again - before).flatten(), delta.flatten()]))[0, 1]
    assert kept < 0.9  # the usual mistake loses it


def test_dora_on_a_quantized_base_measures_what_that_stands_for(llama):
    """Fresh it changes nothing; trained, it is merged by its own formula."""
    decoder = llama.ours()
    quantize_decoder(decoder, "nf4")
    base = llama.logits(decoder)
    add_lora(decoder, LoraConfig(r=4, use_dora=True))
    torch.testing.assert_close(llama.logits(decoder), base, rtol=1e-4, atol=1e-4)
    llama.randomise(lora_parameters(decoder))
    unmerged = llama.logits(decoder)
    assert not torch.allclose(unmerged, base, rtol=1e-2, atol=1e-2)
    merge(decoder)
    torch.testing.assert_close(llama.logits(decoder), unmerged, rtol=1e-4, atol=1e-4)


def test_rows_of_an_untied_head_are_merged_too(llama):
    decoder = llama.ours()
    rows = {"embed_tokens": (1, 2), "lm_head": (2, 9)}
    add_lora(decoder, LoraConfig(r=2, trainable_token_indices=rows))
    llama.randomise(lora_parameters(decoder))
    unmerged = llama.logits(decoder)
    assert merge(decoder).names[-2:] == ("embed_tokens", "lm_head")
    torch.testing.assert_close(llama.logits(decoder), unmerged, rtol=1e-4, atol=1e-4)
    assert type(decoder.lm_head) is Linear


def test_a_sum_beyond_float16_is_refused():
    base = Linear(4, 4).to(torch.float16)
    nn.init.constant_(base.weight, 6e4)
    lora = LoraLinear(base, r=1, alpha=1.0)
    nn.init.constant_(lora.lora_A, 1e2)
    nn.init.constant_(lora.lora_B, 1e2)
    holder = nn.ModuleDict({"embed_tokens": nn.Identity(), "up": lora})
    with pytest.raises(ConfigError, match=r"up with its adapter leaves the range of torch.float16"):
        merge(holder)


def test_an_adapter_of_no_numbers_is_refused_and_the_model_stays(llama):
    decoder = llama.ours()
    add_lora(decoder, LoraConfig(r=2))
    before = str(decoder)
    with torch.no_grad():
        last = [*lora_modules(decoder)][-1][1]
        last.lora_B[0, 0] = float("nan")
    with pytest.raises(ConfigError, match="look for NaN in the adapter"):
        merge(decoder)
    assert str(decoder) == before and len([*lora_modules(decoder)]) == 14
