"""Mistral 7B to Large, and Ministral. HF model_types "mistral" and "ministral".

Source: Jiang et al. 2023, arXiv:2310.06825; transformers 5.23, models/mistral and ministral.
"""

from typing import Any

from ardor.arch.spec import Decoder, Layer
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
from ardor.families.llama import NAMES
from ardor.families.rope import read_rope


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


def _write(spec: Decoder) -> dict[str, Any]:
    written = write_llama(spec, "mistral") | write_layer_types(spec)
    if len({*written["layer_types"]}) == 1:
        del written["layer_types"]  # which transformers does not expect
    return {"architectures": ["MistralForCausalLM"], **written}


MISTRAL = Family(model_type="mistral", read=_read, name_tensors=NAMES.rules, write=_write)
MINISTRAL = Family(model_type="ministral", read=_read, name_tensors=NAMES.rules)
