"""Config files as they were released, of the families in `parity/cases_classic`."""

from typing import Any

import pytest
from transformers import AutoConfig

from ardor.errors import ConfigError

from .test_families import read

PYTHIA: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.24.0",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
NEOX_20B = {
    **PYTHIA,
    "attention_probs_dropout_prob": 0,
    "hidden_act": "gelu_fast",
    "hidden_dropout_prob": 0,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_attention_heads": 64,
    "num_hidden_layers": 44,
    "transformers_version": "4.19.0.dev0",
    "vocab_size": 50432,
}
RELEASED: dict[str, dict[str, Any]] = {
    "Pythia 1.4B": PYTHIA,
    "Pythia, saved by 4.46": {
        **PYTHIA,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "classifier_dropout": 0.1,
        "hidden_dropout": 0.0,
        "partial_rotary_factor": 0.25,
        "rope_scaling": None,
        "rope_theta": 10000,
    },
    "GPT-NeoX 20B": NEOX_20B,
    "RedPajama-INCITE 3B": {
        **PYTHIA,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rotary_pct": 1.0,
        "use_parallel_residual": False,
        "vocab_size": 50432,
    },
    "Dolly 2 12B": {
        **PYTHIA,
        "custom_pipelines": {
            "text-generation": {
                "impl": "instruct_pipeline.InstructionTextGenerationPipeline",
                "pt": "AutoModelForCausalLM",
                "tf": "TFAutoModelForCausalLM",
            }
        },
        "hidden_size": 5120,
        "intermediate_size": 20480,
        "num_attention_heads": 40,
        "num_hidden_layers": 36,
    },
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_file_says_what_transformers_reads_in_it(name):
    raw = RELEASED[name]
    theirs = AutoConfig.for_model(**raw).to_dict()
    assert read(raw) == read(theirs)


def test_gpt_neox_as_released():
    mixer, layer = read(NEOX_20B).layers[0].mixer, read(NEOX_20B).layers[0]
    assert (mixer.heads, mixer.kv_heads, mixer.head_width) == (64, 64, 96)
    assert (mixer.rope.rotated, mixer.rope.theta) == (24, 10_000.0)
    assert (mixer.qkv_bias, mixer.out_bias, layer.ffn.bias) == (True, True, True)
    assert (layer.placement, layer.ffn.act, layer.ffn.gated) == ("parallel_two", "gelu_tanh", False)
    redpajama = read(RELEASED["RedPajama-INCITE 3B"]).layers[0]
    assert (redpajama.placement, redpajama.mixer.rope.rotated) == ("pre", 80)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("Pythia 1.4B", "num_key_value_heads", 4),
        ("Pythia 1.4B", "head_dim", 64),
        ("Pythia 1.4B", "rope_theta", 5e5),
        ("Pythia 1.4B", "partial_rotary_factor", 0.5),
    ],
)
def test_what_the_family_does_not_do_is_refused(name, key, value):
    with pytest.raises(ConfigError, match=f"{key}={value} is not implemented"):
        read(RELEASED[name], **{key: value})
