"""What training a decoder computes: floating-point operations of a step, and of the device.

Axes: D model width, T positions of a document, R adapter rank.
"""

import math
from collections.abc import Iterable

from ardor.arch import spec as specs
from ardor.memory.shapes import parameters

# Of the dense matrix product, by a part of the device's name: TFLOP/s in bfloat16 and float32
# (TF32 where it is not asked for does not count). NVIDIA's data sheets, without sparsity.
PEAKS = {
    "H200": (989.0, 67.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "A10": (125.0, 31.2),
    "T4": (65.0, 8.1),
    "4090": (165.2, 82.6),
    "3090": (71.0, 35.6),
}


def listed_peak(device: str, compute: str) -> float | None:
    """FLOP/s of a device by its name, in a dtype; None if it is not in the table."""
    for part, (narrow, wide) in PEAKS.items():
        if part in device:
            return 1e12 * (wide if compute == "float32" else narrow)
    return None


def step_flops(
    spec: specs.Decoder, lengths: Iterable[int], *, full: bool, adapters: int = 0
) -> int:
    """Operations of the forward and backward pass over documents of these lengths.

    Two for each weight and token forwards, two backwards for what is passed on, and two for the
    weight's gradient, where weights are trained: 6 N in full training, 4 N where they are frozen,
    and 6 for each of the numbers in `adapters`. Looked-up rows cost nothing; of experts only those
    that a token is given to count. What checkpointing computes again is no part of it.

    Source: Kaplan et al. 2020, arXiv:2001.08361, table 1; Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B.
    """
    lengths = list(lengths)
    tokens = sum(lengths)
    weights = (6 if full else 4) * _multiplied(spec) + 6 * adapters
    attention = sum(_attention(layer.mixer, lengths) for layer in spec.layers)
    return weights * tokens + 3 * attention


def _multiplied(spec: specs.Decoder) -> int:
    """Weights that each token is multiplied with."""
    looked_up = {"embed_tokens.weight", "embed_positions.weight", "token_inputs.embed.weight"}
    total = 0
    for name, shape in parameters(spec).items():
        if len(shape) < 2 or name in looked_up or ".sinks" in name:
            continue
        share = 1.0
        if ".experts." in name:
            ffn = spec.layers[int(name.split(".")[1])].ffn
            assert isinstance(ffn, specs.Experts)
            share = ffn.router.per_token / ffn.count
        total += round(share * math.prod(shape))
    if spec.tied:
        total += spec.vocab * (spec.embed_width or spec.width)
    return total


def _attention(mixer: specs.Attention | specs.LatentAttention, lengths: list[int]) -> int:
    """Of scores and of the mixing of values, forwards."""
    if isinstance(mixer, specs.LatentAttention):
        both = mixer.plain_width + mixer.rope.rotated + mixer.value_width
        return 2 * mixer.heads * both * sum(_pairs(T, None) for T in lengths)
    reach = mixer.window
    if mixer.chunk is not None:
        lengths = [
            size
            for T in lengths
            for size in (mixer.chunk,) * (T // mixer.chunk) + (T % mixer.chunk,)
        ]
    return 4 * mixer.heads * mixer.head_width * sum(_pairs(T, reach) for T in lengths)


def _pairs(T: int, window: int | None) -> int:
    """Pairs of a position and one that it reads."""
    if window is None or window >= T:
        return T * (T + 1) // 2
    return window * (window + 1) // 2 + (T - window) * window
