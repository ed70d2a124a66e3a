"""BLOOM and BLOOMZ. HF model_type "bloom".

Source: BigScience 2022, arXiv:2211.05100; transformers 5.23, models/bloom.
"""

from ardor.arch.spec import Decoder, Layer, Mlp, Norm
from ardor.families.alibi import alibi_slopes
from ardor.families.blocks import attention, read_decoder, read_heads
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig
from ardor.families.names import Joined, Names

NAMES = Names(
    prefix="transformer.",
    layer="transformer.h.{}.",
    modules={
        "mixer_norm": "input_layernorm",
        ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"): Joined(
            "self_attention.query_key_value", order="heads"
        ),
        "mixer.o_proj": "self_attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn.up_proj": "mlp.dense_h_to_4h",
        "ffn.down_proj": "mlp.dense_4h_to_h",
    },
    outside={
        "embed_tokens": "transformer.word_embeddings",
        "embed_norm": "transformer.word_embeddings_layernorm",
        "norm": "transformer.ln_f",
        "lm_head": "lm_head",
    },
)


def _read(hf: HFConfig) -> Decoder:
    hf.alias(hidden_size="n_embed", num_hidden_layers="n_layer", num_attention_heads="n_head")
    found = read_heads(hf)
    hf.require("num_key_value_heads", found.heads, "its projections are fused head by head")
    hf.require("head_dim", found.width // found.heads, "its heads share the model's width")
    hf.require("n_inner", 4 * found.width, "its feed-forward is four times as wide")
    # How Megatron was run, and how its sums are split: the model is the same.
    for key in (
        "pretraining_tp",
        "slow_but_exact",
        "attention_softmax_in_fp32",
        "masked_softmax_fusion",
        "bias_dropout_fusion",
        "skip_bias_add",
        "skip_bias_add_qkv",
        "offset_alibi",
    ):
        hf.take(key, None)
    norm = Norm(kind="layer", eps=hf.number("layer_norm_epsilon", 1e-5), bias=True)
    layer = Layer(
        mixer=attention(found, None, alibi=alibi_slopes(found.heads), qkv_bias=True, out_bias=True),
        ffn=Mlp(width=4 * found.width, act="gelu_tanh", gated=False, bias=True),
        norm=norm,
        residual_normed=hf.flag("apply_residual_connection_post_layernorm", False),
    )
    return read_decoder(
        hf,
        found,
        layer,
        # Nothing in it ends here, but it has seen no longer text.
        max_positions=hf.count("seq_length", 2048),
        tied=True,
        embed_norm=norm,
    )


BLOOM = Family(
    model_type="bloom",
    models="BLOOM, BLOOMZ",
    unlike="ALiBi, normed embedding",
    read=_read,
    name_tensors=NAMES.rules,
)
