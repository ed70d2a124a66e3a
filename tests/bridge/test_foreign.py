"""A foreign model gives here what it gives in transformers, and what is not certain is checked."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ardor.arch.layout import Packed
from ardor.bridge.foreign import FOREIGN, UNLIMITED, Foreign
from ardor.errors import CheckpointError, ConfigError, ShapeError
from ardor.lm import load
from ardor.quant.linear import QuantizedLinear

from .conftest import NATIVE, greedy, theirs, write_native, write_odd

PROMPTS = ["the cat", "a", "then it saw one dog who ran far away over that hill"]
TOKENS = torch.randint(0, 280, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def lm(odd):
    return load(odd, trust_remote_code=True)


@pytest.fixture(scope="module")
def peer(odd):
    return theirs(odd)


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_logits_are_theirs(lm, peer):
    with torch.no_grad():
        same(lm.logits(TOKENS), peer(TOKENS).logits)
        assert lm.logits(TOKENS).std() > 0.1  # something to compare
    assert lm.spec.vocab == peer.config.vocab_size and lm.spec.max_positions == 48


def test_packed_documents_are_read_alone(lm, peer):
    layout = Packed(((2, 4, 3), (3, 3, 3)))
    with torch.no_grad():
        found = lm.model.decoder.hidden(TOKENS, layout)
        for row, lengths in zip((0, 1), layout.lengths, strict=True):
            start = 0
            for length in lengths:
                piece = slice(start, start + length)
                same(found[row, piece], peer(TOKENS[row : row + 1, piece]).logits[0])
                start += length
        assert not torch.allclose(found[0, 2:], lm.logits(TOKENS)[0, 2:], atol=1e-2)
    with pytest.raises(ShapeError, match="does not fit tokens"):
        lm.model.decoder.hidden(TOKENS, Packed(((2, 4), (3, 3))))


def test_greedy_continuations_are_theirs_alone_and_in_a_ragged_batch(lm, peer):
    known = lm.tokenizer.vocab_rows
    together = lm.generate(PROMPTS, max_new_tokens=8, temperature=0.0)
    for prompt, found in zip(PROMPTS, together, strict=True):
        ids = lm.tokenizer.encode(prompt)
        wanted = greedy(peer, ids, 8, known)
        assert list(found.tokens) == wanted[: len(found.tokens)]
        assert len(found.tokens) == 8 or found.stop_reason == "stop_token"
        alone = lm.generate(prompt, max_new_tokens=8, temperature=0.0)
        assert alone.tokens == found.tokens and alone.logprobs == found.logprobs
    assert lm.model.decoder._reading is not None  # it was decoded with a cache


def test_a_score_is_their_log_probability(lm, peer):
    found = lm.score(PROMPTS[2])
    with torch.no_grad():
        logits = peer(torch.tensor([found.tokens])).logits[..., : lm.tokenizer.vocab_rows]
        logprobs = logits.log_softmax(-1)[0, :-1]  # of ids that have a token
    wanted = logprobs.gather(-1, torch.tensor(found.tokens)[1:, None])[:, 0]
    same(torch.tensor(found.logprobs), wanted)


def test_the_context_ends_where_their_config_says(lm):
    with pytest.raises(ShapeError, match="context holds 48"):
        lm.score("the cat " * 60)


def test_a_cache_that_loses_positions_is_found_out(tokenizer, tmp_path, capsys):
    def broken(source):
        return source.replace("torch.arange(past, past +", "torch.arange(0, 0 +")

    path = write_odd(tmp_path / "broken", tokenizer, broken)
    lm = load(path, trust_remote_code=True)
    found = lm.generate("the cat", max_new_tokens=6, temperature=0.0)
    assert lm.model.decoder._reading is None
    assert "the whole text is read for every token" in capsys.readouterr().err
    ids = lm.tokenizer.encode("the cat")
    wanted = greedy(theirs(path), ids, 6, lm.tokenizer.vocab_rows)
    assert list(found.tokens) == wanted[: len(found.tokens)]
    lm.generate(PROMPTS, max_new_tokens=2)
    assert "whole text" not in capsys.readouterr().err  # it is said once


def test_a_model_that_looks_ahead_is_refused(tokenizer, tmp_path):
    path = write_native(tmp_path / "bert", tokenizer, "bert", is_decoder=False)
    with pytest.raises(ConfigError, match="BertLMHeadModel is no causal language model"):
        load(path, trust_remote_code=True)
    path = write_native(tmp_path / "bert-decoder", tokenizer, "bert", is_decoder=True)
    assert load(path, trust_remote_code=True)


def test_a_model_that_gives_nan_is_told_apart_from_one_that_looks_ahead(tokenizer, tmp_path):
    path = write_odd(tmp_path / "nan", tokenizer)
    file = path / "model.safetensors"
    whole = load_file(file)
    whole["unembed.weight"][0] = torch.nan
    save_file(whole, file, {"format": "pt"})
    with pytest.raises((ConfigError, CheckpointError), match=r"gives NaN in torch\.float32"):
        load(path, trust_remote_code=True)


def test_minus_infinity_for_ids_that_are_never_meant_is_no_leak(tokenizer, tmp_path):
    def masked(source):
        return source.replace(
            "return Causal", "logits[..., -2:] = float('-inf')\n        return Causal"
        )

    path = write_odd(tmp_path / "masked", tokenizer, masked)
    lm = load(path, trust_remote_code=True)
    assert lm.generate("the cat", max_new_tokens=2).tokens
    assert lm.model.decoder._reading is not None


def test_no_weight_stays_as_it_was_initialised(tokenizer, tmp_path, capsys):
    path = write_odd(tmp_path / "partial", tokenizer)
    file = path / "model.safetensors"
    whole = load_file(file)
    save_file({k: v for k, v in whole.items() if "1.out" not in k}, file, {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"missing .* blocks\.1\.out\.bias, blocks\.1\.out\.w"
    ):
        load(path, trust_remote_code=True)
    save_file(whole | {"blocks.1.out.bias": torch.zeros(3)}, file, {"format": "pt"})
    with pytest.raises((CheckpointError, ConfigError), match=r"blocks\.1\.out\.bias|mismatch"):
        load(path, trust_remote_code=True)
    capsys.readouterr()
    save_file(whole | {"extra.weight": torch.zeros(3)}, file, {"format": "pt"})
    load(path, trust_remote_code=True)
    assert "has no place for 1 tensors, such as extra.weight" in capsys.readouterr().err


def test_nothing_is_computed_before_the_model_is_where_it_stays(odd, monkeypatch):
    kept = []
    move = Foreign.to

    def noted(self, *args, **kwargs):
        kept.append(self.foreign.table)
        return move(self, *args, **kwargs)

    monkeypatch.setattr(Foreign, "to", noted)
    decoder = load(odd, trust_remote_code=True).model.decoder
    assert kept == [None] and decoder.foreign.table is not None


@pytest.mark.parametrize("line", ["import package_that_is_not", "raise KeyError('odd')"])
def test_code_that_fails_is_reported_with_its_reason(tokenizer, tmp_path, line):
    path = write_odd(tmp_path / "failing", tokenizer, lambda source: f"{line}\n{source}")
    with pytest.raises(ConfigError, match=r"OddForCausalLM cannot be run .*(package_that_is|odd')"):
        load(path, trust_remote_code=True)


def test_what_its_code_keeps_from_a_generation_can_be_trained_with(odd):
    lm = load(odd, trust_remote_code=True)
    lm.model.decoder.foreign.table = None  # made in inference mode, it would refuse to be used
    lm.generate("the", max_new_tokens=2)
    lm.model.decoder.requires_grad_(True)
    lm.logits(TOKENS).square().sum().backward()
    assert lm.model.decoder.foreign.tokens.weight.grad is not None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_is_that_of_weights_and_activations(odd, dtype):
    lm = load(odd, trust_remote_code=True, dtype=dtype)
    with torch.no_grad():
        wanted = theirs(odd, dtype=dtype)(TOKENS).logits
        assert torch.equal(lm.logits(TOKENS), wanted.float())
    assert lm.model.decoder.compute == lm.model.precision.weights == getattr(torch, dtype)


def test_float32_masters_compute_in_bfloat16(odd):
    decoder = load(odd, trust_remote_code=True).model.decoder
    exact = decoder.hidden(TOKENS)
    decoder.compute = torch.bfloat16
    found = decoder.hidden(TOKENS)
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.1)


def test_the_attention_asked_for_is_theirs_by_another_name(tokenizer, tmp_path):
    path = write_native(tmp_path / "neo", tokenizer, "codegen")
    lm = load(path, trust_remote_code=True, attn_implementation="eager")
    assert lm.model.decoder.foreign.config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match="attn_implementation='flash' is not one of"):
        load(path, trust_remote_code=True, attn_implementation="flash")


@pytest.mark.parametrize("format", ["nf4", "nf4-dq"])
def test_quantized_linears_compute_with_their_dequantized_weights(odd, format):
    found = load(odd, trust_remote_code=True, quantization=format)
    dense = load(odd, trust_remote_code=True)
    names = [n for n, m in found.model.decoder.named_modules() if isinstance(m, QuantizedLinear)]
    assert names == [f"{FOREIGN}.blocks.{i}.{name}" for i in range(2) for name in ("qkv", "out")]
    for name in names:
        linear = found.model.decoder.get_submodule(name)
        dense.model.decoder.get_submodule(name).weight.data = linear.dequantized(torch.float32)
    same(found.logits(TOKENS), dense.logits(TOKENS))
    with pytest.raises(ConfigError, match="is loaded as nf4"):
        found.save(odd.parent / "never")


def test_a_model_without_plain_linears_is_not_quantized(tokenizer, tmp_path):
    path = write_native(tmp_path / "gpt", tokenizer, "openai-gpt")
    with pytest.raises(ConfigError, match="has no plain linears to quantize"):
        load(path, trust_remote_code=True, quantization="nf4")


def test_a_linear_that_their_code_takes_apart_is_named(tokenizer, tmp_path):
    path = write_native(tmp_path / "rwkv", tokenizer, "rwkv")
    with pytest.raises(
        ConfigError, match=r"reads 'weight' of rwkv\.blocks\.0\..* a QuantizedLinear"
    ):
        load(path, trust_remote_code=True, quantization="nf4")


def test_what_was_loaded_is_saved_as_it_was_with_its_code(tokenizer, tmp_path):
    path = write_odd(tmp_path / "original", tokenizer)
    load(path, trust_remote_code=True).save(tmp_path / "saved")
    saved = tmp_path / "saved"
    for name in ("config.json", "modeling_odd.py", "configuration_odd.py", "layers_odd.py"):
        assert (saved / name).read_bytes() == (path / name).read_bytes(), name
    assert not (saved / "unrelated.py").exists()
    ours, was = (load_file(d / "model.safetensors") for d in (saved, path))
    assert ours.keys() == was.keys()
    assert all(torch.equal(ours[name], was[name]) for name in was)
    again = load(saved, trust_remote_code=True)
    assert torch.equal(again.logits(TOKENS), load(path, trust_remote_code=True).logits(TOKENS))
    again.save(saved)  # over itself
    (saved / "notes.py").write_text("")
    with pytest.raises(CheckpointError, match=r"also holds notes\.py"):
        again.save(saved)


def test_weights_that_code_changes_for_evaluation_are_saved_as_they_were(tokenizer, tmp_path):
    path = write_native(tmp_path / "rwkv", tokenizer, "rwkv")
    lm = load(path, trust_remote_code=True)
    was = load_file(path / "model.safetensors")
    lm.logits(TOKENS)
    name = "blocks.3.attention.output.weight"
    changed = dict(lm.model.decoder.foreign.rwkv.named_parameters())[name]
    assert not torch.equal(changed, was[f"rwkv.{name}"])  # halved: what a plain saving would write
    lm.save(tmp_path / "saved")
    found = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(found[name], was[name]) for name in was)


def test_saving_draws_no_random_number(tokenizer, tmp_path):
    def restless(source):
        writes = "torch.autograd.graph.increment_version(self.unembed.weight)"
        return source.replace("past = 0 if", f"{writes}\n        past = 0 if")

    lm = load(write_odd(tmp_path / "odd", tokenizer, restless, dropout=0.2), trust_remote_code=True)
    assert lm.model.decoder._restless
    before = torch.get_rng_state()
    lm.save(tmp_path / "saved")
    assert torch.equal(torch.get_rng_state(), before)


def test_parts_are_known_by_what_they_are(odd, tokenizer, tmp_path):
    decoder = load(odd, trust_remote_code=True).model.decoder
    assert decoder.place_of(f"{FOREIGN}.blocks.0.qkv") == "layers"
    assert decoder.place_of(f"{FOREIGN}.unembed") == "head"
    tied = write_native(tmp_path / "neo", tokenizer, "gpt_neo")
    decoder = load(tied, trust_remote_code=True).model.decoder
    assert isinstance(decoder, Foreign) and decoder.place_of(f"{FOREIGN}.lm_head") is None
    assert isinstance(decoder.foreign.lm_head, nn.Linear)


@pytest.mark.parametrize("kind", sorted(NATIVE))
@pytest.mark.sweep
def test_models_of_transformers_give_what_they_give_there(tokenizer, tmp_path, kind):
    changes = {"is_decoder": True} if kind == "bert" else {}
    path = write_native(tmp_path / kind, tokenizer, kind, **changes)
    lm, peer = load(path, trust_remote_code=True), theirs(path)
    with torch.no_grad():
        wanted = peer(TOKENS).logits
        same(lm.logits(TOKENS), wanted)
        packed = lm.model.decoder.hidden(TOKENS, Packed(((4, 5), (2, 7))))
        same(packed[1, 2:], peer(TOKENS[1:, 2:]).logits[0])
    cached = lm.generate(PROMPTS, max_new_tokens=8, temperature=0.0)
    for prompt, found in zip(PROMPTS, cached, strict=True):
        ids = lm.tokenizer.encode(prompt)
        wanted = greedy(peer, ids, 8, lm.tokenizer.vocab_rows)
        assert list(found.tokens) == wanted[: len(found.tokens)]
    assert (lm.model.decoder._reading is None) == (kind == "openai-gpt")  # which has no cache
    unlimited = kind in ("mamba", "mamba2")
    assert (lm.spec.max_positions == UNLIMITED) == unlimited
    lm.save(tmp_path / "saved")
    again = load(tmp_path / "saved", trust_remote_code=True)
    assert torch.equal(again.logits(TOKENS), lm.logits(TOKENS))
