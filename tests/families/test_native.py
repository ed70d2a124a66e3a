"""Our own form of a checkpoint holds any decoder: loaded and saved again bit for bit."""

import json

import pytest
import torch
from hypothesis import given, settings

from ardor.arch.decoder import Decoder
from ardor.errors import ConfigError
from ardor.families import FAMILIES, family_for
from ardor.families.native import NATIVE
from ardor.files.json import write_json
from ardor.files.weights import write_weights
from ardor.load import load_model, state_of
from ardor.save import save_model

from ..invariants.test_random_specs import decoder_of, logits, many, some_ids, specs
from ..parity.peer import contents

# beartype, which checks the specs as they are drawn, looks at a random item of each tuple.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")


def written(decoder: Decoder, directory):
    directory.mkdir(parents=True, exist_ok=True)
    state = state_of(decoder)
    write_weights(directory, NATIVE.rules(decoder.spec).to_disk(state.__getitem__))
    write_json(directory / "config.json", NATIVE.config(decoder.spec, dtype="float64"))
    return directory


@settings(many, max_examples=12)
@given(specs)
@pytest.mark.sweep
@torch.no_grad()
def test_any_decoder_is_loaded_as_it_was_and_saved_bitwise(tmp_path_factory, spec):
    folder = tmp_path_factory.mktemp("native")
    decoder = decoder_of(spec, 0)
    path = written(decoder, folder / "a")
    model = load_model(path)
    assert model.decoder.spec == spec and model.form.family is NATIVE
    assert {*contents(path)} == {*state_of(decoder)}  # their names are those in memory
    torch.testing.assert_close(
        logits(model.decoder, some_ids()), logits(decoder, some_ids()), rtol=0, atol=0
    )
    save_model(model, folder / "b")
    assert contents(folder / "a") == contents(folder / "b")
    assert (folder / "a" / "config.json").read_bytes() == (
        folder / "b" / "config.json"
    ).read_bytes()


def test_a_family_that_others_read_comes_first():
    config = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 24,
        "intermediate_size": 10,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
    }
    from ardor.families.hf_config import HFConfig

    for family, keys in {
        "llama": {},
        "mistral": {"sliding_window": 9, "num_key_value_heads": 3},
        "qwen2": {"num_key_value_heads": 3},
        "qwen3": {"num_key_value_heads": 3, "head_dim": 8},
        "ardor": {"clip_qkv": 1.0},
    }.items():
        read = "olmoe" if family == "ardor" else family
        raw = {**config, "model_type": read, **keys}
        spec = FAMILIES[read].spec(HFConfig(raw, path="config.json"))
        assert family_for(spec).model_type == family


def test_adapters_have_no_place_on_stacked_experts():
    from ardor.arch.spec import Attention, Experts, Layer, Mlp, Norm, Router
    from ardor.arch.spec import Decoder as Spec

    norm = Norm(eps=1e-5)
    mixer = Attention(heads=2, kv_heads=2, head_width=4, scale=0.5, rope=None)
    ffn = Experts(count=2, expert=Mlp(width=8, act="silu"), router=Router(per_token=1))
    layer = Layer(mixer=mixer, ffn=ffn, norm=norm)
    spec = Spec(vocab=9, width=8, layers=(layer,), norm=norm, tied=True, max_positions=8)
    named = NATIVE.disk_linears(spec)
    assert {*named} == {
        "embed_tokens",
        *(f"layers.0.mixer.{part}_proj" for part in ("q", "k", "v", "o")),
        *("norm", "layers.0.mixer_norm", "layers.0.ffn_norm", "layers.0.ffn.router"),
    }


def test_a_damaged_spec_is_named_with_its_place(tmp_path):
    from ardor.arch.spec import Attention, Layer, Mlp, Norm
    from ardor.arch.spec import Decoder as Spec

    norm = Norm(eps=1e-5)
    mixer = Attention(heads=2, kv_heads=2, head_width=4, scale=0.5, rope=None)
    layer = Layer(mixer=mixer, ffn=Mlp(width=8, act="silu"), norm=norm)
    spec = Spec(vocab=9, width=8, layers=(layer,), norm=norm, tied=True, max_positions=8)
    path = written(decoder_of(spec, 0), tmp_path / "a")
    config = json.loads((path / "config.json").read_text())
    config["spec"]["layers"][0]["mixer"]["kv_heads"] = 3
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=r"config.json, spec: layers\[0\].mixer.heads is 2, which"
    ):
        load_model(path)
    config["spec"]["layers"][0]["mixer"]["kv_heads"] = 2
    config["tie_word_embeddings"] = False
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="tie_word_embeddings=False .* a copy of the spec's tied"):
        load_model(path)
