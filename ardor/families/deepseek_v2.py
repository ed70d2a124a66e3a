"""DeepSeek V2 and V2-Lite, the Coder-V2 models too. HF model_type "deepseek_v2".

Source: DeepSeek-AI 2024, arXiv:2405.04434; transformers 5.23, models/deepseek_v2.
"""

from ardor.arch.spec import Decoder, Router
from ardor.families.blocks import read_mlp
from ardor.families.deepseek_v3 import NAMES, read_deepseek, read_experts
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig


def _read(hf: HFConfig) -> Decoder:
    hf.require("rope_interleave", True, "neighbouring channels turn in version 2")
    dense = read_mlp(hf, bias=hf.flag("mlp_bias", False))
    experts = read_experts(hf, _router(hf), dense, count=64, width=1407, shared=2)
    max_positions = hf.count("max_position_embeddings", 2048)
    return read_deepseek(hf, experts, dense, max_positions=max_positions, dense_layers=0)


def _router(hf: HFConfig) -> Router:
    hf.require("scoring_func", "softmax", "version 2 was trained so")
    hf.require("norm_topk_prob", False, "transformers ignores it, and DeepSeek's own code does not")
    limited = hf.choice("topk_method", {"greedy": False, "group_limited_greedy": True}, "greedy")
    for key in ("n_group", "topk_group"):
        hf.take(key, None)  # the greedy method has no use for them
    return Router(
        per_token=hf.count("num_experts_per_tok"),
        scale=hf.number("routed_scaling_factor", 1.0),
        groups=hf.count("n_group") if limited else 1,
        kept_groups=hf.count("topk_group") if limited else 1,
        wide=True,
    )


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    models="DeepSeek V2",
    unlike="latent attention, grouped routing",
    read=_read,
    name_tensors=NAMES.rules,
    code=("configuration_deepseek", "modeling_deepseek"),
)
