"""MPT 7B and 30B. HF model_type "mpt".

Transformers ignores `alibi_bias_max`, so it reads MPT-7B-StoryWriter (16) with the slopes of the
others (8); here the key counts, as it did in training. What it ignores and no released model uses
is refused.

Source: MosaicML 2023, "Introducing MPT-7B" and llm-foundry; transformers 5.23, models/mpt.
"""

from ardor.arch.spec import Attention, Decoder, Layer, Mlp, Norm
from ardor.families.alibi import mpt_slopes
from ardor.families.blocks import Heads, attention, read_decoder, read_heads
from ardor.families.family import HARMLESS, Family, refuse_foreign
from ardor.families.hf_config import HFConfig
from ardor.families.names import Joined, Names

NAMES = Names(
    prefix="transformer.",
    layer="transformer.blocks.{}.",
    modules={
        "mixer_norm": "norm_1",
        ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"): Joined("attn.Wqkv"),
        "mixer.o_proj": "attn.out_proj",
        "ffn_norm": "norm_2",
        "ffn.up_proj": "ffn.up_proj",
        "ffn.down_proj": "ffn.down_proj",
    },
    outside={
        "embed_tokens": "transformer.wte",
        "norm": "transformer.norm_f",
        "lm_head": "lm_head",
    },
)
_HARMLESS = {
    **HARMLESS,
    "attn_impl": "says what computes attention: the result is the same",
    "attn_uses_sequence_id": "a position never reads another document here",
}


def _read(hf: HFConfig) -> Decoder:
    hf.alias(
        hidden_size="d_model",
        num_hidden_layers="n_layers",
        num_attention_heads="n_heads",
    )
    found = read_heads(hf)
    hf.require("no_bias", True, "neither linear maps nor norms have biases")
    hf.require("logit_scale", None, "logits are not scaled")
    hf.require("embedding_fraction", 1.0, "the embedding's gradient is not scaled")
    hf.choice("norm_type", {"low_precision_layernorm": "", "layernorm": ""}, "layernorm")
    hf.take("learned_pos_emb", None)  # without effect beside ALiBi, which is required
    hf.take("emb_pdrop", None)  # acts only in training
    for key in ("init_config", "init_device", "verbose", "tokenizer_name"):
        hf.take(key, None)  # how training began, and on which tokens
    layer = Layer(
        mixer=_read_attention(hf, found),
        ffn=Mlp(width=hf.count("expansion_ratio", 4) * found.width, act="gelu", gated=False),
        norm=Norm(kind="layer", eps=hf.number("layer_norm_epsilon", 1e-5)),
    )
    max_positions = hf.count("max_seq_len", 2048)
    return read_decoder(hf, found, layer, max_positions=max_positions, tied=True)


def _read_attention(hf: HFConfig, found: Heads) -> Attention:
    inner = hf.section("attn_config") or HFConfig({}, path=hf.path)
    refuse_foreign(inner)
    inner.require("attn_type", "multihead_attention", "each head has keys and values of its own")
    inner.require("alibi", True, "its positions are not learned")
    inner.require("prefix_lm", False, "a position never reads what follows it")
    inner.require("qk_ln", False, "queries and keys are not normalised")
    mixer = attention(
        found,
        None,
        scale=inner.number("softmax_scale", found.head_width**-0.5),
        # A zero means no bound, too.
        clip=inner.optional_number("clip_qkv") or None,
        alibi=mpt_slopes(found.heads, inner.number("alibi_bias_max", 8)),
    )
    inner.finish(_HARMLESS)
    return mixer


MPT = Family(
    model_type="mpt",
    models="MPT",
    unlike="ALiBi, `clip_qkv`",
    read=_read,
    name_tensors=NAMES.rules,
    code=("configuration_mpt", "modeling_mpt"),
)
