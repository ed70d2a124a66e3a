"""Falcon 7B, 40B, 180B, 2 and RW. HF model_type "falcon"; before: "RefinedWeb", "RefinedWebModel".

The ALiBi of RW is computed in bfloat16 wherever these models were trained and published, so far
positions share their bias; transformers' eager attention adds it twice, its sdpa once.

Source: Almazrouei et al. 2023, arXiv:2311.16867; transformers 5.23, models/falcon.
"""

from ardor.arch.spec import Decoder, Layer, Mlp, Norm
from ardor.errors import ConfigError
from ardor.families.alibi import alibi_slopes
from ardor.families.blocks import Heads, attention, read_decoder
from ardor.families.family import ACTS, Family
from ardor.families.hf_config import HFConfig
from ardor.families.names import Joined, Names, Table
from ardor.families.rope import read_rope
from ardor.families.rules import Rules

_LAYER: Table = {
    # One kv head: block after block. As many as heads: head by head. The 40B's groups are between.
    ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"): Joined(
        "self_attention.query_key_value", order="kv_heads"
    ),
    "mixer.o_proj": "self_attention.dense",
    "ffn.up_proj": "mlp.dense_h_to_4h",
    "ffn.down_proj": "mlp.dense_4h_to_h",
}


def _names(norms: Table) -> Names:
    return Names(
        prefix="transformer.",
        layer="transformer.h.{}.",
        modules={**norms, **_LAYER},
        outside={
            "embed_tokens": "transformer.word_embeddings",
            "norm": "transformer.ln_f",
            "lm_head": "lm_head",
        },
    )


NAMES = _names({"mixer_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"})
NAMES_OF_TWO = _names({"mixer_norm": "ln_attn", "ffn_norm": "ln_mlp"})


def _rules(spec: Decoder) -> Rules:
    two = spec.layers[0].placement == "parallel_two"
    return (NAMES_OF_TWO if two else NAMES).rules(spec)


def _read_heads(hf: HFConfig, grouped: bool, alone: bool) -> Heads:
    """`grouped`: the 40B's form, of `num_kv_heads`; else one kv head, or as many as heads."""
    width, heads = hf.count("hidden_size"), hf.count("num_attention_heads")
    if width % heads:
        raise ConfigError(
            f"{hf.path}: hidden_size={width} is not a multiple of num_attention_heads={heads}"
        )
    shared = hf.count("num_kv_heads", heads)
    if grouped and heads % shared:
        raise ConfigError(
            f"{hf.path}: num_attention_heads={heads} is not a multiple of num_kv_heads={shared}"
        )
    if not grouped and not alone:
        hf.require("num_kv_heads", heads, "without multi_query every head has keys of its own")
    # With multi_query the 7B says 71 here, and has one.
    return Heads(width, heads, shared if grouped or not alone else 1, width // heads)


def _read(hf: HFConfig) -> Decoder:
    hf.alias(
        hidden_size="n_embed",
        num_hidden_layers="n_layer",
        num_attention_heads="n_head",
        num_kv_heads="n_head_kv",
    )
    old = hf.take("model_type", "falcon") != "falcon"  # then what is not there is off
    grouped = hf.flag("new_decoder_architecture", old and "n_head_kv" in hf.raw)
    alone, parallel = hf.flag("multi_query", not old), hf.flag("parallel_attn", not old)
    found = _read_heads(hf, grouped, alone)
    norms = hf.count("num_ln_in_parallel_attn", 2 if grouped else 1)
    if norms > (2 if grouped else 1) or (grouped and not parallel):
        raise ConfigError(
            f"{hf.path}: num_ln_in_parallel_attn={norms} with new_decoder_architecture={grouped} "
            f"and parallel_attn={parallel} is not implemented; transformers cannot run it either"
        )
    hf.require("apply_residual_connection_post_layernorm", False, "residuals are not normed")
    max_positions = hf.count("max_position_embeddings", 2048)
    rope = read_rope(hf, head_width=found.head_width, max_positions=max_positions)
    alibi, bias = hf.flag("alibi", False), hf.flag("bias", False)
    layer = Layer(
        mixer=attention(
            found,
            None if alibi else rope,
            alibi=alibi_slopes(found.heads) if alibi else None,
            alibi_coarse=alibi,
            qkv_bias=bias,
            out_bias=bias,
        ),
        ffn=Mlp(
            width=hf.count("ffn_hidden_size", hf.count("ff_factor", 4) * found.width),
            act=hf.choice("activation", ACTS, "gelu"),
            gated=False,
            bias=bias,
        ),
        norm=Norm(kind="layer", eps=hf.number("layer_norm_epsilon", 1e-5), bias=True),
        placement="pre" if not parallel else "parallel_two" if norms == 2 else "parallel",
    )
    return read_decoder(hf, found, layer, max_positions=max_positions, tied=True)


FALCON = Family(
    model_type="falcon",
    models="Falcon 7B, 40B, 180B, RW",
    unlike="multi-query or grouped, parallel, ALiBi in bfloat16 (RW)",
    read=_read,
    name_tensors=_rules,
    code=("configuration_falcon", "modeling_falcon", "configuration_RW", "modelling_RW"),
)
