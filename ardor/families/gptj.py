"""GPT-J 6B and its fine-tunes. HF model_type "gptj".

Source: Wang and Komatsuzaki 2021, github.com/kingoflolz/mesh-transformer-jax; transformers 5.23,
models/gptj.
"""

from ardor.arch.spec import Decoder, Layer, Mlp, Norm, Rope
from ardor.errors import ConfigError
from ardor.families.blocks import CAUSAL_MASKS, attention, read_plain_heads
from ardor.families.family import ACTS, Family
from ardor.families.hf_config import HFConfig
from ardor.families.names import Names

NAMES = Names(
    prefix="transformer.",
    layer="transformer.h.{}.",
    modules={
        "mixer_norm": "ln_1",
        "mixer.q_proj": "attn.q_proj",
        "mixer.k_proj": "attn.k_proj",
        "mixer.v_proj": "attn.v_proj",
        "mixer.o_proj": "attn.out_proj",
        "ffn.up_proj": "mlp.fc_in",
        "ffn.down_proj": "mlp.fc_out",
    },
    outside={
        "embed_tokens": "transformer.wte",
        "norm": "transformer.ln_f",
        "lm_head": "lm_head",
    },
    ignorable=(CAUSAL_MASKS,),
)


def _read(hf: HFConfig) -> Decoder:
    found = read_plain_heads(hf, width_key="n_embd", heads_key="n_head")
    hf.require("rotary", True, "its positions are rotary")
    hf.require("scale_attn_weights", True, "scores are divided by the root of the head width")
    hf.require("tie_word_embeddings", False, "its head has a bias, which the embedding lacks")
    rotated = hf.count("rotary_dim", 64)
    if rotated % 2 or rotated > found.head_width:
        raise ConfigError(
            f"{hf.path}: rotary_dim={rotated} of heads of width {found.head_width} cannot be "
            "turned in pairs"
        )
    norm = Norm(kind="layer", eps=hf.number("layer_norm_epsilon", 1e-5), bias=True)
    layer = Layer(
        mixer=attention(found, Rope(theta=10_000.0, rotated=rotated, pairing="neighbours")),
        ffn=Mlp(
            width=hf.count("n_inner", 4 * found.width),
            act=hf.choice("activation_function", ACTS, "gelu_new"),
            gated=False,
            bias=True,
        ),
        norm=norm,
        placement="parallel",
    )
    return Decoder(
        vocab=hf.count("vocab_size"),
        width=found.width,
        layers=(layer,) * hf.count("n_layer"),
        norm=norm,
        tied=False,
        max_positions=hf.count("n_positions", 2048),
        head_bias=True,
    )


GPTJ = Family(
    model_type="gptj",
    models="GPT-J",
    unlike="parallel, neighbouring pairs, biased head",
    read=_read,
    name_tensors=NAMES.rules,
)
