"""The language models of Qwen2-VL, Qwen2.5-VL and Qwen3-VL. HF model_types "qwen2_vl", "qwen2_5_vl"
and "qwen3_vl".

A position there has three numbers (time, height, width) that share the channels out among them.
In a text all three are equal, so that each channel turns as if there were one.

Source: Wang et al. 2024, arXiv:2409.12191, section 2.1; transformers 5.23, models/qwen2_vl,
qwen2_5_vl and qwen3_vl.
"""

from collections.abc import Mapping
from typing import Any

from ardor.arch.spec import Decoder
from ardor.families.family import HARMLESS, Family
from ardor.families.hf_config import HFConfig
from ardor.families.images import UNREAD, beside_images, read_text, text_keys
from ardor.families.llama import NAMES
from ardor.families.qwen import QWEN2, QWEN3

_DEFAULTS_2 = {
    "vocab_size": 152_064,
    "num_key_value_heads": 8,
    "max_window_layers": 80,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
_DEFAULTS_3 = {"vocab_size": 151_936, "max_position_embeddings": 128_000, "rope_theta": 5e5}
# Beside them each rope object may say how the three numbers share the channels.
_SHARES = ("mrope_section", "mrope_interleaved")


def _read_qwen2(hf: HFConfig) -> Decoder:
    texts = dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text"), QWEN2)
    return _read(hf, texts, _DEFAULTS_2)


def _read_qwen3(hf: HFConfig) -> Decoder:
    return _read(hf, {"qwen3_vl_text": QWEN3}, _DEFAULTS_3)


def _read(hf: HFConfig, texts: Mapping[str, Family], defaults: Mapping[str, Any]) -> Decoder:
    keys = text_keys(hf, defaults)
    if hf.section("text_config") is None:
        # The first files have the keys of the text model beside those of images.
        keys |= {key: hf.take(key, None) for key in hf.raw.keys() - HARMLESS.keys() - {*UNREAD}}
    elif hf.raw["text_config"].get("tie_word_embeddings"):  # where transformers 4 put it
        keys["tie_word_embeddings"] = True
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(keys.get(key), Mapping):
            keys[key] = _of_texts(keys[key])
    return read_text(hf, keys, texts)


def _of_texts(rope: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in rope.items() if key not in _SHARES}
    return {key: "default" if value == "mrope" else value for key, value in kept.items()}


QWEN2_NAMES = beside_images(
    NAMES,
    "model.language_model.",
    r"visual\..+",
    aliases=("model.",),  # as files have it
)
QWEN3_NAMES = beside_images(NAMES, "model.language_model.", r"model\.visual\..+")
QWEN2_VL = Family(
    model_type="qwen2_vl",
    models="Qwen2-VL, text",
    unlike="as `qwen2`; the image tensors are kept unread",
    read=_read_qwen2,
    name_tensors=QWEN2_NAMES.rules,
)
QWEN2_5_VL = Family(
    model_type="qwen2_5_vl",
    models="Qwen2.5-VL, text",
    unlike="as `qwen2`; the image tensors are kept unread",
    read=_read_qwen2,
    name_tensors=QWEN2_NAMES.rules,
)
QWEN3_VL = Family(
    model_type="qwen3_vl",
    models="Qwen3-VL, text",
    unlike="as `qwen3`; the image tensors are kept unread",
    read=_read_qwen3,
    name_tensors=QWEN3_NAMES.rules,
)
