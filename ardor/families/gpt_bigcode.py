"""SantaCoder, StarCoder and Granite Code 20B and 34B. HF model_type "gpt_bigcode".

Source: Li et al. 2023, arXiv:2305.06161; transformers 5.23, models/gpt_bigcode.
"""

from ardor.arch.spec import Decoder, Layer, Mlp, Norm
from ardor.errors import ConfigError
from ardor.families.blocks import Heads, attention
from ardor.families.family import ACTS, Family
from ardor.families.hf_config import HFConfig
from ardor.families.names import Joined, Names

NAMES = Names(
    prefix="transformer.",
    layer="transformer.h.{}.",
    modules={
        "mixer_norm": "ln_1",
        # Head by head where each has keys and values of its own, and part by part where all share.
        ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"): Joined("attn.c_attn", order="kv_heads"),
        "mixer.o_proj": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn.up_proj": "mlp.c_fc",
        "ffn.down_proj": "mlp.c_proj",
    },
    outside={
        "embed_tokens": "transformer.wte",
        "embed_positions": "transformer.wpe",
        "norm": "transformer.ln_f",
        "lm_head": "lm_head",
    },
)


def _read(hf: HFConfig) -> Decoder:
    width, heads = hf.count("n_embd"), hf.count("n_head")
    if width % heads:
        raise ConfigError(f"{hf.path}: n_embd={width} is not a multiple of n_head={heads}")
    shared = 1 if hf.flag("multi_query", True) else heads
    hf.require("num_key_value_heads", shared, "multi_query decides: one, or one for each head")
    # Our scores are float32 or more, whatever comes in.
    for key in ("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"):
        hf.take(key, None)
    # How the first code for these models kept its cache.
    for key in (
        "inference_runner",
        "max_batch_size",
        "pad_key_length",
        "pre_allocate_kv_cache",
        "validate_runner_input",
    ):
        hf.take(key, None)
    found = Heads(width, heads, shared, width // heads)
    scale = found.head_width**-0.5 if hf.flag("scale_attn_weights", True) else 1.0
    norm = Norm(kind="layer", eps=hf.number("layer_norm_epsilon", 1e-5), bias=True)
    layer = Layer(
        mixer=attention(found, None, scale=scale, qkv_bias=True, out_bias=True),
        ffn=Mlp(
            width=hf.count("n_inner", 4 * width),
            act=hf.choice("activation_function", ACTS, "gelu_pytorch_tanh"),
            gated=False,
            bias=True,
        ),
        norm=norm,
    )
    return Decoder(
        vocab=hf.count("vocab_size"),
        width=width,
        layers=(layer,) * hf.count("n_layer"),
        norm=norm,
        tied=hf.flag("tie_word_embeddings", True),
        max_positions=hf.count("n_positions", 1024),
        learned_positions=True,
    )


GPT_BIGCODE = Family(
    model_type="gpt_bigcode",
    models="StarCoder 1, SantaCoder",
    unlike="learned positions, multi-query",
    read=_read,
    name_tensors=NAMES.rules,
)
