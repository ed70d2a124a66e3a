"""Adapters travel between PEFT and Ardor and compute the same on both sides."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from ardor.adapters.embedding import TrainableTokens
from ardor.adapters.lora import (
    LoraConfig,
    add_lora,
    lora_modules,
    lora_parameters,
)
from ardor.adapters.merge import merge
from ardor.adapters.peft_files import load_adapter
from ardor.adapters.peft_layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ardor.adapters.peft_save import save_adapter
from ardor.arch.decoder import Decoder
from ardor.errors import CheckpointError, ConfigError
from ardor.load import load_model

pytestmark = [
    # PEFT asks transformers 5 by an old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def trained(pair, config, seed=7) -> Decoder:
    decoder = pair.ours()
    add_lora(decoder, config, names=pair.name, generator=torch.Generator().manual_seed(0))
    pair.randomise(lora_parameters(decoder), seed)
    return decoder


def saved(pair, decoder, config, directory) -> Path:
    save_adapter(
        directory, decoder, config, disk_names=pair.disk_names, base_model=pair.path, revision="r1"
    )
    return Path(directory)


def theirs(pair, directory, **settings) -> PeftModel:
    """An adapter made by PEFT with random B, and saved by it."""
    torch.manual_seed(1)
    model = get_peft_model(pair.theirs(), PeftConfig(**settings))
    pair.randomise([p for p in model.parameters() if p.requires_grad])
    model.save_pretrained(str(directory))
    return model.eval()


def edited(directory, **settings) -> Path:
    path = Path(directory) / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return path


CONFIGS = {
    "all": LoraConfig(r=4),
    "rslora": LoraConfig(r=4, lora_alpha=7, use_rslora=True, lora_dropout=0.1),
    "some": LoraConfig(r=3, lora_alpha=10, target_modules=("q_proj", "down_proj")),
    "tokens": LoraConfig(r=2, target_modules=("v_proj",), trainable_token_indices=(9, 4)),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_peft_computes_the_same_with_what_we_saved(pair, config, tmp_path):
    decoder = trained(pair, config).eval()
    saved(pair, decoder, config, tmp_path)
    with torch.no_grad():
        base = pair.theirs()
        before = pair.logits(base)
        model = PeftModel.from_pretrained(base, str(tmp_path))
        close(pair.logits(decoder), pair.logits(model))
        assert (pair.logits(model) - before).abs().max() > 0.1  # the adapter acts at all
        close(pair.logits(model.merge_and_unload()), pair.logits(decoder))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_we_saved_comes_back(pair, config, tmp_path):
    decoder = trained(pair, config).eval()
    saved(pair, decoder, config, tmp_path)
    again = pair.ours()
    found = load_adapter(tmp_path, again, disk_names=pair.disk_names)
    close(pair.logits(again.eval()), pair.logits(decoder))
    assert (found.r, found.lora_alpha, found.lora_dropout) == (
        (config.r, config.lora_alpha, config.lora_dropout)
    )
    assert found.use_rslora == config.use_rslora
    assert found.trainable_token_indices == config.trainable_token_indices
    trainable = {id(p) for p in lora_parameters(again)}
    assert {id(p) for p in again.parameters() if p.requires_grad} == trainable


def test_whole_groups_come_back_bitwise_and_with_their_rank(pair, tmp_path):
    decoder = trained(pair, CONFIGS["all"])
    saved(pair, decoder, CONFIGS["all"], tmp_path)
    again = pair.ours()
    load_adapter(tmp_path, again, disk_names=pair.disk_names)
    ours, back = dict(lora_modules(decoder)), dict(lora_modules(again))
    assert ours.keys() == back.keys()
    for name, module in ours.items():
        assert (back[name].r, back[name].alpha) == (module.r, module.alpha)
        assert torch.equal(back[name].lora_A, module.lora_A)
        assert torch.equal(back[name].lora_B, module.lora_B)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_resuming_overwrites_in_place(pair, config, tmp_path):
    decoder, other = trained(pair, config), trained(pair, config, seed=8)
    saved(pair, decoder, config, tmp_path)
    parameters = lora_parameters(other)
    assert not any(
        torch.equal(a, b) for a, b in zip(parameters, lora_parameters(decoder), strict=True)
    )
    load_adapter(tmp_path, other, disk_names=pair.disk_names)
    assert all(a is b for a, b in zip(parameters, lora_parameters(other), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(parameters, lora_parameters(decoder), strict=True))


PEFT_CONFIGS = {
    "list": {"r": 4, "lora_alpha": 9},
    "all-linear": {"r": 3, "target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "r": 4,
        "rank_pattern": {"mlp.c_fc|up_proj": 2},
        "alpha_pattern": {"c_attn|q_proj": 3},
    },
    "regex": {"target_modules": r".*\.1\..*(q_proj|c_attn|down_proj)", "r": 2},
    "layers": {"r": 2, "layers_to_transform": [1]},
    "excluded": {"r": 2, "target_modules": "all-linear", "exclude_modules": ["up_proj", "c_fc"]},
    "gaussian": {"r": 2, "init_lora_weights": "gaussian"},
    "tokens": {"r": 2, "trainable_token_indices": [5, 2]},
}


@pytest.mark.parametrize("settings", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS)
@pytest.mark.sweep
def test_we_compute_the_same_with_what_peft_saved(pair, settings, tmp_path):
    fused = pair.kind == "gpt2"
    some = ["c_attn", "c_fc"] if fused else ["q_proj", "up_proj"]
    model = theirs(pair, tmp_path, **{"target_modules": some, "fan_in_fan_out": fused, **settings})
    decoder = pair.ours()
    before = pair.logits(decoder)
    load_adapter(tmp_path, decoder, disk_names=pair.disk_names)
    with torch.no_grad():
        close(pair.logits(decoder.eval()), pair.logits(model))
        assert (pair.logits(decoder) - before).abs().max() > 0.1


def test_rows_of_an_untied_head_travel_both_ways(llama, tmp_path):
    rows = {"embed_tokens": [3, 1], "lm_head": [2]}
    model = theirs(
        llama, tmp_path / "a", r=2, trainable_token_indices=rows, target_modules=["q_proj"]
    )
    decoder = llama.ours()
    config = load_adapter(tmp_path / "a", decoder, disk_names=llama.disk_names)
    close(llama.logits(decoder), llama.logits(model))
    saved(llama, decoder, config, tmp_path / "b")
    close(
        llama.logits(PeftModel.from_pretrained(llama.theirs(), str(tmp_path / "b"))),
        llama.logits(decoder),
    )
    merge(decoder)
    close(llama.logits(decoder), llama.logits(model))


def test_a_shared_a_stays_shared(gpt2, tmp_path):
    model = theirs(gpt2, tmp_path / "a", r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    decoder = gpt2.ours()
    config = load_adapter(tmp_path / "a", decoder, disk_names=gpt2.disk_names)
    saved(gpt2, decoder, config, tmp_path / "b")
    first, second = (load_file(tmp_path / x / ADAPTER_WEIGHTS) for x in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert "rank_pattern" not in edited(tmp_path / "b").read_text().replace(
        '"rank_pattern": {}', ""
    )
    close(gpt2.logits(decoder), gpt2.logits(model))


def test_part_of_a_fused_linear_is_adapted_alone(gpt2, tmp_path):
    config = LoraConfig(r=2, target_modules=("mixer.q_proj", "v_proj"))
    decoder = trained(gpt2, config)
    saved(gpt2, decoder, config, tmp_path)
    b = load_file(tmp_path / ADAPTER_WEIGHTS)[
        "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"
    ]
    assert b.shape == (72, 4) and not b[24:48].any() and not b[:24, 2:].any()
    close(
        gpt2.logits(PeftModel.from_pretrained(gpt2.theirs(), str(tmp_path))), gpt2.logits(decoder)
    )
    only_q = gpt2.ours()
    add_lora(only_q, LoraConfig(r=2, target_modules=("mixer.q_proj",)))
    with pytest.raises(CheckpointError, match=r"reaches beyond the adapted .*q_proj"):
        load_adapter(tmp_path, only_q, disk_names=gpt2.disk_names)


def test_targets_are_written_as_endings_that_mean_no_other_linear(gpt2, tmp_path):
    config = LoraConfig(r=4, target_modules=("o_proj", "up_proj"))
    saved(gpt2, trained(gpt2, config), config, tmp_path)
    written = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert written["target_modules"] == ["attn.c_proj", "c_fc"]  # c_proj alone is the mlp's too
    assert written["base_model_name_or_path"] == gpt2.path and written["revision"] == "r1"


def test_the_assembler_loads_an_adapter_with_its_base(llama, tmp_path):
    model = theirs(llama, tmp_path, r=4, target_modules=["q_proj", "v_proj"])
    close(llama.logits(load_model(tmp_path, dtype="float32").decoder), llama.logits(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "lacks .*q_proj.lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, r"lacks the weights of lm_head"),
        ({"lora_bias": True}, "lacks .*q_proj.lora_B.bias"),
        ({"a_key_of_tomorrow": 3}, "a_key_of_tomorrow=3 would change results"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda' changes the base weights"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"target_modules": ["nothing"]}, r"\['nothing'\] matches no linear of this model"),
        ({"r": 5}, r"q_proj has A \[2, 24\] and B \[24, 2\], expected \[5, 24\] and \[24, 5\]"),
        ({"trainable_token_indices": [1]}, r"lacks the trained token rows of \['embed_tokens'\]"),
        ({"trainable_token_indices": {"wte": [1]}}, r"names \['wte'\], which are not all"),
    ],
)
def test_what_would_change_results_is_refused_by_name(llama, tmp_path, settings, message):
    config = LoraConfig(r=2, target_modules=("q_proj",))
    edited(saved(llama, trained(llama, config), config, tmp_path), **settings)
    decoder = llama.ours()
    before = str(decoder)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(tmp_path, decoder, disk_names=llama.disk_names)
    assert str(decoder) == before


def test_unknown_settings_that_are_off_are_ignored(llama, tmp_path):
    config = LoraConfig(r=2, target_modules=("q_proj",))
    directory = saved(llama, trained(llama, config), config, tmp_path)
    edited(directory, of_tomorrow=None, other=False, more={}, qalora_group_size=16)
    load_adapter(tmp_path, llama.ours(), disk_names=llama.disk_names)


def test_missing_extra_and_damaged_tensors_are_named(llama, tmp_path):
    config = LoraConfig(r=2, target_modules=("q_proj",))
    weights = saved(llama, trained(llama, config), config, tmp_path) / ADAPTER_WEIGHTS
    whole = load_file(weights)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    save_file({k: v for k, v in whole.items() if k != key}, weights)
    with pytest.raises(CheckpointError, match=rf"lacks {key}"):
        load_adapter(tmp_path, llama.ours(), disk_names=llama.disk_names)
    save_file(whole | {"base_model.model.lm_head.weight": torch.zeros(2)}, weights)
    with pytest.raises(CheckpointError, match=r"no place: base_model\.model\.lm_head\.weight"):
        load_adapter(tmp_path, llama.ours(), disk_names=llama.disk_names)
    weights.write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_adapter(tmp_path, llama.ours(), disk_names=llama.disk_names)
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="adapter_model.bin beside it is a pickle"):
        load_adapter(tmp_path, llama.ours(), disk_names=llama.disk_names)


def test_resuming_another_adapter_is_refused(llama, tmp_path):
    config = LoraConfig(r=2, target_modules=("q_proj",))
    saved(llama, trained(llama, config), config, tmp_path)
    for other, message in (
        (LoraConfig(r=2, target_modules=("v_proj",)), r"adapts other modules .*self_attn\.q_proj"),
        (LoraConfig(r=2, lora_alpha=1, target_modules=("q_proj",)), "alpha 32.* has rank 2 .* 1$"),
        (
            LoraConfig(r=2, target_modules=("q_proj",), trainable_token_indices=(1,)),
            "train the rows of different tokens",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_adapter(tmp_path, trained(llama, other), disk_names=llama.disk_names)


def test_a_killed_save_leaves_the_old_adapter(llama, tmp_path, monkeypatch):
    config = LoraConfig(r=2, target_modules=("q_proj",))
    saved(llama, trained(llama, config), config, tmp_path)
    before = load_file(tmp_path / ADAPTER_WEIGHTS)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        saved(llama, trained(llama, config, seed=9), config, tmp_path)
    after = load_file(tmp_path / ADAPTER_WEIGHTS)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_model_without_an_adapter_has_none_to_save(llama, tmp_path):
    with pytest.raises(ConfigError, match="has no adapter to save"):
        saved(llama, llama.ours(), LoraConfig(r=4), tmp_path)
    decoder = llama.ours()
    add_lora(decoder, LoraConfig(r=4, trainable_token_indices=(1,)))
    assert isinstance(decoder.embed_tokens, TrainableTokens)
    names = {k: v for k, v in llama.disk_names.items() if k != "embed_tokens"}
    with pytest.raises(ConfigError, match="no name on disk is known for embed_tokens"):
        save_adapter(tmp_path, decoder, LoraConfig(r=4), disk_names=names, base_model="x")
