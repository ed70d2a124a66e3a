"""Models that can be named: published shapes as the keys of their config.json, to train anew.

No weights are here, and none are loaded. `parameters` is the published count, with the published
vocabulary; a test counts them again.
"""

from typing import Any, NamedTuple


class Preset(NamedTuple):
    config: dict[str, Any]
    parameters: int
    source: str
    init: str | None = None  # None: its family's


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "n_inner": None,  # 4 x n_embd
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
    }


def _neox(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "vocab_size": 50304,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
    }


def _llama(
    width: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    vocab: int = 32000,
    positions: int = 2048,
    tied: bool = False,
    model_type: str = "llama",
    architecture: str = "LlamaForCausalLM",
    **keys: Any,
) -> dict[str, Any]:
    """The keys that Llama's config.json has, and most took over."""
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        **keys,
    }


def _other(architecture: str, model_type: str, *sizes: int, **keys: Any) -> dict[str, Any]:
    return _llama(*sizes, model_type=model_type, architecture=architecture, **keys)


_GPT2 = "Radford et al. 2019, table 2; openai-community/gpt2*"
_STORIES = "Karpathy 2023, llama2.c: TinyStories sizes"
_PYTHIA = "Biderman et al. 2023, arXiv:2304.01373, table 1; EleutherAI/pythia-*"
_SMOLLM2 = "Ben Allal et al. 2025, arXiv:2502.02737; HuggingFaceTB/SmolLM2-*"

