"""Adapters as module surgery: what is wrapped and what trains; a fresh one changes nothing."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ardor.adapters.embedding import TrainableHead, TrainableTokens
from ardor.adapters.lora import (
    LoraConfig,
    LoraLinear,
    add_lora,
    lora_modules,
    lora_parameters,
)
from ardor.arch.linear import Linear
from ardor.errors import ConfigError
from ardor.loss import chunked_next_token_loss, next_token_loss
from ardor.quant.linear import QuantizedLinear, quantize_decoder


def linear(inputs=12, outputs=20, seed=0):
    torch.manual_seed(seed)
    made = Linear(inputs, outputs, bias=True)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def adapted(base=None, *, dropout=0.0, rslora=False):
    made = LoraLinear(base or linear(), r=4, alpha=8.0, dropout=dropout, rslora=rslora)
    nn.init.normal_(made.lora_B)
    return made


def test_a_fresh_adapter_is_the_identity_and_a_trained_one_is_not(pair):
    decoder = pair.ours()
    before = pair.logits(decoder)
    add_lora(decoder, LoraConfig(r=4))
    assert torch.equal(pair.logits(decoder), before)
    pair.randomise(lora_parameters(decoder))
    assert (pair.logits(decoder) - before).abs().max() > 0.1


@pytest.mark.parametrize("rslora", [False, True])
def test_the_product_is_that_of_the_paper(rslora):
    made = adapted(rslora=rslora)
    x = torch.randn(2, 3, 12)
    scale = 8 / math.sqrt(4) if rslora else 8 / 4
    expected = made.base(x) + scale * F.linear(F.linear(x, made.lora_A), made.lora_B)
    torch.testing.assert_close(made(x), expected)
    weight, bias = (made.base.get_parameter(name) for name in ("weight", "bias"))
    dense = F.linear(x, weight + made.delta(), bias)
    torch.testing.assert_close(made(x), dense)


def test_a_starts_uniform_within_one_over_root_inputs_and_b_at_zero():
    made = LoraLinear(linear(4096, 2), r=8, alpha=8.0)
    bound = 4096**-0.5
    assert made.lora_A.abs().max() <= bound and not made.lora_B.any()
    assert made.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert made.lora_A.dtype == made.lora_B.dtype == torch.float32


def test_one_seed_gives_one_adapter(llama):
    def drawn(seed):
        decoder = llama.ours()
        add_lora(decoder, LoraConfig(r=2), generator=torch.Generator().manual_seed(seed))
        return [module.lora_A for _, module in lora_modules(decoder)]

    again = zip(drawn(1), drawn(1), strict=True)
    assert all(torch.equal(a, b) for a, b in again)
    assert not any(torch.equal(a, b) for a, b in zip(drawn(1), drawn(2), strict=True))


def test_low_precision_activations_meet_float32_adapters():
    made = adapted(linear().to(torch.bfloat16))
    x = torch.randn(3, 12, dtype=torch.bfloat16)
    made(x).float().sum().backward()
    assert made(x).dtype == torch.bfloat16
    assert made.lora_A.grad is not None and made.lora_A.grad.dtype == torch.float32


def test_dropout_acts_on_the_adapter_only_and_in_training_only():
    made = adapted(dropout=0.5)
    x = torch.randn(2, 12)
    expected = made.eval()(x)
    assert torch.equal(made(x), expected)
    made.train()
    assert not torch.equal(made(x), made(x))
    nn.init.zeros_(made.lora_B)
    assert torch.equal(made(x), made.base(x))


def test_only_the_adapter_learns_and_every_part_of_it(pair):
    decoder = pair.ours()
    names = add_lora(decoder, LoraConfig(r=2, trainable_token_indices=(3, 5)))
    pair.randomise(lora_parameters(decoder))
    pair.logits(decoder).square().sum().backward()
    trainable = {id(p) for p in lora_parameters(decoder)}
    assert {id(p) for p in decoder.parameters() if p.requires_grad} == trainable
    assert all(p.grad is not None and p.grad.any() for p in lora_parameters(decoder))
    assert all(p.grad is None for p in decoder.parameters() if id(p) not in trainable)
    assert len(lora_parameters(decoder)) == 2 * len(names) + 1


def test_a_fresh_adapter_teaches_b_first():
    made = LoraLinear(linear(), r=4, alpha=8.0)
    made(torch.randn(3, 12)).sum().backward()
    assert made.lora_B.grad is not None and made.lora_B.grad.any()
    assert made.lora_A.grad is not None and not made.lora_A.grad.any()


def test_qlora_is_lora_on_the_dequantized_weight(llama):
    quantized = llama.ours()
    quantize_decoder(quantized, "nf4-dq")
    dense = llama.ours()
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedLinear):
            weight = dense.get_submodule(name).get_parameter("weight")
            assert not torch.equal(weight, module.dequantized(torch.float32))
            weight.data = module.dequantized(torch.float32)
    gradients = []
    for decoder in (quantized, dense):
        add_lora(decoder, LoraConfig(r=4), generator=torch.Generator().manual_seed(0))
        llama.randomise(lora_parameters(decoder))
        llama.logits(decoder).square().mean().backward()
        gradients.append([parameter.grad for parameter in lora_parameters(decoder)])
    torch.testing.assert_close(*gradients)


def test_all_linear_is_every_linear_of_the_layers_and_never_the_head(llama):
    names = add_lora(llama.ours(), LoraConfig(r=4))
    assert len(names) == 2 * 7 and all(name.startswith("layers.") for name in names)


@pytest.mark.parametrize(
    ("targets", "count"),
    [(("q_proj",), 2), (("mixer.q_proj", "v_proj"), 4), (("self_attn.o_proj", "lm_head"), 3)],
)
def test_targets_are_endings_of_our_names_or_the_checkpoints(llama, targets, count):
    decoder = llama.ours()
    names = add_lora(decoder, LoraConfig(r=4, target_modules=targets), names=llama.name)
    assert len(names) == count
    assert [name for name, _ in lora_modules(decoder)] == list(names)


def test_a_fused_linear_of_the_checkpoint_is_all_its_parts(gpt2):
    names = add_lora(gpt2.ours(), LoraConfig(r=4, target_modules=("c_attn",)), names=gpt2.name)
    assert names[:3] == tuple(f"layers.0.mixer.{x}_proj" for x in "qkv") and len(names) == 6


def test_a_target_that_matches_nothing_gets_the_nearest_names(llama, gpt2):
    with pytest.raises(ConfigError, match=r"'c_atn' matches no linear .* did you mean c_attn"):
        add_lora(gpt2.ours(), LoraConfig(r=4, target_modules=("c_atn",)), names=gpt2.name)
    there = "down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(ConfigError, match=rf"'proj' matches no linear .* there are {there};"):
        add_lora(llama.ours(), LoraConfig(r=4, target_modules=("proj",)), names=llama.name)


def test_settings_that_mean_nothing_are_refused(llama):
    with pytest.raises(ConfigError, match="lora_r=0 is no rank"):
        LoraConfig(r=0)
    with pytest.raises(ConfigError, match=r"lora_dropout=1.0 is outside \[0, 1\)"):
        LoraConfig(lora_dropout=1.0)
    with pytest.raises(ConfigError, match=r"target_modules='\(' is no regular expression"):
        LoraConfig(target_modules="(")
    with pytest.raises(ConfigError, match="init_lora_weights='pisa' is not known"):
        LoraConfig(init_lora_weights="pisa")
    with pytest.raises(ConfigError, match="acts on a list of target_modules"):
        LoraConfig(layers_to_transform=(1,))
    with pytest.raises(ConfigError, match="layers_pattern says where layers_to_transform counts"):
        LoraConfig(target_modules=("q_proj",), layers_pattern=("layers",))
    decoder = llama.ours()
    add_lora(decoder, LoraConfig(r=4))
    with pytest.raises(ConfigError, match="already has an adapter"):
        add_lora(decoder, LoraConfig(r=4))


def test_fresh_token_rows_change_nothing_and_trained_ones_only_their_tokens(pair):
    decoder = pair.ours()
    before = decoder.embed_tokens.weight.detach().clone()
    logits = pair.logits(decoder)
    add_lora(decoder, LoraConfig(r=4, trainable_token_indices=(7, 3)))
    # Two products make the logits of a tied head, in another order of summation.
    torch.testing.assert_close(pair.logits(decoder), logits, rtol=1e-6, atol=1e-6)
    tokens = decoder.embed_tokens
    assert isinstance(tokens, TrainableTokens)
    pair.randomise([tokens.trainable_tokens_delta])
    changed = (tokens.weight != before).any(1).nonzero().flatten()
    assert changed.tolist() == [3, 7]
    ids = torch.arange(len(before))[None]
    assert torch.equal(tokens(ids)[0], tokens.weight)  # what is looked up is that weight
    assert torch.equal(tokens.weight[7], tokens.trainable_tokens_delta[0])  # in the given order


def test_a_tied_head_uses_the_trained_rows_and_sends_its_gradient_there(gpt2):
    decoder = gpt2.ours()
    add_lora(decoder, LoraConfig(r=4, trainable_token_indices=(7, 3)))
    tokens = decoder.embed_tokens
    assert isinstance(tokens, TrainableTokens) and isinstance(decoder.lm_head, TrainableHead)
    gpt2.randomise(lora_parameters(decoder))
    hidden = torch.randn(5, 24)
    reference = F.linear(hidden, tokens.weight)
    torch.testing.assert_close(decoder.head(hidden), reference)
    upstream = torch.randn_like(reference)
    (expected,) = torch.autograd.grad(reference, tokens.trainable_tokens_delta, upstream)
    found = torch.autograd.grad(decoder.head(hidden), tokens.trainable_tokens_delta, upstream)
    torch.testing.assert_close(found, (expected,))


def test_the_chunked_loss_reaches_the_rows_of_a_tied_head(gpt2):
    decoder = gpt2.ours()
    add_lora(decoder, LoraConfig(r=4, trainable_token_indices=(7, 3)))
    gpt2.randomise(lora_parameters(decoder))
    rows = decoder.embed_tokens.get_parameter("trainable_tokens_delta")
    hidden, targets = torch.randn(1, 9, 24), torch.randint(0, 61, (1, 9))
    whole = next_token_loss(decoder.head(hidden), targets).nats
    chunked = chunked_next_token_loss(hidden, targets, *decoder.head_parts(), chunk=2).nats
    torch.testing.assert_close(chunked, whole)
    expected = torch.autograd.grad(whole, rows)
    torch.testing.assert_close(torch.autograd.grad(chunked, rows), expected)
    assert expected[0].any()


@pytest.mark.parametrize("chunk", [None, 2])
def test_the_chunked_loss_reaches_the_adapter_of_a_tied_embedding(gpt2, chunk):
    """Without a size it asks the head about no rows at all, as a run does."""
    decoder = gpt2.ours()
    add_lora(decoder, LoraConfig(r=4, target_modules=("embed_tokens",)))
    gpt2.randomise(lora_parameters(decoder))
    hidden, targets = torch.randn(1, 9, 24), torch.randint(0, 61, (1, 9))
    whole = next_token_loss(decoder.head(hidden), targets).nats
    chunked = chunked_next_token_loss(hidden, targets, *decoder.head_parts(), chunk=chunk).nats
    torch.testing.assert_close(chunked, whole)
    adapted = [*lora_parameters(decoder)]
    expected = torch.autograd.grad(whole, adapted)
    torch.testing.assert_close(torch.autograd.grad(chunked, adapted), expected)
    assert expected[0].any()


def test_rows_of_an_untied_head_are_trained_by_name(llama):
    decoder = llama.ours()
    rows = {"embed_tokens": (1, 2), "lm_head": (2,)}
    before = llama.logits(decoder)
    add_lora(decoder, LoraConfig(r=4, trainable_token_indices=rows))
    head = decoder.lm_head
    assert isinstance(head, TrainableHead)
    llama.randomise([head.tokens.trainable_tokens_delta])
    differ = (llama.logits(decoder) - before).abs() > 1e-4
    assert differ[..., 2].all() and not differ[..., :2].any() and not differ[..., 3:].any()


def test_wrong_token_ids_are_refused_before_anything_changes(llama, gpt2):
    decoder = llama.ours()
    reference = copy.deepcopy(decoder)
    for ids, message in (
        ((61,), r"\[61\] must be different ids below the 61 rows"),
        ((1, 1), r"\[1, 1\] must be different ids"),
        ({"wte": (1,)}, r"names \['wte'\]; rows can be trained in embed_tokens and lm_head"),
    ):
        with pytest.raises(ConfigError, match=message):
            add_lora(decoder, LoraConfig(r=4, trainable_token_indices=ids))
    assert str(decoder) == str(reference)
    with pytest.raises(ConfigError, match="this model's head is its embedding"):
        add_lora(gpt2.ours(), LoraConfig(r=4, trainable_token_indices={"lm_head": (1,)}))
