"""DeepSeek V3, R1 and those built like them (Moonlight). HF model_type "deepseek_v3".

Source: DeepSeek-AI 2024, arXiv:2412.19437; transformers 5.23, models/deepseek_v3.
"""

from dataclasses import replace

from ardor.arch.spec import Decoder, Experts, Layer, Mlp, Router
from ardor.errors import ConfigError
from ardor.families.blocks import LLAMA_MLP, LLAMA_OUTSIDE, Heads, read_decoder, read_mlp, rms
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig
from ardor.families.latent import LATENT_ATTENTION, read_latent_attention
from ardor.families.moe import expert_places
from ardor.families.names import Names
from ardor.families.rules import Ignorable, Rules

NAMES = Names(
    prefix="model.",
    layer="model.layers.{}.",
    modules={
        "mixer_norm": "input_layernorm",
        **LATENT_ATTENTION,
        "ffn_norm": "post_attention_layernorm",
        **LLAMA_MLP,
        "ffn.router": "mlp.gate",
        "ffn.router.correction": "mlp.gate.e_score_correction_bias",
        **expert_places("mlp.experts.{}", "gate_proj", "up_proj", "down_proj"),
        "ffn.shared.gate_proj": "mlp.shared_experts.gate_proj",
        "ffn.shared.up_proj": "mlp.shared_experts.up_proj",
        "ffn.shared.down_proj": "mlp.shared_experts.down_proj",
    },
    outside=LLAMA_OUTSIDE,
)


def read_deepseek(
    hf: HFConfig, experts: Experts, dense: Mlp, *, max_positions: int, dense_layers: int
) -> Decoder:
    """A decoder of latent attention whose first layers have the feed-forward `dense`, not experts.

    `dense_layers` says how many where the file is silent.
    """
    width, heads = hf.count("hidden_size"), hf.count("num_attention_heads")
    hf.require("num_key_value_heads", heads, "every head makes keys of its own from the latents")
    hf.require("moe_layer_freq", 1, "after the first layers, all have experts")
    for key in ("aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp", "output_router_logits"):
        hf.take(key, None)  # how it was trained, and what a Python call returns
    for key in ("head_dim", "qk_head_dim"):
        hf.take(key, None)  # transformers derives them from the widths of queries and keys
    mixer = read_latent_attention(hf, heads, max_positions)
    layer = Layer(mixer=mixer, ffn=dense, norm=rms(hf))
    count = hf.count("num_hidden_layers")
    first = min(hf.natural("first_k_dense_replace", dense_layers), count)
    return read_decoder(
        hf,
        Heads(width, heads, heads, width // heads),
        (layer,) * first + (replace(layer, ffn=experts),) * (count - first),
        max_positions=max_positions,
    )


def read_experts(
    hf: HFConfig, router: Router, dense: Mlp, *, count: int, width: int, shared: int
) -> Experts:
    """The experts that `router` chooses among, and as one wide feed-forward the shared ones.

    Raises: ConfigError if groups do not fit.
    """
    count = hf.count("n_routed_experts", count)
    width = hf.count("moe_intermediate_size", width)
    each = count // router.groups
    fewest = 2 if router.groups > 1 and router.group_score == "top2" else 1
    enough = router.per_token <= each * router.kept_groups <= count
    if count % router.groups or each < fewest or not enough:
        raise ConfigError(
            f"{hf.path}: {router.per_token} of n_routed_experts={count} cannot be chosen within "
            f"topk_group={router.kept_groups} of n_group={router.groups}"
        )
    return Experts(
        count=count,
        expert=Mlp(width=width, act=dense.act),
        router=router,
        shared=replace(dense, width=width * hf.count("n_shared_experts", shared)),
    )


def _read(hf: HFConfig) -> Decoder:
    hf.require("scoring_func", "sigmoid", "version 3 was trained so")
    hf.require("topk_method", "noaux_tc", "experts are chosen by corrected scores")
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):
        hf.take(key, None)  # layers after the last, which draft tokens
    router = Router(
        per_token=hf.count("num_experts_per_tok", 8),
        score="sigmoid",
        renormalise=hf.flag("norm_topk_prob", True),
        scale=hf.number("routed_scaling_factor", 2.5),
        correction=True,
        groups=hf.count("n_group", 8),
        kept_groups=hf.count("topk_group", 4),
        group_score="top2",
    )
    dense = read_mlp(hf)
    experts = read_experts(hf, router, dense, count=256, width=2048, shared=1)
    max_positions = hf.count("max_position_embeddings", 4096)
    return read_deepseek(hf, experts, dense, max_positions=max_positions, dense_layers=3)


def _rules(spec: Decoder) -> Rules:
    drafting = Ignorable(
        pattern=rf"layers\.{len(spec.layers)}\..*",
        beside=f"layers.{len(spec.layers)}.eh_proj.weight",  # else it is a layer like the others
        reason="a layer that drafts the token after the next",
        kept=True,
    )
    return replace(NAMES, ignorable=(drafting,)).rules(spec)


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    models="DeepSeek V3, R1, Moonlight",
    unlike="latent attention, grouped sigmoid routing",
    read=_read,
    name_tensors=_rules,
    code=("configuration_deepseek", "modeling_deepseek"),
)
