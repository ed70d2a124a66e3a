"""Text models within models that also read images."""

from .cases_deep import LLAMA4
from .peer import SIZES, Case

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}
LLAMA4_IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_output_dim": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}
QWEN_IMAGES = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 24,
    "deepstack_visual_indexes": [0],
}
MROPE = {"rope_type": "default", "rope_theta": 30.0, "mrope_section": [1, 1, 2]}

CASES = {
    "llama4: beside images": Case(
        "llama4", {"text_config": LLAMA4, "vision_config": LLAMA4_IMAGES}, sizes=TOKENS
    ),
    "llama4: beside images, tied": Case(
        "llama4",
        {
            "text_config": {**LLAMA4, "tie_word_embeddings": True},
            "vision_config": LLAMA4_IMAGES,
        },
        sizes=TOKENS,
    ),
    "mistral3: a mistral beside images": Case(
        "mistral3",
        {
            "text_config": {
                **SIZES,
                "model_type": "mistral",
                "num_key_value_heads": 1,
                "head_dim": 10,
                "rope_theta": 50.0,
                "sliding_window": None,
            },
            "vision_config": PIXTRAL,
            "tie_word_embeddings": False,
        },
        sizes=TOKENS,
    ),
    "mistral3: a ministral3 beside images, tied": Case(
        "mistral3",
        {
            "text_config": {
                **SIZES,
                "model_type": "ministral3",
                "head_dim": 8,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 50.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                    "llama_4_scaling_beta": 0.5,
                },
            },
            "vision_config": PIXTRAL,
            "tie_word_embeddings": True,
        },
        sizes=TOKENS,
        batched=False,  # they count the padding as positions
    ),
    "qwen2_vl: beside images": Case(
        "qwen2_vl",
        {
            "text_config": {**SIZES, "rope_parameters": MROPE},
            "vision_config": {**QWEN_IMAGES, "embed_dim": 16, "hidden_size": 24},
        },
        sizes=TOKENS,
    ),
    "qwen2_5_vl: beside images, windows, tied": Case(
        "qwen2_5_vl",
        {
            "text_config": {
                **SIZES,
                "num_key_value_heads": 1,
                "use_sliding_window": True,
                "sliding_window": 5,
                "max_window_layers": 1,
                "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
            },
            "vision_config": QWEN_IMAGES,
            "tie_word_embeddings": True,
        },
        sizes=TOKENS,
    ),
    "qwen3_vl: beside images, biases": Case(
        "qwen3_vl",
        {
            "text_config": {
                **SIZES,
                "head_dim": 8,
                "attention_bias": True,
                "rope_parameters": {**MROPE, "mrope_interleaved": True},
            },
            "vision_config": QWEN_IMAGES,
        },
        sizes=TOKENS,
    ),
}
