"""Llama 4 with images beside its language model, which alone is read. HF model_type "llama4".

Source: transformers 5.23, models/llama4.
"""

from ardor.arch.spec import Decoder
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig
from ardor.families.images import beside_images, read_text, text_keys
from ardor.families.llama4 import LLAMA4_TEXT, NAMES

MULTIMODAL_NAMES = beside_images(
    NAMES,
    "language_model.model.",
    r"(vision_model|multi_modal_projector)\..+",
    head="language_model.lm_head",
)


def _read_multimodal(hf: HFConfig) -> Decoder:
    keys = text_keys(hf, {"vocab_size": 202_048, "hidden_size": 5120})
    # The text model ties its head itself, or does not.
    keys["tie_word_embeddings"] = hf.raw.get("text_config", {}).get("tie_word_embeddings")
    return read_text(hf, keys, {"llama4_text": LLAMA4_TEXT})


LLAMA4 = Family(
    model_type="llama4",
    models="Llama 4 Scout, Maverick",
    unlike="as `llama4_text`; the image tensors are kept unread",
    read=_read_multimodal,
    name_tensors=MULTIMODAL_NAMES.rules,
)
