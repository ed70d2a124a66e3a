"""GPT-NeoX, Pythia, Dolly 2, RedPajama-INCITE. HF model_type "gpt_neox".

Source: Black et al. 2022, arXiv:2204.06745; transformers 5.23, models/gpt_neox.
"""

from ardor.arch.spec import Decoder, Layer, Norm
from ardor.families.blocks import (
    CAUSAL_MASKS,
    INVERSE_FREQUENCIES,
    attention,
    read_decoder,
    read_mlp,
    read_plain_heads,
)
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig
from ardor.families.names import Joined, Names
from ardor.families.rope import read_rope

NAMES = Names(
    prefix="gpt_neox.",
    layer="gpt_neox.layers.{}.",
    modules={
        "mixer_norm": "input_layernorm",
        ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"): Joined(
            "attention.query_key_value", order="heads"
        ),
        "mixer.o_proj": "attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn.up_proj": "mlp.dense_h_to_4h",
        "ffn.down_proj": "mlp.dense_4h_to_h",
    },
    outside={
        "embed_tokens": "gpt_neox.embed_in",
        "norm": "gpt_neox.final_layer_norm",
        "lm_head": ("embed_out", "lm_head"),  # the module's name in transformers 5
    },
    ignorable=(CAUSAL_MASKS, INVERSE_FREQUENCIES),
)


def _read(hf: HFConfig) -> Decoder:
    found = read_plain_heads(hf)
    max_positions = hf.count("max_position_embeddings", 2048)
    # The last versions before transformers 5 also wrote these under the names of other families.
    for key, copy, default in (
        ("rotary_emb_base", "rope_theta", 10_000.0),
        ("rotary_pct", "partial_rotary_factor", 0.25),
    ):
        hf.require(copy, hf.take(key, default), f"it is a copy of {key}, which decides")
    for key in ("attention_probs_dropout_prob", "hidden_dropout_prob"):
        hf.take(key, None)  # dropouts under BERT's names, as GPT-NeoX 20B was first published
    hf.take("custom_pipelines", None)  # Dolly's code around the model, which is never run
    rope = read_rope(
        hf,
        head_width=found.head_width,
        max_positions=max_positions,
        theta_key="rotary_emb_base",
        partial_key="rotary_pct",
        partial=0.25,
    )
    bias = hf.flag("attention_bias", True)
    layer = Layer(
        mixer=attention(found, rope, qkv_bias=bias, out_bias=bias),
        ffn=read_mlp(hf, act="gelu", gated=False, bias=True),
        norm=Norm(kind="layer", eps=hf.number("layer_norm_eps", 1e-5), bias=True),
        placement="parallel_two" if hf.flag("use_parallel_residual", True) else "pre",
    )
    return read_decoder(hf, found, layer, max_positions=max_positions)


GPT_NEOX = Family(
    model_type="gpt_neox",
    models="GPT-NeoX, Pythia, Dolly, RedPajama",
    unlike="parallel, partial rotation",
    read=_read,
    name_tensors=NAMES.rules,
)
