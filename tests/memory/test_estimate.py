"""Terms against what real tensors take."""

from dataclasses import replace

import pytest
import torch

import ardor
from ardor import loss
from ardor.adapters.kbit import Census, prepare_kbit
from ardor.adapters.lora import LoraConfig, add_lora, lora_parameters
from ardor.arch.cache import KVCache
from ardor.arch.decoder import Decoder
from ardor.arch.linear import LinearHead
from ardor.memory.estimate import (
    ACCELERATOR_LOSS_CHUNK,
    KERNEL,
    LOSS_CHUNK,
    RAGGED_HEAP,
    Held,
    Use,
    cache_bytes,
    estimate,
)
from ardor.memory.formats import counted, weight_bytes
from ardor.memory.products import KEPT
from ardor.memory.saved import How, per_token
from ardor.plan import known
from ardor.quant.formats import FORMATS
from ardor.train.config import Optimisation
from ardor.train.optim import Optimizer, trainable

from ..parity.cases import CASES
from ..parity.peer import peer, saved
from .live import live_peak

LLAMA = known("llama-15m").spec
SMALL = replace(LLAMA, vocab=64, layers=LLAMA.layers[:2])
TRAIN = Use(task="train", weights="float32", compute="float32", rows=2, length=40)


@pytest.mark.parametrize("shape", [(64, 64), (63, 66), (7, 2), (1000, 300)])
@pytest.mark.parametrize("format", FORMATS)
def test_quantized_bytes_are_exact(shape, format):
    assert counted(format)
    assert weight_bytes(shape, "float32", format) == FORMATS[format](torch.randn(shape)).bytes


@pytest.mark.parametrize("name", ["llama-15m", "mixtral-43m", "gemma-2-2b"])
def test_cache_bytes_are_exact(name):
    spec = known(name).spec
    spec = replace(spec, layers=spec.layers[:3])
    cache = KVCache(spec, rows=2, capacity=48, dtype=torch.bfloat16)
    held = sum(plane.nbytes for plane in cache._layers)
    assert cache_bytes(spec, 2, 48, "bfloat16") == held
    assert cache_bytes(spec, 2, 49, "bfloat16") > held


def test_weights_gradients_and_moments_of_full_training_are_exact():
    decoder = Decoder(SMALL)
    decoder.logits(decoder.hidden(torch.zeros(1, 4, dtype=torch.int64))).sum().backward()
    optimizer = Optimizer(trainable(decoder), Optimisation())
    optimizer.step()
    held = Held(SMALL, TRAIN)
    state = [s for member in optimizer.members for s in member.optimizer.state.values()]
    parameters = list(decoder.parameters())
    assert held.weights == sum(p.nbytes for p in parameters)
    assert 4 * held.trained == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    assert 8 * held.trained == sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in state)


def test_adapters_are_counted_as_add_lora_makes_them():
    decoder = Decoder(SMALL)
    add_lora(decoder, LoraConfig(r=3))
    use = replace(TRAIN, method="lora", rank=3)
    assert Held(SMALL, use).trained == sum(p.numel() for p in lora_parameters(decoder))
    some = replace(use, ranks={"layers.0.mixer.q_proj": 3})
    assert Held(SMALL, some).trained == 3 * 2 * SMALL.width


@pytest.mark.parametrize(
    "name", ["llama-15m", "gpt2-124m", "pythia-70m", "qwen3-0.6b", "mixtral-43m"]
)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_autograd_saves_is_what_is_said(name, method):
    """Distinct storages that are saved, but for weights and what does not grow with the tokens."""
    spec = known(name).spec
    spec = replace(spec, vocab=64, layers=spec.layers[:2])
    decoder = Decoder(spec)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    if method == "lora":
        add_lora(decoder, LoraConfig(r=4))
        for parameter in lora_parameters(decoder):
            parameter.requires_grad_(True)
    few, many = (_saved(decoder, n) for n in (64, 192))
    how = Held(spec, replace(TRAIN, method=method, rank=4))._how(0)
    said = sum(per_token(spec.width, layer, how) for layer in spec.layers)
    assert said == pytest.approx((many - few) / 128, rel=0.05)
    without = per_token(spec.width, spec.layers[0], replace(how, trained=frozenset(), adapted={}))
    assert without != per_token(spec.width, spec.layers[0], how)  # the probe can tell


def _saved(decoder: Decoder, tokens: int) -> int:
    seen: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)  # so that no address is used twice
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and not isinstance(tensor, torch.nn.Parameter):
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = decoder.hidden(torch.zeros(1, tokens, dtype=torch.int64))
    last = hidden.untyped_storage().data_ptr()
    return sum(size for place, size in seen.items() if place not in weights and place != last)


