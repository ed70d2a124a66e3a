"""Latent attention as config.json describes it, and the names that DeepSeek gave its parts.

Source: transformers 5.23, models/deepseek_v2 and models/deepseek_v3.
"""

import math

from ardor.arch.spec import LatentAttention, Norm, YarnScaling
from ardor.families.hf_config import HFConfig
from ardor.families.names import Table
from ardor.families.rope import read_rope

LATENT_ATTENTION: Table = {
    "mixer.q_proj": "self_attn.q_proj",
    "mixer.q_down_proj": "self_attn.q_a_proj",
    "mixer.q_norm": "self_attn.q_a_layernorm",
    "mixer.q_up_proj": "self_attn.q_b_proj",
    "mixer.kv_down_proj": "self_attn.kv_a_proj_with_mqa",
    "mixer.kv_norm": "self_attn.kv_a_layernorm",
    "mixer.kv_up_proj": "self_attn.kv_b_proj",
    "mixer.o_proj": "self_attn.o_proj",
}


def read_latent_attention(hf: HFConfig, heads: int, max_positions: int) -> LatentAttention:
    """Attention of `heads` heads whose keys and values come from latents of `kv_lora_rank`.

    Its defaults are those of DeepSeek V2 and V3.
    """
    plain, turning = hf.count("qk_nope_head_dim", 128), hf.count("qk_rope_head_dim", 64)
    neighbours = hf.flag("rope_interleave", True)
    rope = read_rope(
        hf,
        head_width=turning,
        max_positions=max_positions,
        pairing="neighbours" if neighbours else "halves",
    )
    scale = (plain + turning) ** -0.5
    if isinstance(rope.scaling, YarnScaling) and rope.scaling.factor > 1:
        # YaRN sharpens the scores of the plain channels too: here, and not through cos and sin.
        section = hf.raw.get("rope_parameters") or hf.raw["rope_scaling"]
        multiplier = section.get("mscale_all_dim") or 0.0
        scale *= (0.1 * multiplier * math.log(rope.scaling.factor) + 1.0) ** 2
    return LatentAttention(
        heads=heads,
        query_rank=hf.optional_count("q_lora_rank", 1536),
        kv_rank=hf.count("kv_lora_rank", 512),
        plain_width=plain,
        value_width=hf.count("v_head_dim", 128),
        scale=scale,
        rope=rope,
        norm=Norm(eps=1e-6),  # whatever rms_norm_eps says
        bias=hf.flag("attention_bias", False),
    )
