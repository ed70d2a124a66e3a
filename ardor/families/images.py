"""The text models within models that also read images: which part of a config.json, which names.

No images come in here; the tensors that turn them into embeddings are kept as they are.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ardor.arch.spec import Decoder
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig
from ardor.families.names import Names
from ardor.families.rules import Ignorable

# How images, films and sounds come in, and the tokens that stand for them.
UNREAD = [
    "vision_config",
    "audio_config",
    "mm_tokens_per_image",
    "boi_token_index",
    "eoi_token_index",
    "image_token_index",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
    "projector_hidden_act",
    "vision_feature_layer",
    "multimodal_projector_bias",
    "spatial_merge_size",
    "boi_token_id",
    "eoi_token_id",
    "boa_token_id",
    "eoa_token_id",
    "eoa_token_index",
    "audio_token_id",
    "vision_soft_tokens_per_image",
]


def text_keys(hf: HFConfig, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the text model, all but those of images read; `defaults` where it is silent.

    What the file says outside of `text_config` about a tied head decides.
    """
    for key in UNREAD:
        hf.take(key, None)
    held, tied = hf.section("text_config"), hf.take("tie_word_embeddings", None)
    for section in (hf, held):  # one of them decides, and neither may be nonsense
        if section is not None and section.raw.get("tie_word_embeddings") is not None:
            section.flag("tie_word_embeddings")
    found = {**defaults, **({} if held is None else held.raw)}
    return found if tied is None else {**found, "tie_word_embeddings": tied}


def read_text(hf: HFConfig, keys: Mapping[str, Any], texts: Mapping[str, Family]) -> Decoder:
    """The decoder that `keys` describe, of one of the families `texts` by its model_type.

    The first of them is that of a file that names none.

    Raises: ConfigError for another model_type, and as the family does.
    """
    text = HFConfig(keys, path=f"{hf.path}, text_config")
    return text.choice("model_type", texts, next(iter(texts))).spec(text)


def beside_images(
    names: Names,
    prefix: str,
    images: str,
    *,
    head: str | tuple[str, ...] = "lm_head",
    aliases: tuple[str, ...] = (),
) -> Names:
    """The names of a text model whose modules are under `prefix`, and its head at `head`.

    `images` is a pattern of the names that belong to images; `aliases` as in `Names`.
    """
    moved = {
        key: prefix + place.removeprefix(names.prefix)
        for key, place in names.outside.items()
        if isinstance(place, str)
    }
    kept = Ignorable(pattern=images, reason="turns images into embeddings", kept=True)
    return replace(
        names,
        prefix=prefix,
        aliases=aliases,
        layer=prefix + names.layer.removeprefix(names.prefix),
        outside={**moved, "lm_head": head},
        ignorable=(*names.ignorable, kept),
    )