PRESETS: dict[str, Preset] = {
    "gpt2-124m": Preset(_gpt2(768, 12, 12), 124_439_808, _GPT2),
    "gpt2-350m": Preset(_gpt2(1024, 24, 16), 354_823_168, _GPT2),
    "gpt2-774m": Preset(_gpt2(1280, 36, 20), 774_030_080, _GPT2),
    "gpt2-1.5b": Preset(_gpt2(1600, 48, 25), 1_557_611_200, _GPT2),
    "llama-15m": Preset(
        _llama(288, 768, 6, 6, 6, positions=256, tied=True), 15_191_712, _STORIES, init="megatron"
    ),
    "llama-42m": Preset(
        _llama(512, 1376, 8, 8, 8, positions=1024, tied=True), 41_689_600, _STORIES, init="megatron"
    ),
    "llama-110m": Preset(
        _llama(768, 2048, 12, 12, 12, positions=1024, tied=True),
        109_529_856,
        _STORIES,
        init="megatron",
    ),
    "mixtral-43m": Preset(
        _other(
            "MixtralForCausalLM",
            "mixtral",
            *(288, 768, 6, 6, 6),
            positions=256,
            tied=True,
            num_local_experts=8,
            num_experts_per_tok=2,
            sliding_window=None,
        ),
        43_074_720,
        "llama-15m with 8 experts of its feed-forward's size, 2 for each token; ours",
        init="megatron",
    ),
    "pythia-70m": Preset(_neox(512, 6, 8), 70_426_624, _PYTHIA),
    "pythia-160m": Preset(_neox(768, 12, 12), 162_322_944, _PYTHIA),
    "pythia-410m": Preset(_neox(1024, 24, 16), 405_334_016, _PYTHIA),
    "opt-125m": Preset(
        {
            "model_type": "opt",
            "architectures": ["OPTForCausalLM"],
            "vocab_size": 50272,
            "hidden_size": 768,
            "word_embed_proj_dim": 768,
            "ffn_dim": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 2048,
        },
        125_239_296,
        "Zhang et al. 2022, arXiv:2205.01068, table 1; facebook/opt-125m",
    ),
    "bloom-560m": Preset(
        {
            "model_type": "bloom",
            "architectures": ["BloomForCausalLM"],
            "vocab_size": 250880,
            "hidden_size": 1024,
            "n_layer": 24,
            "n_head": 16,
        },
        559_214_592,
        "Le Scao et al. 2022, arXiv:2211.05100; bigscience/bloom-560m",
    ),
    "smollm2-135m": Preset(
        _llama(
            *(576, 1536, 30, 9, 3), vocab=49152, positions=8192, tied=True, rope_theta=100_000.0
        ),
        134_515_008,
        _SMOLLM2,
    ),
    "smollm2-360m": Preset(
        _llama(
            *(960, 2560, 32, 15, 5), vocab=49152, positions=8192, tied=True, rope_theta=100_000.0
        ),
        361_821_120,
        _SMOLLM2,
    ),
    "qwen2.5-0.5b": Preset(
        _other(
            "Qwen2ForCausalLM",
            "qwen2",
            *(896, 4864, 24, 14, 2),
            vocab=151936,
            positions=32768,
            tied=True,
            rms_norm_eps=1e-6,
            rope_theta=1_000_000.0,
        ),
        494_032_768,
        "Qwen team 2024, arXiv:2412.15115, table 1; Qwen/Qwen2.5-0.5B",
    ),
    "qwen3-0.6b": Preset(
        _other(
            "Qwen3ForCausalLM",
            "qwen3",
            *(1024, 3072, 28, 16, 8),
            vocab=151936,
            positions=40960,
            tied=True,
            head_dim=128,
            rms_norm_eps=1e-6,
            rope_theta=1_000_000.0,
        ),
        596_049_920,
        "Qwen team 2025, arXiv:2505.09388, table 1; Qwen/Qwen3-0.6B",
    ),
    "tinyllama-1.1b": Preset(
        _llama(2048, 5632, 22, 32, 4),
        1_100_048_384,
        "Zhang et al. 2024, arXiv:2401.02385, table 1",
        init="small",
    ),
    "olmo-1b": Preset(
        {
            "model_type": "olmo",
            "architectures": ["OlmoForCausalLM"],
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
        1_176_764_416,
        "Groeneveld et al. 2024, arXiv:2402.00838, table 1; allenai/OLMo-1B-hf",
    ),
    "olmo-2-1b": Preset(
        _other(
            "Olmo2ForCausalLM",
            "olmo2",
            *(2048, 8192, 16, 16, 16),
            vocab=100352,
            positions=4096,
            rms_norm_eps=1e-6,
            rope_theta=500_000.0,
        ),
        1_484_916_736,
        "OLMo team 2025, arXiv:2501.00656; allenai/OLMo-2-0425-1B",
    ),
    "llama-3.2-1b": Preset(
        _llama(
            *(2048, 8192, 16, 32, 8),
            vocab=128256,
            positions=131072,
            tied=True,
            head_dim=64,
            rope_theta=500_000.0,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        1_235_814_400,
        "Meta 2024, model card of Llama 3.2",
    ),
    "granite-3.0-1b-a400m": Preset(
        _other(
            "GraniteMoeForCausalLM",
            "granitemoe",
            *(1024, 512, 24, 16, 8),
            vocab=49155,
            positions=4096,
            tied=True,
            rms_norm_eps=1e-6,
            num_local_experts=32,
            num_experts_per_tok=8,
            embedding_multiplier=12.0,
            attention_multiplier=0.015625,
            residual_multiplier=0.22,
            logits_scaling=6.0,
        ),
        1_334_628_352,
        "IBM 2024, Granite 3.0 Language Models; ibm-granite/granite-3.0-1b-a400m-base",
    ),
    "gemma-2-2b": Preset(
        _other(
            "Gemma2ForCausalLM",
            "gemma2",
            *(2304, 9216, 26, 8, 4),
            vocab=256000,
            positions=8192,
            tied=True,
            head_dim=256,
            hidden_act="gelu_pytorch_tanh",
            hidden_activation="gelu_pytorch_tanh",
            rms_norm_eps=1e-6,
            query_pre_attn_scalar=256,
            sliding_window=4096,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
        ),
        2_614_341_888,
        "Gemma team 2024, arXiv:2408.00118, table 1; google/gemma-2-2b",
    ),
    "llama-2-7b": Preset(
        _llama(4096, 11008, 32, 32, 32, positions=4096),
        6_738_415_616,
        "Touvron et al. 2023, arXiv:2307.09288; meta-llama/Llama-2-7b-hf",
    ),
    "olmoe-1b-7b": Preset(
        _other(
            "OlmoeForCausalLM",
            "olmoe",
            *(2048, 1024, 16, 16, 16),
            vocab=50304,
            positions=4096,
            num_experts=64,
            num_experts_per_tok=8,
            norm_topk_prob=False,
            router_aux_loss_coef=0.01,
        ),
        6_919_161_856,
        "Muennighoff et al. 2024, arXiv:2409.02060; allenai/OLMoE-1B-7B-0924",
    ),
    "mistral-7b": Preset(
        _other(
            "MistralForCausalLM",
            "mistral",
            *(4096, 14336, 32, 32, 8),
            positions=32768,
            sliding_window=4096,
        ),
        7_241_732_096,
        "Jiang et al. 2023, arXiv:2310.06825, table 1; mistralai/Mistral-7B-v0.1",
    ),
    "llama-3.1-8b": Preset(
        _llama(
            *(4096, 14336, 32, 32, 8),
            vocab=128256,
            positions=131072,
            rope_theta=500_000.0,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        8_030_261_248,
        "Grattafiori et al. 2024, arXiv:2407.21783, table 3",
    ),
}


def starter(family: str, positions: int) -> dict[str, Any]:
    """What is trained where no model is named: small enough for a laptop, to be sized by flags."""
    if family == "llama":
        return _llama(256, 704, 6, 8, 8, positions=positions, tied=True)
    return {**_gpt2(256, 6, 8), "n_inner": 704, "n_positions": positions}


# How a family's models were initialised, by model_type; the rest as transformers does: normal.
# The sources are beside the schemes, in arch/init.py.
INITS: dict[str, str] = {
    "gpt2": "gpt2",
    "gpt_bigcode": "gpt2",
    "opt": "megatron",
    "gpt_neox": "small",
    "olmo": "mitchell",
    "olmo2": "truncated",
    "olmo3": "truncated",
    "olmoe": "truncated",
    "ardor": "megatron",
}
# Standard deviations, where a config.json does not tell its initializer_range; the rest: 0.02.
# Source: DeepSeek-V2, arXiv:2405.04434, section 3.1.2; V3, arXiv:2412.19437, section 4.2; OPT,
# arXiv:2205.01068, section 2.2.
STDS: dict[str, float] = {"deepseek_v2": 0.006, "deepseek_v3": 0.006, "opt": 0.006}
