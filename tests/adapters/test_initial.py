"""What each beginning promises, and what it refuses."""

import pytest
import torch
from torch import nn

from ardor.adapters.config import scale_of
from ardor.adapters.initial import Sources, dense_weight, principal_inputs, starts
from ardor.adapters.lora import LoraConfig, LoraLinear, add_lora, lora_modules
from ardor.arch.linear import Linear
from ardor.errors import ConfigError
from ardor.quant.linear import QuantizedLinear, quantize_decoder


def weight(outputs=48, inputs=64, seed=0):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize("format", ["nf4", "int4-g32", "llm-int8"])
@pytest.mark.parametrize("share", [0.5, 1, 2, 4])
def test_loftq_is_never_worse_than_the_plain_format_at_any_scale(format, share):
    full, r = weight(), 8
    base = QuantizedLinear.from_weight(full, None, format)
    config = LoraConfig(r=r, lora_alpha=share * r, init_lora_weights="loftq")
    sources = Sources(originals=lambda name: full)
    scale = scale_of(r, config.lora_alpha, rslora=False)
    start = starts("q", base, r, scale, config, sources)(None)[0]
    module = LoraLinear(base, r, config.lora_alpha, start=start)
    plain = (full - dense_weight(base)).norm()
    made_up = (full - dense_weight(base) - module.delta()).norm()
    best = torch.linalg.svdvals(full - dense_weight(base))[r:].norm()
    assert made_up < 0.95 * plain
    torch.testing.assert_close(made_up, best, rtol=1e-3, atol=1e-6)
    if share == 4:  # PEFT's, which leaves the scale out
        forgetful = module.delta() * scale
        assert (full - dense_weight(base) - forgetful).norm() > plain


def test_orthogonal_begins_with_neither_zero_and_their_product_zero():
    base = Linear(64, 48)
    nn.init.normal_(base.weight)
    config = LoraConfig(r=8, init_lora_weights="orthogonal")
    start = starts("q", base, 8, 1.0, config, Sources())(torch.Generator().manual_seed(0))[0]
    assert start.a.any() and start.b.any()
    assert (start.b @ start.a).abs().max() < 1e-7
    with pytest.raises(ConfigError, match="orthogonal needs an even rank, found 3 for q"):
        starts("q", base, 3, 1.0, config, Sources())


def test_gaussian_has_the_deviation_of_peft():
    base = Linear(4096, 2)
    config = LoraConfig(r=8, init_lora_weights="gaussian")
    start = starts("q", base, 8, 1.0, config, Sources())(torch.Generator().manual_seed(0))[0]
    assert start.a.std().item() == pytest.approx(1 / 8, rel=0.02) and not start.b.any()


def test_eva_begins_at_the_principal_inputs_of_all_batches(llama):
    decoder, seen = llama.ours(), {}
    names = ("layers.0.mixer.q_proj", "layers.1.ffn.down_proj")
    tokens = torch.randint(0, 61, (3, 2, 9), generator=torch.Generator().manual_seed(0))

    def record(name):
        return lambda module, args: seen.setdefault(name, []).append(args[0].flatten(0, -2))

    hooks = [decoder.get_submodule(n).register_forward_pre_hook(record(n)) for n in names]
    batches = [lambda ids=ids: decoder.hidden(ids) for ids in tokens]
    found = principal_inputs(decoder, dict.fromkeys(names, 4), batches)
    for hook in hooks:
        hook.remove()
    for name in names:
        expected = torch.linalg.svd(torch.cat(seen[name]), full_matrices=False)[2][:4]
        assert found[name].shape == expected.shape
        torch.testing.assert_close(
            (found[name] @ expected.T).abs(), torch.eye(4), rtol=1e-3, atol=1e-3
        )
    before = llama.logits(decoder)
    config = LoraConfig(r=4, init_lora_weights="eva", target_modules=(r"layers.0.mixer.q_proj",))
    add_lora(decoder, config, sources=Sources(inputs=found))
    assert torch.equal(llama.logits(decoder), before)
    (module,) = (m for _, m in lora_modules(decoder))
    assert torch.equal(module.lora_A, found[names[0]])


def test_eva_needs_as_many_positions_as_ranks(llama):
    decoder = llama.ours()
    with pytest.raises(
        ConfigError, match="eva needs 4 positions for the rank 4 of layers.0.mixer.q"
    ):
        principal_inputs(
            decoder, {"layers.0.mixer.q_proj": 4}, [lambda: decoder.hidden(torch.ones(1, 3).long())]
        )


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora"])
def test_a_part_of_a_packed_weight_is_refused_by_type(llama, kind):
    decoder = llama.ours()
    quantize_decoder(decoder, "nf4")
    before = str(decoder)
    message = (
        rf"init_lora_weights={kind} takes a part of the full weight, but .* is held packed \(Q"
    )
    with pytest.raises(ConfigError, match=message):
        add_lora(decoder, LoraConfig(r=4, init_lora_weights=kind))
    assert str(decoder) == before


def test_loftq_without_quantization_and_eva_without_data_are_refused(llama):
    with pytest.raises(ConfigError, match=r"layers.0.mixer.q_proj is not quantized here"):
        add_lora(llama.ours(), LoraConfig(r=4, init_lora_weights="loftq"))
    with pytest.raises(ConfigError, match=r"which were not recorded"):
        add_lora(llama.ours(), LoraConfig(r=4, init_lora_weights="eva"))


def test_bfloat16_bases_keep_the_product_to_their_rounding():
    """The base is not rounded a second time, as it is when the part is taken off the weight."""
    base = Linear(64, 48)
    base.weight = nn.Parameter(weight().bfloat16())
    config = LoraConfig(r=8, lora_alpha=16, init_lora_weights="pissa")
    start = starts("q", base, 8, 2.0, config, Sources())(None)[0]
    module = LoraLinear(base, 8, 16, start=start)
    x = torch.randn(5, 64).bfloat16()
    torch.testing.assert_close(module(x), base(x), rtol=8e-3, atol=1e-3)
    assert (module.scale * module.lora_B @ module.lora_A).norm() > 0.4 * base.weight.norm()
