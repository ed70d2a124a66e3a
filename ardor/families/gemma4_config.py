"""Gemma 4's config.json: its sizes are built of different parts.

Source: transformers 5.23, models/gemma4, configuration_gemma4.py.
"""

from dataclasses import replace

from ardor.arch.spec import (
    Attention,
    Decoder,
    Experts,
    Layer,
    Mlp,
    Norm,
    QKNorm,
    Router,
    TokenInput,
)
from ardor.errors import ConfigError
from ardor.families.blocks import (
    Heads,
    attention,
    read_decoder,
    read_heads,
    read_layer_types,
    read_mlp,
    read_windows,
    rms,
)
from ardor.families.hf_config import HFConfig
from ardor.families.rope import read_kind_rope

_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1_000_000.0,
    },
}


def read_gemma4(hf: HFConfig) -> Decoder:
    """Raises: ConfigError for what is not read, and layers that cannot share keys and values."""
    found = read_heads(hf, kv_heads=4, head_width=256)
    if hf.take("use_bidirectional_attention", None) != "vision":  # which is of images alone
        hf.require("use_bidirectional_attention", None, "a position never reads what follows it")
    norm, max_positions = rms(hf, late_cast=True), hf.count("max_position_embeddings", 131_072)
    kinds = (*read_layer_types(hf, lambda i: (i + 1) % 6 != 0)[:-1], "full_attention")
    mixers = _shared(hf, kinds, [_mixer(hf, found, kinds, i, norm) for i in range(len(kinds))])
    narrow = read_mlp(hf, act_key="hidden_activation", act="gelu_pytorch_tanh")
    double = hf.flag("use_double_wide_mlp", False)
    experts = _experts(hf, narrow, norm)

    def ffn(mixer: Attention) -> Mlp | Experts:
        wide = double and mixer.kv_layer is not None
        mlp = replace(narrow, width=2 * narrow.width) if wide else narrow
        return mlp if experts is None else replace(experts, shared=mlp)

    return read_decoder(
        hf,
        found,
        tuple(
            Layer(mixer=m, ffn=ffn(m), norm=norm, placement="sandwich", scalar=True) for m in mixers
        ),
        max_positions=max_positions,
        tied=True,
        embed_scale=found.width**0.5,
        token_input=_token_input(hf, narrow, norm),
        logit_softcap=hf.optional_number("final_logit_softcapping"),
    )


def _mixer(hf: HFConfig, found: Heads, kinds: tuple[str, ...], index: int, norm: Norm) -> Attention:
    """The attention of one layer: those that read everything may be of another shape."""
    full, bias = kinds[index] == "full_attention", hf.flag("attention_bias", False)
    same = hf.flag("attention_k_eq_v", False)
    windows = read_windows(hf, kinds, hf.optional_count("sliding_window", 512))
    width, kv_heads = hf.count("global_head_dim", 512), hf.take("num_global_key_value_heads", None)
    if (layers := hf.section("per_layer_config")) is not None:  # as transformers 5 writes them
        known = {int(key): key for key in layers.raw if key.isdecimal()}  # "4", or "04"
        sections = [layers.section(known.get(i, str(i))) for i in range(len(kinds))]
        layers.finish({})
        own = sections[index] or HFConfig({}, path=layers.path)
        found = found._replace(
            head_width=own.count("head_dim", found.head_width),
            kv_heads=own.count("num_key_value_heads", found.kv_heads),
        )
        own.finish({})
    elif full:
        found = found._replace(head_width=width)
        if same and kv_heads is not None:
            found = found._replace(kv_heads=hf.count("num_global_key_value_heads"))
    return attention(
        found,
        read_kind_rope(hf, kinds[index], head_width=found.head_width, default=_ROPES),
        scale=1.0,
        window=windows[index],
        qk_norm=QKNorm(norm=norm),
        value_norm=replace(norm, weight="none"),
        values_from_keys=same and full,
        qkv_bias=bias,
        out_bias=bias,
    )


def _shared(hf: HFConfig, kinds: tuple[str, ...], mixers: list[Attention]) -> list[Attention]:
    """The last layers read the keys and values of the last layer of their kind before them."""
    count = int(hf.number("num_kv_shared_layers", 0))
    first = len(mixers) - count
    sources = {kind: index for index, kind in enumerate(kinds[: max(first, 0)])}
    for index in range(max(first, 0), len(mixers)):
        source, here = sources.get(kinds[index]), mixers[index]
        there = here if source is None else mixers[source]
        same = (there.kv_heads, there.head_width) == (here.kv_heads, here.head_width)
        if source is None or not same:
            raise ConfigError(
                f"{hf.path}: num_kv_shared_layers={count}, but no {kinds[index]} layer of the same "
                f"shape is before them whose keys and values layer {index} could read"
            )
        mixers[index] = replace(here, kv_layer=source)
    return mixers


def _experts(hf: HFConfig, mlp: Mlp, norm: Norm) -> Experts | None:
    """What stands beside the feed-forward of every layer, if anything does."""
    keys = ("num_experts", "top_k_experts", "moe_intermediate_size")
    if not hf.flag("enable_moe_block", False):
        for key in keys:
            hf.take(key, None)
        return None
    count, per_token, width = (hf.count(key) for key in keys)
    if per_token > count:
        raise ConfigError(f"{hf.path}: top_k_experts={per_token} of only {count} experts")
    router = Router(
        per_token=per_token,
        renormalise=True,
        norm=replace(norm, late_cast=False),
        read_scale=hf.count("hidden_size") ** -0.5,
        expert_scale=True,
    )
    return Experts(count=count, expert=replace(mlp, width=width), router=router, norm=norm)


def _token_input(hf: HFConfig, mlp: Mlp, norm: Norm) -> TokenInput | None:
    rows, width = hf.count("vocab_size_per_layer_input", 262_144), "hidden_size_per_layer_input"
    if hf.take(width, 256) == 0:
        return None
    return TokenInput(rows=rows, width=hf.count(width, 256), act=mlp.act, norm=norm)
