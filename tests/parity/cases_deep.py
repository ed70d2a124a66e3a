"""Models with latent attention or with experts that few others are like."""

from .peer import SIZES, Case

LATENT = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "q_lora_rank": 10,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "first_k_dense_replace": 1,
}
V3 = {**SIZES, **LATENT, "n_group": 4, "topk_group": 2}
V2 = {**SIZES, **LATENT}
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "beta_fast": 4,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
    "original_max_position_embeddings": 16,
}

CASES = {
    "deepseek_v3: groups, two kinds of layers": Case("deepseek_v3", sizes=V3),
    "deepseek_v3: no rank of queries, halves turn, weights as they are": Case(
        "deepseek_v3",
        {
            "q_lora_rank": None,
            "rope_interleave": False,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
        },
        sizes=V3,
    ),
    "deepseek_v3: yarn as it was published, biases": Case(
        "deepseek_v3",
        {"rope_scaling": YARN, "rope_theta": 100.0, "attention_bias": True, "rms_norm_eps": 0.01},
        sizes=V3,
    ),
    "deepseek_v2: greedy, no rank of queries": Case(
        "deepseek_v2", {"q_lora_rank": None, "n_group": 1, "topk_group": 1}, sizes=V2
    ),
    "deepseek_v2: groups, yarn, biases, all layers": Case(
        "deepseek_v2",
        {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 4.0,
            "rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 100.0},
            "mlp_bias": True,
            "attention_bias": True,
            "first_k_dense_replace": 0,
        },
        sizes=V2,
    ),
}
