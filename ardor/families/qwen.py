"""Qwen 1.5 to 3, the dense ones. HF model_types "qwen2" and "qwen3".

Source: arXiv:2407.10671 and arXiv:2505.09388; transformers 5.23, models/qwen2 and qwen3.
"""

from typing import Any

from ardor.arch.spec import Attention, Decoder, Layer, QKNorm
from ardor.families.blocks import (
    Heads,
    attention,
    layers_by_type,
    read_decoder,
    read_heads,
    read_mlp,
    rms,
    uniform,
    write_layer_types,
    write_llama,
)
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig
from ardor.families.llama import NAMES
from ardor.families.rope import read_rope


def _read_qwen2(hf: HFConfig) -> Decoder:
    found = read_heads(hf, kv_heads=32)
    hf.require("use_mrope", False, "positions have one axis")
    # Older names that CodeQwen repeats.
    hf.require("rotary_emb_base", hf.take("rope_theta", None), "rope_theta says otherwise")
    hf.take("seq_length", None)
    # How vLLM may extrapolate beyond the trained length; neither training nor transformers does.
    hf.take("dual_chunk_attention_config", None)
    return _decoder(hf, found, qkv_bias=True)


def _read_qwen3(hf: HFConfig) -> Decoder:
    found = read_heads(hf, kv_heads=32, head_width=128)
    bias = hf.flag("attention_bias", False)
    return _decoder(hf, found, qkv_bias=bias, out_bias=bias, qk_norm=QKNorm(norm=rms(hf)))


def _decoder(hf: HFConfig, found: Heads, **mixer: Any) -> Decoder:
    max_positions = hf.count("max_position_embeddings", 32768)
    rope = read_rope(hf, head_width=found.head_width, max_positions=max_positions)
    layer = Layer(mixer=attention(found, rope, **mixer), ffn=read_mlp(hf), norm=rms(hf))
    window, first = hf.optional_count("sliding_window", 4096), hf.number("max_window_layers", 28)
    window = window if hf.flag("use_sliding_window", False) else None
    layers = layers_by_type(hf, layer, window, lambda i: window is not None and i >= first)
    return read_decoder(hf, found, layers, max_positions=max_positions)


def _write(spec: Decoder, family: str) -> dict[str, Any]:
    types = write_layer_types(spec)
    kinds = types["layer_types"]
    return {
        **write_llama(spec, family),
        **types,
        # How many come before those that slide: what transformers 4 reads.
        "max_window_layers": (*kinds, "sliding_attention").index("sliding_attention"),
        "use_sliding_window": types["sliding_window"] is not None,
    }


def _write_qwen2(spec: Decoder) -> dict[str, Any]:
    return {"architectures": ["Qwen2ForCausalLM"], **_write(spec, "qwen2")}


def _write_qwen3(spec: Decoder) -> dict[str, Any]:
    mixer: Attention = uniform(spec, "qwen3").mixer
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": mixer.qkv_bias,
        **_write(spec, "qwen3"),
    }


QWEN2 = Family(
    model_type="qwen2",
    models="Qwen 2, 2.5, R1-Distill-Qwen",
    unlike="biases, windows on the last layers",
    read=_read_qwen2,
    name_tensors=NAMES.rules,
    write=_write_qwen2,
)
QWEN3 = Family(
    model_type="qwen3",
    models="Qwen 3",
    unlike="normed queries and keys",
    read=_read_qwen3,
    name_tensors=NAMES.rules,
    write=_write_qwen3,
)
