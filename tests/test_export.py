"""What we save is what others look for: transformers by reading it, older readers by their keys."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

import ardor
from ardor import load as public_load
from ardor.errors import CheckpointError, ConfigError
from ardor.families.older import with_older_keys
from ardor.files import stream
from ardor.save import shard_bytes

from .parity.cases import CASES
from .parity.peer import contents, logits, peer, saved, tokens

ONE_OF_EACH = [name for name in CASES if name.split(":")[0] in (
    "llama", "gpt2", "gpt_neox", "gemma3_text", "phi", "mixtral", "qwen2")]  # fmt: skip


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_shards_and_index_are_those_of_transformers(case, tmp_path):
    model = peer(CASES[case])
    theirs = saved(model, tmp_path / "theirs", max_shard_size="20KB")
    ours = tmp_path / "ours"
    public_load(saved(model, tmp_path / "whole")).save(ours, max_shard_size="20KB")
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    wanted = json.loads((theirs / "model.safetensors.index.json").read_text())
    assert index.keys() == wanted.keys()
    assert index["weight_map"].keys() == wanted["weight_map"].keys()
    assert index["metadata"] == wanted["metadata"]
    files = {path.name for path in ours.glob("*.safetensors")}
    assert files == {*index["weight_map"].values()} and len(files) > 2
    for name, file in index["weight_map"].items():
        held = load_file(ours / file)
        assert name in held
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 20_000
    assert contents(ours) == contents(theirs)
    again = AutoModelForCausalLM.from_pretrained(ours, attn_implementation=CASES[case].attn)
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


# What each of them reads from config.json (docs/LOADING.md, "Saving").
READ = {
    "transformers 4": ("torch_dtype", "rope_theta", "rope_scaling"),
    "transformers 5": ("dtype", "rope_parameters"),
    "vLLM": ("architectures", "torch_dtype", "rope_theta", "rope_scaling"),
    "llama.cpp": ("architectures", "rope_theta", "rope_scaling", "hidden_size",
                  "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                  "intermediate_size", "rms_norm_eps", "max_position_embeddings"),
}  # fmt: skip


def test_every_reader_finds_its_keys_although_transformers_5_wrote_the_config(tmp_path):
    directory = saved(peer(CASES["llama: dynamic"]), tmp_path / "theirs")
    before = json.loads((directory / "config.json").read_text())
    assert {"torch_dtype", "rope_theta", "rope_scaling"}.isdisjoint(before)
    lm = public_load(directory)
    lm.save(tmp_path / "ours")
    found = json.loads((tmp_path / "ours" / "config.json").read_text())
    for reader, keys in READ.items():
        assert not {*keys} - {*found}, reader
    assert found["torch_dtype"] == found["dtype"] == before["dtype"]
    assert found["rope_theta"] == found["rope_parameters"]["rope_theta"] == 50.0
    assert found["rope_scaling"] == {"rope_type": "dynamic", "factor": 3.0}
    assert {key: found[key] for key in before} == before
    twice = public_load(tmp_path / "ours")  # both forms, and they agree
    assert twice.model.form.spec == public_load(directory).model.form.spec
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").config
    assert theirs.rope_parameters == before["rope_parameters"]


@pytest.mark.parametrize(
    ("newer", "older"),
    [
        ({"rope_theta": 5.0, "rope_type": "default"}, {"rope_theta": 5.0}),
        (
            {"rope_theta": 5.0, "rope_type": "default", "partial_rotary_factor": 0.5},
            {"rope_theta": 5.0, "partial_rotary_factor": 0.5},
        ),
        (
            {"rope_theta": 5.0, "rope_type": "linear", "factor": 2.0},
            {"rope_theta": 5.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
    ],
)
def test_the_older_keys_of_a_rotation(newer, older):
    config = {"model_type": "llama", "rope_parameters": newer}
    assert with_older_keys(config) == config | older
    assert with_older_keys({"text_config": config})["text_config"] == config | older


def test_the_older_keys_of_families_that_call_them_otherwise():
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    local = {"rope_type": "default", "rope_theta": 1e4}
    nested = {"full_attention": full, "sliding_attention": local}
    gemma = with_older_keys({"model_type": "gemma3_text", "rope_parameters": nested})
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (1e6, 1e4)
    assert gemma["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    plain = {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.25}
    neox = with_older_keys({"model_type": "gpt_neox", "rope_parameters": plain})
    assert (neox["rotary_emb_base"], neox["rotary_pct"]) == (7.0, 0.25)
    assert "rope_theta" not in neox
    assert with_older_keys({"model_type": "qwen3_moe", "num_local_experts": 7})["num_experts"] == 7


def test_a_scaling_is_said_in_the_only_keys_that_its_family_allowed():
    long = {"short_factor": [1.0], "long_factor": [2.0], "original_max_position_embeddings": 16}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **long}
    config = {"model_type": "phi3", "original_max_position_embeddings": 16, "rope_parameters": rope}
    short = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    assert with_older_keys(config)["rope_scaling"] == short
    del config["original_max_position_embeddings"]  # then it would be lost
    assert with_older_keys(config)["rope_scaling"] == {"rope_type": "longrope", **long}
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}
    olmo = with_older_keys({"model_type": "olmo", "rope_parameters": linear})
    assert olmo["rope_scaling"] == {"type": "linear", "factor": 2.0}


def test_olmo3_says_the_rotation_of_its_full_layers_if_the_others_turn_by_the_same_theta():
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 7.0}
    rope = {"full_attention": full, "sliding_attention": {"rope_theta": 7.0}}
    found = with_older_keys({"model_type": "olmo3", "rope_parameters": rope})
    assert found["rope_theta"] == 7.0
    assert found["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    rope["sliding_attention"] = {"rope_theta": 8.0}
    assert "rope_theta" not in with_older_keys({"model_type": "olmo3", "rope_parameters": rope})


def test_what_a_config_says_already_stays(tmp_path):
    older = {"model_type": "llama", "torch_dtype": "bfloat16", "rope_theta": 3.0}
    assert with_older_keys(older) == older
    both = older | {"dtype": "float32", "rope_parameters": {"rope_theta": 4.0}}
    assert with_older_keys(both) == both


def test_a_saved_generation_config_can_be_saved_again_by_transformers(tmp_path):
    """They refuse to write one whose settings contradict each other."""
    directory = saved(peer(CASES["llama: grouped"]), tmp_path / "theirs")
    GenerationConfig(eos_token_id=[2, 5], do_sample=True, temperature=0.6).save_pretrained(
        directory
    )
    public_load(directory).save(tmp_path / "ours")
    found = GenerationConfig.from_pretrained(tmp_path / "ours")
    assert (found.eos_token_id, found.temperature) == ([2, 5], 0.6)
    found.save_pretrained(tmp_path / "again")


def test_a_disk_that_fills_while_saving_leaves_the_target_as_it_was(tmp_path, monkeypatch):
    lm = public_load(saved(peer(CASES["llama: grouped"]), tmp_path / "theirs"))
    target = tmp_path / "target"
    lm.save(target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    written = []

    def write_bytes(tensor):
        written.append(tensor.nbytes)
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return bytes(tensor.nbytes)

    monkeypatch.setattr(stream, "_bytes", write_bytes)
    for place in (target, tmp_path / "new"):
        written.clear()
        with pytest.raises(CheckpointError, match="no space left .*nothing was changed; free some"):
            lm.save(place)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target", "theirs"]


def test_the_public_save_is_the_models(tmp_path):
    lm = public_load(saved(peer(CASES["llama: grouped"]), tmp_path / "theirs"))
    ardor.save(lm, tmp_path / "ours", max_shard_size=20_000)
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 1
    import ardor.save as module  # the name stays the function, whoever imports the module

    assert ardor.save is module is ardor.lm.save


@pytest.mark.parametrize(
    ("size", "wanted"),
    [(7, 7), ("7", 7), ("5GB", 5 * 10**9), ("5GiB", 5 << 30), ("20 kb", 20_000), ("1TB", 10**12)],
)
def test_a_size_is_read_as_transformers_reads_it(size, wanted):
    assert shard_bytes(size) == wanted


@pytest.mark.parametrize("size", [0, -1, "", "GB", "5 gigs", "1.5GB"])
def test_what_is_no_size_is_refused(size, tmp_path):
    with pytest.raises(ConfigError, match="is not a size; give bytes, or a number with a unit"):
        shard_bytes(size)


def test_files_of_our_own_directory_are_all_known(tmp_path):
    lm = public_load(saved(peer(CASES["llama: grouped"]), tmp_path / "theirs"))
    lm.save(tmp_path / "a", max_shard_size=20_000)
    lm.save(tmp_path / "a")  # shards give way to one file
    names = {path.name for path in Path(tmp_path / "a").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
