"""Gemma 4, its text models. HF model_type "gemma4_text", and within "gemma4", which reads images.

Source: transformers 5.23, models/gemma4.
"""

from dataclasses import replace
from functools import partial

from ardor.arch.spec import Attention, Decoder
from ardor.families.blocks import LLAMA_ATTENTION, LLAMA_MLP, LLAMA_OUTSIDE
from ardor.families.family import Family
from ardor.families.gemma4_config import read_gemma4
from ardor.families.hf_config import HFConfig
from ardor.families.images import beside_images, read_text, text_keys
from ardor.families.names import AllExperts, Bare, Names
from ardor.families.rules import Ignorable, Rules

NAMES = Names(
    prefix="model.",
    layer="model.layers.{}.",
    modules={
        "mixer_norm": "input_layernorm",
        **LLAMA_ATTENTION,
        "mixer_out_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        **LLAMA_MLP,
        "ffn.router": "router.proj",
        "ffn.router.norm": Bare("router.scale"),
        "ffn.router.expert_scale": "router.per_expert_scale",
        "ffn.in_norm": "pre_feedforward_layernorm_2",
        ("ffn.experts.gate_proj", "ffn.experts.up_proj"): AllExperts("experts.gate_up_proj"),
        "ffn.experts.down_proj": AllExperts("experts.down_proj"),
        "ffn.out_norm": "post_feedforward_layernorm_2",
        "ffn.shared_in_norm": "pre_feedforward_layernorm",
        "ffn.shared.gate_proj": "mlp.gate_proj",
        "ffn.shared.up_proj": "mlp.up_proj",
        "ffn.shared.down_proj": "mlp.down_proj",
        "ffn.shared_out_norm": "post_feedforward_layernorm_1",
        "ffn_out_norm": "post_feedforward_layernorm",
        "token_gate.gate_proj": "per_layer_input_gate",
        "token_gate.out_proj": "per_layer_projection",
        "token_gate.out_norm": "post_per_layer_input_norm",
        "scalar": "layer_scalar",
    },
    outside={
        **LLAMA_OUTSIDE,
        "token_inputs.embed": "model.embed_tokens_per_layer",
        "token_inputs.context_proj": "model.per_layer_model_projection",
        "token_inputs.context_norm": "model.per_layer_projection_norm",
    },
)


def _with_unused(names: Names, spec: Decoder) -> Rules:
    """Files may hold maps of layers that read the keys and values of others."""
    mixers = [layer.mixer for layer in spec.layers]
    readers = [
        i for i, m in enumerate(mixers) if isinstance(m, Attention) and m.kv_layer is not None
    ]
    unused = Ignorable(
        pattern=rf"layers\.({'|'.join(map(str, readers))})\.self_attn\.[kv]_(proj|norm)\..+",
        reason="its layer reads the keys and values of another",
        kept=True,
    )
    return replace(names, ignorable=(*names.ignorable, unused)).rules(spec)


def _read_multimodal(hf: HFConfig) -> Decoder:
    return read_text(hf, text_keys(hf, {}), {"gemma4_text": GEMMA4_TEXT})


MULTIMODAL_NAMES = beside_images(
    NAMES,
    "model.language_model.",
    r"model\.(vision_tower|embed_vision|audio_tower|embed_audio)\..+",
)
GEMMA4_TEXT = Family(
    model_type="gemma4_text",
    models="Gemma 4 E2B, E4B, 31B, 26B-A4B, text",
    unlike="a vector per layer, shared keys and values, keys as values, experts beside",
    read=read_gemma4,
    name_tensors=partial(_with_unused, NAMES),
    uneven=True,
)
GEMMA4 = Family(
    model_type="gemma4",
    models="Gemma 4 with images and sound",
    unlike="as `gemma4_text`; other tensors are kept unread",
    read=_read_multimodal,
    name_tensors=partial(_with_unused, MULTIMODAL_NAMES),
)
