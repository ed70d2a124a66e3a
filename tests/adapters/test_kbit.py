"""Preparation for k-bit training: what it changes, what it says it changed, and PEFT's way."""

import pytest
import torch

from ardor.adapters.kbit import Census, prepare_kbit
from ardor.adapters.lora import LoraConfig, add_lora
from ardor.errors import ConfigError
from ardor.load import load_model
from ardor.quant.linear import QuantizedLinear


def quantized(llama, format="nf4"):
    return load_model(llama.path, dtype="bfloat16", quantization=format).decoder


def dtypes(decoder, kind):
    return {p.dtype for n, p in decoder.named_parameters() if kind in n}


@pytest.mark.parametrize("format", ["nf4", "nf4-dq", "llm-int8", "int4-g32"])
def test_norms_become_float32_and_nothing_else(llama, format):
    decoder = quantized(llama, format)
    packed = {n: b.clone() for n, b in decoder.named_buffers()}
    decoder.requires_grad_(True)
    report = prepare_kbit(decoder)
    assert dtypes(decoder, "norm") == {torch.float32}
    assert dtypes(decoder, "embed_tokens") | dtypes(decoder, "lm_head") == {torch.bfloat16}
    assert all(torch.equal(b, packed[n]) for n, b in decoder.named_buffers())
    assert not any(p.requires_grad for p in decoder.parameters())
    assert report.before.trained > 0 and report.after.trained == 0 and report.frozen > 0
    assert len(report.upcast) == 5 and report.bytes_added == 5 * 24 * 2


def test_peft_takes_everything_that_is_not_packed(llama):
    decoder = quantized(llama)
    report = prepare_kbit(decoder, "peft")
    assert {p.dtype for p in decoder.parameters()} == {torch.float32}
    assert isinstance(decoder.layers[0].mixer.q_proj, QuantizedLinear)
    assert report.bytes_added == 2 * (5 * 24 + 2 * 61 * 24)
    assert report.after.bytes.keys() == report.before.bytes.keys() - {"bfloat16"}


def test_none_takes_nothing_and_lines_say_so(llama):
    report = prepare_kbit(quantized(llama), "none")
    assert report.upcast == () and report.bytes_added == 0
    first, second, third = report.lines()
    assert first.startswith("k-bit before: bfloat16") and "0.0 MiB more" in second
    assert "no cache" in third and "need no gradient" in third


def test_gradients_reach_adapters_under_a_prepared_base(llama):
    decoder = quantized(llama)
    decoder.compute = torch.bfloat16
    prepare_kbit(decoder)
    add_lora(decoder, LoraConfig(r=4), generator=torch.Generator().manual_seed(0))
    llama.logits(decoder).square().mean().backward()
    trained = [p for p in decoder.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    assert any(p.grad is not None and p.grad.any() for p in trained)


def test_a_model_that_is_not_quantized_is_refused(llama):
    with pytest.raises(ConfigError, match="prepare_kbit is for a quantized model"):
        prepare_kbit(llama.ours())


def test_a_census_counts_shared_storage_once(llama):
    decoder = llama.ours()
    total = sum(p.nbytes for p in decoder.parameters())
    assert Census.of(decoder).total == total
    decoder.lm_head.weight = decoder.embed_tokens.weight
    assert Census.of(decoder).total == total - 61 * 24 * 4
