"""OPT, OPT-IML and Galactica. HF model_type "opt".

Source: Zhang et al. 2022, arXiv:2205.01068; transformers 5.23, models/opt.
"""

from ardor.arch.spec import Decoder, Layer, Mlp, Norm
from ardor.families.blocks import attention, read_decoder, read_plain_heads
from ardor.families.family import ACTS, Family
from ardor.families.hf_config import HFConfig
from ardor.families.names import Names

NAMES = Names(
    prefix="model.",  # the first files lack it
    layer="model.decoder.layers.{}.",
    modules={
        "mixer_norm": "self_attn_layer_norm",
        "mixer_out_norm": "self_attn_layer_norm",  # of 350m, whose norms follow the sums
        "mixer.q_proj": "self_attn.q_proj",
        "mixer.k_proj": "self_attn.k_proj",
        "mixer.v_proj": "self_attn.v_proj",
        "mixer.o_proj": "self_attn.out_proj",
        "ffn_norm": "final_layer_norm",
        "ffn_out_norm": "final_layer_norm",
        "ffn.up_proj": "fc1",
        "ffn.down_proj": "fc2",
    },
    outside={
        "embed_tokens": "model.decoder.embed_tokens",
        "embed_in_proj": "model.decoder.project_in",
        "embed_positions": "model.decoder.embed_positions",
        "norm": "model.decoder.final_layer_norm",
        "embed_out_proj": "model.decoder.project_out",
        "lm_head": "lm_head",
    },
)


def _read(hf: HFConfig) -> Decoder:
    found = read_plain_heads(hf)
    hf.require("learned_embeddings", True, "its positions are learned")  # of Galactica, as is
    hf.require("scale_embeddings", False, "its embeddings are added as they are")
    for key in ("activation_dropout", "dropout", "layerdrop"):
        hf.take(key, None)  # acts only in training
    hf.take("init_std", None)  # acts only on weights that are not loaded
    bias, affine = hf.flag("enable_bias", True), hf.flag("layer_norm_elementwise_affine", True)
    norm = Norm(kind="layer", eps=1e-5, weight="scale" if affine else "none", bias=affine)
    before = hf.flag("do_layer_norm_before", True)
    layer = Layer(
        mixer=attention(found, None, qkv_bias=bias, out_bias=bias),
        ffn=Mlp(
            width=hf.count("ffn_dim"),
            act=hf.choice("activation_function", ACTS, "relu"),
            gated=False,
            bias=bias,
        ),
        norm=norm,
        placement="pre" if before else "after",
    )
    # Models that were fine-tuned before transformers 4.20.1 never had the norm at the end.
    removed = hf.flag("_remove_final_layer_norm", False)
    narrow = hf.count("word_embed_proj_dim", found.width)
    return read_decoder(
        hf,
        found,
        layer,
        max_positions=hf.count("max_position_embeddings", 2048),
        tied=True,
        norm=norm if before and not removed else None,
        learned_positions=True,
        position_offset=2,  # fairseq counted positions after the padding's id, which is 1
        embed_width=narrow if narrow != found.width else None,
    )


OPT = Family(
    model_type="opt",
    models="OPT, Galactica",
    unlike="positions from 2, norms after (350m), projected embedding",
    read=_read,
    name_tensors=NAMES.rules,
)
