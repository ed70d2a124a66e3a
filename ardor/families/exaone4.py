"""EXAONE 4. HF model_type "exaone4".

Source: LG AI Research 2025, arXiv:2507.11407; transformers 5.23, models/exaone4.
"""

from ardor.arch.spec import Decoder, Layer, QKNorm
from ardor.families.blocks import (
    attention,
    read_decoder,
    read_heads,
    read_layer_types,
    read_mlp,
    read_windows,
    rms,
    with_attention,
)
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig
from ardor.families.olmo import POST_NORM_NAMES
from ardor.families.rope import read_rope


def _read_kinds(hf: HFConfig) -> tuple[str, ...]:
    """`layer_types`, which published files have beside a pattern such as "LLLG"."""
    if hf.take("layer_types", None) is not None:
        hf.take("sliding_window_pattern", None)
        return read_layer_types(hf, lambda i: False)
    pattern = hf.count("sliding_window_pattern", 4)
    return read_layer_types(hf, lambda i: (i + 1) % pattern != 0)


def _read(hf: HFConfig) -> Decoder:
    found = read_heads(hf, kv_heads=32)
    max_positions = hf.count("max_position_embeddings", 2048)
    rope = read_rope(hf, head_width=found.head_width, max_positions=max_positions)
    norm = rms(hf, 1e-5)
    layer = Layer(
        mixer=attention(found, rope, qk_norm=QKNorm(norm=norm)),
        ffn=read_mlp(hf),
        norm=norm,
        placement="post",
    )
    windows = read_windows(hf, _read_kinds(hf), hf.optional_count("sliding_window", 4096))
    # Beside windows, what reads everything does not turn, even if all layers do.
    turns_all = "sliding_window" in hf.raw and hf.raw["sliding_window"] is None
    return read_decoder(
        hf,
        found,
        tuple(
            with_attention(layer, window=window, rope=rope if window or turns_all else None)
            for window in windows
        ),
        max_positions=max_positions,
    )


EXAONE4 = Family(
    model_type="exaone4",
    models="EXAONE 4",
    unlike="norms after, no rotation on full layers",
    read=_read,
    name_tensors=POST_NORM_NAMES.rules,
)
