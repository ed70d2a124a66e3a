"""Tiny models of transformers' own classes, with weights that show a mistake.

Tolerance: float32 sums of a few dozen terms of size 10, in another order.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from ardor.files.json import read_json
from ardor.files.weights import open_weights

V, T = 53, 24
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Case:
    """One configuration of a family: the keys in which it differs from `SIZES`."""

    model_type: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    matrix: float = 0.15  # size of the weights of linear maps; the vocabulary's are 0.3
    q_norm: float = 1.0  # size of its weights; small where nothing else scales the scores
    sizes: Mapping[str, Any] = field(default_factory=lambda: SIZES)
    attn: str = "eager"  # their attention, where the reference itself is odd
    in_bfloat16: bool = True  # saved so; False where a part of it must stay float32
    batched: bool = True  # False: there a row depends on how long the others of its batch are
    # What their padded batch is given; without positions where these follow from the mask.
    padding: tuple[str, ...] = ("attention_mask", "position_ids")

    @property
    def auto(self) -> Any:
        """What makes such models; that of images where there is a text model inside."""
        return AutoModelForImageTextToText if "text_config" in self.keys else AutoModelForCausalLM

    def config(self) -> Any:
        keys = deepcopy({**self.sizes, **self.keys})  # theirs writes into what it is given
        return AutoConfig.for_model(self.model_type, **keys)


def peer(case: Case, seed: int = 0) -> nn.Module:
    """A model of transformers in evaluation mode, with random weights: norms and biases too."""
    model = case.auto.from_config(case.config(), attn_implementation=case.attn)
    generator = torch.Generator().manual_seed(seed)
    held = model.state_dict()  # with the buffers that are trained, such as a router's correction
    shared = {tensor.data_ptr() for tensor in held.values()}
    with torch.no_grad():
        for name, tensor in held.items():
            if not tensor.is_floating_point() or tensor.data_ptr() not in shared:
                continue
            shared.discard(tensor.data_ptr())  # a tied tensor is made once
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1 or "norm" in name:
                tensor.add_(0.3 * noise)  # to ones, or to the zeros of biases and of 1 + w
                if name.endswith("q_norm.weight"):
                    tensor.mul_(case.q_norm)
            else:
                tensor.copy_((0.3 if V in tensor.shape else case.matrix) * noise)
    return model.float().eval()


def saved(model: Any, directory: Path, **keys: Any) -> Path:
    model.save_pretrained(directory, **keys)
    return directory


def tokens(rows: int = 2, length: int = T, seed: int = 1) -> Tensor:
    return torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **keys: Any) -> Tensor:
    return reader(model)(ids, use_cache=False, **keys).logits


def reader(model: Any) -> nn.Module:
    """The part that reads a text: transformers 5.24's Llama 4 fails without images around it."""
    return model.language_model if model.config.model_type == "llama4" else model


def reloaded(directory: Path, case: Case) -> nn.Module:
    model, report = case.auto.from_pretrained(
        directory, dtype="auto", attn_implementation=case.attn, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def contents(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Every tensor of a checkpoint, bit for bit."""
    found = open_weights(directory)
    held = {name: found.read(name) for name in found.names()}
    return {
        name: (str(t.dtype), list(t.shape), t.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, t in held.items()
    }


# Beside newer keys that say the same; see `ardor.families.older`.
OLDER = {"torch_dtype", "rope_theta", "rope_scaling", "rope_local_base_freq"}
OLDER |= {"partial_rotary_factor", "rotary_emb_base", "rotary_pct", "num_experts"}


def assert_config_kept(after: Path, before: Path) -> None:
    """config.json says what it said, and besides only what older readers look for."""
    kept, found = read_json(before / "config.json"), read_json(after / "config.json")
    _assert_kept(kept, found)


def _assert_kept(kept: dict[str, Any], found: dict[str, Any]) -> None:
    inner = kept.get("text_config")
    if isinstance(inner, dict):
        _assert_kept(inner, found["text_config"])
    assert {key: found[key] for key in kept if key != "text_config"} == {
        key: value for key, value in kept.items() if key != "text_config"
    }
    assert {*found} - {*kept} <= OLDER
