"""Mistral 7B to Large, Ministral 1 and 3. HF model_types "mistral", "ministral", "ministral3", and
"mistral3", which is one of the first and the third with images beside it (Mistral Small 3.1).

Source: Jiang et al. 2023, arXiv:2310.06825; transformers 5.23, models/mistral, ministral,
ministral3 and mistral3.
"""

from typing import Any

from ardor.arch.spec import Decoder, Layer, Temperature
from ardor.families.blocks import (
    attention,
    layers_by_type,
    read_decoder,
    read_heads,
    read_mlp,
    rms,
    write_layer_types,
    write_llama,
)
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig
from ardor.families.images import beside_images, read_text, text_keys
from ardor.families.llama import NAMES
from ardor.families.rope import read_rope

# What transformers takes for the rope_parameters of a "ministral3" that has none.
MINISTRAL3_ROPE = {
    "type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def _read(hf: HFConfig) -> Decoder:
    found = read_heads(hf, kv_heads=8)
    max_positions = hf.count("max_position_embeddings", 4096 * 32)
    window = hf.optional_count("sliding_window", 4096)
    rope = read_rope(hf, head_width=found.head_width, max_positions=max_positions)
    layer = Layer(mixer=attention(found, rope), ffn=read_mlp(hf), norm=rms(hf))
    # The classes of "mistral" in transformers warn of layer_types and slide on all layers all the
    # same. A file that has them is of a model trained so, as those of "ministral" are.
    layers = layers_by_type(hf, layer, window, lambda i: window is not None)
    return read_decoder(hf, found, layers, max_positions=max_positions)


def _read_ministral3(hf: HFConfig) -> Decoder:
    found = read_heads(hf, kv_heads=8, head_width=128)
    max_positions = hf.count("max_position_embeddings", 262144)
    rope = read_rope(
        hf,
        head_width=found.head_width,
        max_positions=max_positions,
        # The second repeats the key outside, and decides nothing.
        own=("llama_4_scaling_beta", "max_position_embeddings"),
        default=MINISTRAL3_ROPE,
    )
    mixer = attention(
        found,
        rope,
        window=hf.optional_count("sliding_window"),
        temperature=_temperature(hf, max_positions),
    )
    layer = Layer(mixer=mixer, ffn=read_mlp(hf), norm=rms(hf, 1e-5))
    return read_decoder(hf, found, layer, max_positions=max_positions)


def _temperature(hf: HFConfig, max_positions: int) -> Temperature | None:
    default = HFConfig(MINISTRAL3_ROPE, path=hf.path)
    rope = hf.section("rope_scaling") or hf.section("rope_parameters") or default
    slope = rope.number("llama_4_scaling_beta", 0.0)
    inside = rope.count("original_max_position_embeddings", max_positions)
    span = hf.count("original_max_position_embeddings", inside)
    return Temperature(slope=slope, span=span) if slope else None


def _write(spec: Decoder) -> dict[str, Any]:
    written = write_llama(spec, "mistral") | write_layer_types(spec)
    if len({*written["layer_types"]}) == 1:
        del written["layer_types"]  # which transformers does not expect
    return {"architectures": ["MistralForCausalLM"], **written}


MISTRAL = Family(
    model_type="mistral",
    models="Mistral, Mistral Nemo",
    unlike="windows",
    read=_read,
    name_tensors=NAMES.rules,
    write=_write,
)
MINISTRAL3 = Family(
    model_type="ministral3",
    models="Ministral 3",
    unlike="queries that grow with position",
    read=_read_ministral3,
    name_tensors=NAMES.rules,
)
MINISTRAL = Family(
    model_type="ministral",
    models="Ministral 8B",
    unlike="windows on some layers",
    read=_read,
    name_tensors=NAMES.rules,
)

_TEXT_DEFAULTS = {
    "vocab_size": 131_072,
    "hidden_size": 5120,
    "intermediate_size": 32_768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
}


def _read_multimodal(hf: HFConfig) -> Decoder:
    texts = {"mistral": MISTRAL, "ministral3": MINISTRAL3}
    return read_text(hf, text_keys(hf, _TEXT_DEFAULTS), texts)


MULTIMODAL_NAMES = beside_images(
    NAMES,
    "model.language_model.",
    r"(model\.)?(vision_tower|multi_modal_projector)\..+",
    head=("lm_head", "language_model.lm_head"),
    aliases=("language_model.model.",),  # as files have it
)
MISTRAL3 = Family(
    model_type="mistral3",
    models="Mistral Small 3.1, Ministral 3 with images",
    unlike="as `mistral` or `ministral3`; the image tensors are kept unread",
    read=_read_multimodal,
    name_tensors=MULTIMODAL_NAMES.rules,
)
