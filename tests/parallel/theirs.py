"""What transformers and accelerate make of the same model, on the meta device."""

import random
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ardor.parallel.placement import Node

FAMILIES = (
    *("llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "mixtral", "opt", "bloom", "phi3", "cohere"),
    *("falcon", "gpt_bigcode"),
)
DTYPES = (torch.float32, torch.bfloat16)
DEVICES = (0, 1, 2, 3)


def on_meta(keys: dict[str, Any], dtype: torch.dtype) -> Any:
    """A model of the keys that its family knows."""
    kind = CONFIG_MAPPING[keys["model_type"]]
    known = {*kind().to_dict(), *kind.attribute_map}
    config = kind(**{key: value for key, value in keys.items() if key in known - {"model_type"}})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def random_keys(draw: random.Random) -> dict[str, Any]:
    """A config of a random family, shape and tying."""
    heads = draw.choice((2, 4, 8))
    kv_heads = draw.choice((1, heads))
    width = heads * draw.choice((8, 16, 32))
    return {
        "model_type": draw.choice(FAMILIES),
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "intermediate_size": draw.randint(8, 512),
        "num_hidden_layers": draw.randint(1, 9),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "multi_query": kv_heads == 1,
        "head_dim": width // heads,
        "num_local_experts": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vocab_size": draw.choice((50, 300, 5000)),
        "max_position_embeddings": draw.choice((16, 256)),
        "tie_word_embeddings": draw.random() < 0.5,
        "pad_token_id": 0,
    }


def random_memory(draw: random.Random, total: int) -> dict[Any, int]:
    """From none at all to more than enough, on up to four accelerators."""
    count = draw.randint(0, 4)
    found: dict[Any, int] = {
        number: int(draw.choice((0.1, 0.3, 0.6, 1.0, 2.0)) * total * draw.uniform(0.5, 1.5))
        for number in range(count)
    }
    if draw.random() < 0.7 or not found:
        found["cpu"] = int(total * draw.uniform(0, 2))
    return found


def tree(model: Any) -> tuple[Node, list[frozenset[str]]]:
    """Their modules with their sizes, and what is tied, as our placement wants them."""
    tied = model.all_tied_weights_keys

    def tensor(name: str, found: Tensor) -> Node:
        return Node(name, bytes=0 if name in tied else found.nbytes)

    def node(name: str, module: nn.Module) -> Node:
        start = f"{name}." if name else ""
        parameters = module.named_parameters(recurse=False)
        return Node(
            name,
            parameters=tuple(tensor(start + key, found) for key, found in parameters),
            children=tuple(node(start + key, child) for key, child in module.named_children()),
            buffers=tuple(
                tensor(start + key, found) for key, found in module.named_buffers(recurse=False)
            ),
            whole=type(module).__name__ in (model._no_split_modules or ()),
        )

    ties = [frozenset((target, source)) for target, source in tied.items()]
    return node("", model), ties


def without_tables(model: Any) -> Any:
    """The model without what it keeps beside its weights: rotary tables, and masks of old."""
    for module in model.modules():
        for name in [*module._buffers]:
            delattr(module, name)
    return model
