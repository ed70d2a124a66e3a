"""What a decoder is, as values. Frozen, compared by value, no torch: safe to import anywhere."""

from dataclasses import dataclass
from typing import Literal

spec = dataclass(frozen=True, kw_only=True, slots=True)

Act = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"]


@spec
class Norm:
    kind: Literal["rms", "layer"] = "rms"
    eps: float
    weight: Literal["scale", "one_plus", "none"] = "scale"  # one_plus: the file holds w - 1
    bias: bool = False
    late_cast: bool = False  # RMS: times the weight in float32, then rounded; else the reverse


@spec
class QKNorm:
    """Queries and keys are normalised before their product."""

    norm: Norm
    # head: one weight for all heads; heads: a weight for each; width: statistics over all of them
    over: Literal["head", "heads", "width"] = "head"
    after_rope: bool = False


@spec
class LinearScaling:
    """Positions are divided by `factor`. Source: Chen et al. 2023, arXiv:2306.15595."""

    factor: float


@spec
class DynamicScaling:
    """Theta grows with the text once that is longer than `original_positions`.

    Source: NTK-aware interpolation; transformers' rope_type "dynamic".
    """

    factor: float
    original_positions: int


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
class LongScaling:
    """Each channel pair has a divisor of its own: `short` up to `original_positions`, then `long`.

    Source: Ding et al. 2024, LongRoPE, arXiv:2402.13753; transformers' rope_type "longrope".
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_positions: int
    short_amplitude: float = 1.0  # multiplies cos and sin
    long_amplitude: float = 1.0


@spec
class ProportionalScaling:
    """The first `turning` pairs turn as if all did, `factor` times slower; the rest stand still.

    Source: transformers' rope_type "proportional" (Gemma 4).
    """

    turning: int
    factor: float = 1.0


Scaling = (
    LinearScaling
    | DynamicScaling
    | Llama3Scaling
    | YarnScaling
    | LongScaling
    | ProportionalScaling
    | None
)


@spec
class Rope:
    theta: float
    rotated: int  # leading channels of each head that turn; the rest pass through
    # halves: channel i turns with i + rotated / 2; neighbours: 2i with 2i + 1
    pairing: Literal["halves", "neighbours"] = "halves"
    scaling: Scaling = None

    def regime(self, length: int) -> int:
        """Texts of equal regime turn alike; in others all positions turn otherwise, past ones too.

        Only scalings that depend on how long a text is have more than one.
        """
        match self.scaling:
            case DynamicScaling(original_positions=original):
                return max(length, original)
            case LongScaling(original_positions=original):
                return int(length > original)
        return 0


@spec
class Temperature:
    """Queries grow with their position: times 1 + slope * ln(1 + floor(number / span)).

    Source: Nakanishi 2025, Scalable-Softmax, arXiv:2501.19399; in steps, Llama 4's model code.
    """

    slope: float
    span: int
    first: int = 0  # the number of the first position


@spec
class Attention:
    heads: int
    kv_heads: int
    head_width: int
    scale: float  # multiplies the scores before the softmax
    rope: Rope | None  # None: this layer does not rotate
    window: int | None = None  # a position reads the last `window` positions, itself included
    chunk: int | None = None  # a position reads only its own chunk of so many positions
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    sinks: bool = False  # a trained score per head that takes weight and gives nothing
    alibi: tuple[float, ...] | None = None  # per head: added per position of distance
    alibi_coarse: bool = False  # slope times key position, in bfloat16, before the scale (Falcon)
    qk_norm: QKNorm | None = None
    temperature: Temperature | None = None
    # queries, keys and values are cut to [-clip, clip], after a norm over their whole width
    clip: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    value_norm: Norm | None = None  # of the values of each head
    values_from_keys: bool = False  # values are the projected keys, before their norm
    kv_layer: int | None = (
        None  # it makes no keys and values, but reads those of this earlier layer
    )


@spec
class LatentAttention:
    """Keys and values of all heads from one narrow latent vector per position.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
    """

    heads: int
    query_rank: int | None  # None: queries are projected at once
    kv_rank: int
    plain_width: int  # channels of a query or key that do not turn
    value_width: int
    scale: float
    rope: Rope  # of `rope.rotated` channels beside the plain ones; the keys' are shared by heads
    norm: Norm  # of the latents
    bias: bool = False


@spec
class Mlp:
    width: int
    act: Act
    gated: bool = True
    bias: bool = False
    limit: float | None = None  # the gate is cut above, what it multiplies on both sides
    shift: float = 0.0  # added to what the gate multiplies


@spec
class Router:
    """Which experts read a token, and how much each counts."""

    per_token: int
    # softmax, sigmoid: of all experts' scores; chosen: softmax over the chosen ones;
    # sparsemixer: one by one, each a softmax over those that are near the best
    score: Literal["softmax", "sigmoid", "chosen", "sparsemixer"] = "softmax"
    renormalise: bool = False  # weights of the chosen sum to 1
    scale: float = 1.0  # multiplies the weights
    bias: bool = False
    correction: bool = False  # a trained offset per expert, for the choice alone
    groups: int = 1  # experts are chosen within the best `kept_groups` of so many groups
    kept_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    jitter: float = 0.0  # sparsemixer: how near is near
    wide: bool = False  # its scores are float32 products (those of sigmoid are anyway)
    norm: Norm | None = None  # of what it reads
    read_scale: float = 1.0  # multiplies what it reads, after the norm
    expert_scale: bool = False  # a trained factor per expert, of its weight
    scales_input: bool = False  # the weight multiplies what an expert reads, not what it gives


@spec
class Experts:
    count: int
    expert: Mlp
    router: Router
    shared: Mlp | None = None  # read by every token
    shared_gated: bool = False  # its output is multiplied by the sigmoid of a trained score
    # The experts together, and the shared one, read and write through norms of their own; the
    # router reads what comes before them, and the layer has no norm before its feed-forward.
    norm: Norm | None = None


@spec
class Layer:
    mixer: Attention | LatentAttention
    ffn: Mlp | Experts
    norm: Norm  # of every norm in the layer, each with weights of its own
    # pre: x + f(norm(x)); post: x + norm(f(x)); sandwich: x + norm(f(norm(x)));
    # after: norm(x + f(x)); parallel: x + mixer(norm(x)) + ffn(norm(x)) of one norm;
    # parallel_two: of two norms
    placement: Literal["pre", "post", "sandwich", "after", "parallel", "parallel_two"] = "pre"
    residual_scale: float = 1.0  # multiplies what mixer and ffn add
    residual_normed: bool = False  # pre: it is added to norm(x), not to x
    scalar: bool = False  # a number beside the weights, never trained, multiplies what leaves


@spec
class TokenInput:
    """Each layer gets a narrow vector of each token, which gates what it adds last.

    x + norm(out(act(gate(x)) * vector)), where the vector is (row of a table + norm of a
    projection of the embedded token) / sqrt(2).

    Source: Gemma 3n's per-layer embeddings; transformers 5.23, models/gemma4.
    """

    rows: int  # of the table
    width: int
    act: Act
    norm: Norm


@spec
class Decoder:
    vocab: int  # embedding rows, which may exceed the number of tokens
    width: int
    layers: tuple[Layer, ...]  # one entry per layer: mixed stacks need no index lists
    norm: Norm | None  # before the head
    tied: bool  # the head's weight is the embedding's
    max_positions: int
    learned_positions: bool = False  # a trained vector per position, added to the embedding
    position_offset: int = 0  # rows of that table before the one of position 0
    embed_width: int | None = None  # of the table, where it is projected to `width` and back
    embed_scale: float = 1.0
    embed_scale_rounded: bool = True  # to the dtype of the table
    embed_norm: Norm | None = None
    token_input: TokenInput | None = None
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    balance: float = 0.0  # times how unevenly experts are chosen, added to the loss in training
