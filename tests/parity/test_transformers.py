"""What transformers computes from a checkpoint, we compute; what we save, it reads.

Tolerance: float32 sums of a few dozen terms of size 10, in another order.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import ardor
from ardor.arch.decoder import Decoder
from ardor.errors import CheckpointError, ConfigError
from ardor.families import FAMILIES, family_of
from ardor.families.hf_config import HFConfig
from ardor.files.json import read_json, write_json
from ardor.files.weights import open_weights, write_weights

from .peer import assert_config_kept

pytestmark = pytest.mark.sweep

V, T = 53, 24
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def yarn(**keys: Any) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": 5e3,
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        **keys,
    }


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e3,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
RAMP = {"original_max_position_embeddings": 32, "beta_fast": 2.0, "beta_slow": 0.25}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}

# One knob, or a few that can meet, against transformers' defaults.
LLAMAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2},
    "one kv head": {"num_key_value_heads": 1},
    "head wider than its share": {"head_dim": 10},
    "head narrower than its share": {"head_dim": 4, "num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "large eps": {"rms_norm_eps": 0.2},
    "gelu": {"hidden_act": "gelu"},
    "gelu_new": {"hidden_act": "gelu_new"},
    "relu2": {"hidden_act": "relu2"},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "linear": {"rope_parameters": LINEAR},
    "llama3": {"rope_parameters": LLAMA3},
    "yarn": {"rope_parameters": yarn()},
    "yarn whole channels": {"rope_parameters": yarn(**RAMP)},
    "yarn part channels": {"rope_parameters": yarn(**RAMP, truncate=False)},
    "yarn factor": {"rope_parameters": yarn(attention_factor=0.7)},
    "yarn mscale": {"rope_parameters": yarn(mscale=0.5, mscale_all_dim=2.0)},
    "yarn one mscale": {"rope_parameters": yarn(mscale=0.5)},
}
GPT2S: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "inner": {"n_inner": 17},
    "relu": {"activation_function": "relu"},
    "gelu": {"activation_function": "gelu"},
    "large eps": {"layer_norm_epsilon": 0.3},
    "unscaled": {"scale_attn_weights": False},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "upcast": {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
}
SIZES = {
    "llama": {
        "vocab_size": V,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "max_position_embeddings": 64,
    },
    "gpt2": {"vocab_size": V, "n_positions": 32, "n_embd": 24, "n_layer": 3, "n_head": 3},
}
CASES = [("llama", name) for name in LLAMAS] + [("gpt2", name) for name in GPT2S]


def peer(family: str, case: str = "plain", seed: int = 0, **keys: Any) -> nn.Module:
    """A model of transformers in evaluation mode, with random weights: norms and biases too."""
    if family == "llama":
        config = LlamaConfig(
            **{**SIZES["llama"], **LLAMAS[case], **keys}, attn_implementation="eager"
        )
        model: nn.Module = LlamaForCausalLM(config)
    else:
        config = GPT2Config(**{**SIZES["gpt2"], **GPT2S[case], **keys}, attn_implementation="eager")
        model = GPT2LMHeadModel(config)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=g)
            if parameter.ndim == 1:
                parameter.copy_(0.3 * noise + ("bias" not in name))
            else:
                # Loud enough to show a mistake, not so loud that layers amplify rounding to 1e-5.
                parameter.copy_((0.3 if V in parameter.shape else 0.15) * noise)
    return model.eval()


def saved(model: nn.Module, directory: Path, **keys: Any) -> Path:
    model.save_pretrained(directory, **keys)
    return directory


def tokens(rows: int = 2, length: int = T, seed: int = 1) -> Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **keys: Any) -> Tensor:
    return model(ids, **keys).logits


def reloaded(family: str, directory: Path) -> nn.Module:
    kind = LlamaForCausalLM if family == "llama" else GPT2LMHeadModel
    model, report = kind.from_pretrained(
        directory, dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def contents(directory) -> dict[str, tuple[str, list[int], bytes]]:
    found = open_weights(directory)
    held = {name: found.read(name) for name in found.names()}
    return {
        name: (str(t.dtype), list(t.shape), t.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, t in held.items()
    }


def edit(directory, **keys) -> None:
    """Set keys of config.json; None removes."""
    config = {**read_json(directory / "config.json"), **keys}
    write_json(
        directory / "config.json", {k: v for k, v in config.items() if keys.get(k, v) is not None}
    )


def rewrite(directory, change) -> None:
    held = load_file(directory / "model.safetensors")
    save_file(change(held), directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "case"), CASES)
def test_logits_are_those_of_transformers(tmp_path, family, case, attn):
    theirs = peer(family, case)
    expected = logits(theirs, tokens())
    assert expected.std() > 1  # an error would show
    ours = ardor.load(saved(theirs, tmp_path), attn_implementation=attn).logits(tokens())
    torch.testing.assert_close(ours, expected, **CLOSE)


SAME_SHAPE = [
    ("llama", name, "plain")
    for name, keys in LLAMAS.items()
    if keys.keys() <= {"hidden_act", "rms_norm_eps", "rope_parameters"} and keys
] + [
    *(("gpt2", name, "plain") for name in ("relu", "gelu", "large eps", "unscaled")),
    ("gpt2", "scaled by layer", "plain"),
    ("llama", "yarn part channels", "yarn whole channels"),
    ("llama", "yarn", "yarn factor"),
    ("llama", "yarn mscale", "yarn one mscale"),
]


@pytest.mark.parametrize(("family", "case", "other"), SAME_SHAPE)
def test_each_knob_can_be_seen_by_that_comparison(family, case, other):
    turned = peer(family, case)
    other = peer(family, other)
    other.load_state_dict(turned.state_dict())
    assert (logits(other, tokens()) - logits(turned, tokens())).abs().max() > 3e-4  # 30 tolerances


@pytest.mark.parametrize(("family", "case"), [("llama", "biases"), ("llama", "tied"), *CASES[-2:]])
def test_left_padded_rows_there_are_plain_rows_here(tmp_path, family, case):
    theirs = peer(family, case)
    lm = ardor.load(saved(theirs, tmp_path))
    ids, mask = tokens(3), torch.ones(3, T, dtype=torch.long)
    lengths = (T, T - 5, 1)
    for row, length in enumerate(lengths):
        mask[row, : T - length] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = logits(theirs, ids, attention_mask=mask, position_ids=positions)
    for row, length in enumerate(lengths):
        ours = lm.logits(ids[row : row + 1, T - length :])
        torch.testing.assert_close(ours[0], expected[row, T - length :], **CLOSE)


@pytest.mark.parametrize(
    ("family", "case"),
    [("llama", "biases"), ("llama", "llama3"), ("llama", "tied"), *CASES[-9:-7], CASES[-1]],
)
def test_gradients_of_all_parameters_are_those_of_transformers(tmp_path, family, case):
    theirs, ids = peer(family, case), tokens()
    lm = ardor.load(saved(theirs, tmp_path))
    decoder = lm.model.decoder.requires_grad_(True)

    def loss(scores):
        return torch.nn.functional.cross_entropy(
            scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )

    loss(theirs(ids).logits).backward()
    loss(lm.logits(ids)).backward()
    ours = {name: parameter.grad for name, parameter in decoder.named_parameters()}
    found = dict(lm.model.form.rules.to_disk(ours.__getitem__))
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if not name.endswith("k_proj.bias"):  # a shift of all scores: its gradient is rounding
            assert gradient.abs().max() > 0.01, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "case"), [("llama", "biases"), ("llama", "tied"), ("gpt2", "plain"), CASES[-8]]
)
def test_what_is_loaded_is_saved_bit_for_bit(tmp_path, family, case, dtype):
    theirs = peer(family, case).to(dtype)
    before = saved(theirs, tmp_path / "before")
    ardor.load(before).save(tmp_path / "after")
    assert contents(tmp_path / "after") == contents(before)
    assert_config_kept(tmp_path / "after", before)
    again = logits(reloaded(family, tmp_path / "after"), tokens())
    assert torch.equal(again, logits(reloaded(family, before), tokens()))


def test_shards_are_one_model(tmp_path):
    theirs = peer("llama")
    directory = saved(theirs, tmp_path, max_shard_size="10KB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    torch.testing.assert_close(
        ardor.load(directory).logits(tokens()), logits(theirs, tokens()), **CLOSE
    )


def test_gpt2_as_the_hub_has_it(tmp_path):
    """Names without the prefix, and the causal masks as buffers."""
    theirs = peer("gpt2")

    def as_published(held):
        held = {name.removeprefix("transformer."): tensor for name, tensor in held.items()}
        mask = torch.ones(1, 1, 32, 32).tril()
        masks = {f"h.{i}.attn.bias": mask.clone() for i in range(3)}
        return held | masks | {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}

    before = saved(theirs, tmp_path / "before")
    rewrite(before, as_published)
    lm = ardor.load(before)
    torch.testing.assert_close(lm.logits(tokens()), logits(theirs, tokens()), **CLOSE)
    lm.save(tmp_path / "after")
    masks = re.compile(r"h\.\d\.attn\.(masked_)?bias")
    kept = {n: t for n, t in contents(before).items() if not masks.fullmatch(n)}
    assert contents(tmp_path / "after") == kept and "h.0.attn.c_attn.bias" in kept
    again = logits(reloaded("gpt2", tmp_path / "after"), tokens())
    assert torch.equal(again, logits(theirs, tokens()))


def test_llama_with_its_frequencies_in_the_file(tmp_path):
    theirs = peer("llama")
    directory = saved(theirs, tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(directory, lambda held: {**held, name: torch.zeros(4)})
    torch.testing.assert_close(
        ardor.load(directory).logits(tokens()), logits(theirs, tokens()), **CLOSE
    )


@pytest.mark.parametrize(
    ("family", "embedding"),
    [("llama", "model.embed_tokens.weight"), ("gpt2", "transformer.wte.weight")],
)
def test_a_tied_head_may_be_on_disk_if_it_is_the_embedding(tmp_path, family, embedding):
    directory = saved(peer(family, tie_word_embeddings=True), tmp_path / "before")
    rewrite(directory, lambda held: {**held, "lm_head.weight": held[embedding].clone()})
    ardor.load(directory).save(tmp_path / "after")
    assert contents(tmp_path / "after") == contents(directory)
    rewrite(directory, lambda held: {**held, "lm_head.weight": held[embedding] + 1e-3})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        ardor.load(directory)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.1.self_attn.k_proj.weight"),
        ("llama", "lm_head.weight"),
        ("gpt2", "transformer.h.2.attn.c_attn.bias"),
    ],
)
def test_a_missing_or_foreign_tensor_is_named(tmp_path, family, name):
    directory = saved(peer(family), tmp_path)
    renamed = {name: name + ".old"}
    rewrite(directory, lambda held: {renamed.get(key, key): t for key, t in held.items()})
    found = re.escape(f"missing {name}; unexpected {name}.old")
    with pytest.raises(CheckpointError, match=found):
        ardor.load(directory)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    directory = saved(peer("llama"), tmp_path)
    edit(directory, intermediate_size=21)
    with pytest.raises(CheckpointError, match=r"gate_proj.* the shape \[20, 24\], .* \[21, 24\]"):
        ardor.load(directory)


@pytest.mark.parametrize(
    ("family", "keys", "says"),
    [
        ("llama", {"clip_qkv": 8}, "config.json: nothing reads clip_qkv=8"),
        ("llama", {"hidden_act": "xielu"}, "hidden_act='xielu' is not implemented"),
        ("llama", {"rope_scaling": {"rope_type": "mrope"}}, "rope_type='mrope'"),
        ("gpt2", {"clip_qkv": 8}, "config.json: nothing reads clip_qkv=8"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True is not implemented"),
        ("gpt2", {"model_type": "gpt5"}, "model_type='gpt5' is not implemented"),
    ],
)
def test_a_config_that_we_cannot_honour_is_not_loaded(tmp_path, family, keys, says):
    directory = saved(peer(family), tmp_path)
    edit(directory, **keys)
    with pytest.raises(ConfigError, match=re.escape(says)):
        ardor.load(directory)


def test_version_4_config_is_the_same_model(tmp_path):
    theirs = peer("llama", "llama3")
    directory = saved(theirs, tmp_path)
    rope = {**read_json(directory / "config.json")["rope_parameters"]}
    edit(
        directory,
        rope_parameters=None,
        rope_theta=rope.pop("rope_theta"),
        rope_scaling=rope,
        dtype=None,
        torch_dtype="float32",
    )
    torch.testing.assert_close(
        ardor.load(directory).logits(tokens()), logits(theirs, tokens()), **CLOSE
    )


@pytest.mark.parametrize(
    ("family", "case"),
    [("llama", "yarn mscale"), ("llama", "grouped"), ("llama", "tied"), *CASES[-3:]],
)
def test_a_model_made_here_is_read_there(tmp_path, family, case):
    raw = json.loads(peer(family, case).config.to_json_string())
    spec = family_of(raw).spec(HFConfig(raw, path="config.json"))
    ours, g = Decoder(spec), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=g))
    state = dict(ours.named_parameters())
    write_weights(tmp_path, FAMILIES[family].rules(spec).to_disk(state.__getitem__))
    write_json(tmp_path / "config.json", FAMILIES[family].config(spec))
    with torch.no_grad():
        expected = ours.logits(ours.hidden(tokens()))
    assert expected.std() > 1
    torch.testing.assert_close(logits(reloaded(family, tmp_path), tokens()), expected, **CLOSE)
    torch.testing.assert_close(ardor.load(tmp_path).logits(tokens()), expected, **CLOSE)


def test_the_base_model_without_its_head_is_refused_unless_tied(tmp_path):
    model = peer("llama")
    assert isinstance(model, LlamaForCausalLM)
    with pytest.raises(CheckpointError, match=r"missing lm_head\.weight"):
        ardor.load(saved(model.model, tmp_path / "untied"))
    tied = peer("llama", "tied")
    assert isinstance(tied, LlamaForCausalLM)
    torch.testing.assert_close(
        ardor.load(saved(tied.model, tmp_path / "tied")).logits(tokens()),
        logits(tied, tokens()),
        **CLOSE,
    )
