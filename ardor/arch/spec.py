"""What a decoder is, as values. Frozen, compared by value, no torch: safe to import anywhere."""

from dataclasses import dataclass
from typing import Literal

spec = dataclass(frozen=True, kw_only=True, slots=True)

Act = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


@spec
class Norm:
    kind: Literal["rms", "layer"] = "rms"
    eps: float
    bias: bool = False


@spec
class LinearScaling:
    """Positions are divided by `factor`. Source: Chen et al. 2023, arXiv:2306.15595."""

    factor: float


@spec
class Llama3Scaling:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended.

    Source: Llama 3.1 model card; transformers' rope_type "llama3".
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@spec
class YarnScaling:
    """Source: Peng et al. 2023, arXiv:2309.00071, sections 3.2 and 3.4."""

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # round the ramp's borders to whole channels
    attention_factor: float = 1.0  # multiplies cos and sin


@spec
class Rope:
    theta: float
    rotated: int  # leading channels of each head that turn; the rest pass through
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None


@spec
class Attention:
    heads: int
    kv_heads: int
    head_width: int
    scale: float  # multiplies the scores before the softmax
    rope: Rope | None  # None: positions are learned at the embedding
    qkv_bias: bool = False
    out_bias: bool = False


@spec
class Mlp:
    width: int
    act: Act
    gated: bool = True
    bias: bool = False


@spec
class Layer:
    mixer: Attention
    ffn: Mlp
    norm: Norm  # applied to the input of the mixer and, with weights of its own, of the ffn


@spec
class Decoder:
    vocab: int  # embedding rows, which may exceed the number of tokens
    width: int
    layers: tuple[Layer, ...]  # one entry per layer: mixed stacks need no index lists
    norm: Norm  # before the head
    tied: bool  # the head's weight is the embedding's
    max_positions: int
    learned_positions: bool = False  # a trained vector per position, added to the embedding