def test_every_setting_that_takes_more_is_said_to():
    def peak(**changes) -> int:
        return estimate(LLAMA, replace(TRAIN, **changes)).bytes

    plain = peak()
    assert peak(rows=4) > plain and peak(length=80) > plain
    # A table's gradient waits for that of the next micro-batch; what the update takes is the same.
    untied = replace(LLAMA, tied=False)
    table = [
        next(m for m in estimate(untied, use).moments if m.name == "the embedding's gradient")
        for use in (TRAIN, replace(TRAIN, accumulation=2))
    ]
    once, twice = (sum(term.bytes for term in moment.terms) for moment in table)
    assert twice > once and peak(accumulation=2) == plain
    assert peak(method="lora") < plain
    lora = {"method": "lora", "weights": "bfloat16", "compute": "bfloat16"}
    assert peak(**lora, rank=64) > peak(**lora)
    quantized = {**lora, "method": "qlora", "quantization": "nf4"}
    assert peak(**quantized) < peak(**lora)
    assert peak(**{**quantized, "quantization": "nf4-dq"}) < peak(**quantized)


def test_the_peak_is_the_largest_moment_and_the_sum_of_its_terms():
    found = estimate(LLAMA, TRAIN)
    assert found.bytes == max(moment.bytes for moment in found.moments)
    assert found.bytes == sum(term.bytes for term in found.peak.terms)
    assert len({moment.name for moment in found.moments}) == len(found.moments)


def test_compiled_attention_keeps_shared_keys_once():
    layer = known("tinyllama-1.1b").spec.layers[0]
    how = How(width=2, trained=frozenset(), adapted={}, flash=True, compiled=True, ragged=False)
    assert per_token(2048, layer, replace(how, flash=False)) > per_token(2048, layer, how)


@pytest.mark.parametrize("family", ["llama", "mixtral", "granitemoe", "qwen2_moe"])
@pytest.mark.parametrize("format", ["nf4", "nf4-dq", "int8", "int8-g128"])
def test_a_quantized_load_holds_the_bytes_that_are_said(tmp_path, family, format):
    """Experts too, one by one or joined in the file."""
    case = next(case for case in CASES.values() if case.model_type == family)
    wide = {"hidden_size": 128, "intermediate_size": 256}
    wide |= {"moe_intermediate_size": 128} if family == "qwen2_moe" else {}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
    case = replace(case, sizes={**case.sizes, **wide, **heads})
    lm = ardor.load(saved(peer(case), tmp_path), quantization=format)
    use = Use(task="generate", weights="float32", compute="float32", length=1)
    use = replace(use, quantization=lm.model.quantization)
    state = [*lm.model.decoder.parameters(), *lm.model.decoder.buffers()]
    held = sum({t.data_ptr(): t.nbytes for t in state if t.numel()}.values())
    assert Held(lm.spec, use).weights == held
    assert Held(lm.spec, replace(use, quantization=None)).weights > 2 * held


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
@pytest.mark.parametrize("upcast", ["norms", "peft", "none"])
def test_what_becomes_float32_beside_packed_weights_is_exact(tmp_path, family, upcast):
    case = next(case for case in CASES.values() if case.model_type == family)
    lm = ardor.load(saved(peer(case), tmp_path), dtype="bfloat16", quantization="nf4")
    use = Use(task="train", method="qlora", weights="bfloat16", compute="bfloat16", length=1)
    use = replace(use, quantization=lm.model.quantization)
    before = Census.of(lm.model.decoder).total
    assert Held(lm.spec, use).weights == before
    prepare_kbit(lm.model.decoder, upcast)
    after = Census.of(lm.model.decoder).total
    assert Held(lm.spec, replace(use, upcast=upcast)).weights == after
    assert (after > before) == (upcast != "none")


def test_a_float32_head_is_cast_for_the_loss_of_a_frozen_model():
    """In a run that computes in bfloat16: one more copy of the head for as long as that takes."""
    hidden = torch.randn(1, 8, 64, dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(20000, 64)

    def lost(weight: torch.Tensor) -> int:
        targets = torch.arange(8)[None]
        parts = hidden, targets, LinearHead(), (weight,)
        return live_peak(lambda: loss.chunked_next_token_loss(*parts).nats.backward())

    measured = lost(head) - lost(head.bfloat16())
    spec = replace(LLAMA, vocab=20000, width=64, tied=False)
    use = replace(TRAIN, method="qlora", weights="bfloat16", compute="bfloat16")
    wide, narrow = (Held(spec, replace(use, upcast=kind)).loss() for kind in ("peft", "norms"))
    assert measured == pytest.approx(wide - narrow, rel=0.02) and wide - narrow == 2 * head.numel()


def test_the_loss_is_counted_in_the_chunks_that_it_takes():
    assert loss.CHUNK_BYTES == LOSS_CHUNK
    assert loss.ACCELERATOR_CHUNK_BYTES == ACCELERATOR_LOSS_CHUNK


def test_ragged_batches_split_the_heap_for_some_dozens():
    use = Use(task="train", weights="float32", compute="bfloat16", length=512, ragged=True)

    def peak(**more) -> int:
        return estimate(LLAMA, replace(use, **more)).peak.bytes

    grown = [peak(batches=n) for n in (1, 20, 41, 1000)]
    assert grown[0] < grown[1] < grown[2] <= grown[3] <= grown[0] + RAGGED_HEAP + KERNEL * KEPT
    assert grown[3] - grown[0] > RAGGED_HEAP
    assert peak(batches=1000, accelerator=True) == peak(batches=1, accelerator=True)
