"""Flags that say how a model is loaded: the same for every verb that uses one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ardor.errors import ConfigError

if TYPE_CHECKING:
    from ardor.lm import LM


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """How to hold the model."""

    device_map: str | None = None
    """cpu, a GPU such as cuda:0, or how to spread over all there is: auto, balanced,
    balanced_low_0, sequential; or JSON such as {"model.layers": "disk", "": "cpu"}. Default: the
    GPU where there is one."""
    max_memory: str | None = None
    """With auto and the like: what may lie where, such as 0=10GiB,cpu=30GiB; the rest goes to the
    disk. Default: what is free."""
    offload_folder: str | None = None
    """Where layers that are kept on disk are written, if they are not in the checkpoint as they
    are in memory."""
    dtype: str = "auto"
    """auto (as config.json says, else as stored), float32, bfloat16 or float16."""
    quantization: str | None = None
    """nf4, nf4-dq, fp4, int8 (LLM.int8), int8-g128, int4-g128 (and -g64, -g32), none, or a YAML
    file of BitsAndBytesConfig's settings. Default: as stored, or as the run was trained."""
    load_in_4bit: bool = False
    """The same as --quantization nf4."""
    load_in_8bit: bool = False
    """The same as --quantization int8."""
    adapter: tuple[str, ...] = ()
    """An adapter of PEFT, or a run, to put on the model: DIR or NAME=DIR. May be given again: the
    first is at work; in a chat /adapter NAME takes another."""
    adapter_weights: tuple[float, ...] = ()
    """Put the sum of all adapters to work instead, each times its number: one for each."""
    adapter_combination: str = "cat"
    """How they are added up: cat (exact), linear (A to A, B to B), svd, or magnitude_prune, ties,
    dare_linear, dare_ties, which keep a share of each, of A and B or, with _svd behind, of B A."""
    adapter_density: float | None = None
    """The share that pruning, ties and dare keep, such as 0.2."""
    adapter_majority_sign: str = "total"
    """What ties elects signs by: total (the sum) or frequency (the count)."""
    adapter_rank: int | None = None
    """The rank that svd and what ends in _svd cut to. Default: the highest of theirs."""
    adapter_seed: int = 0
    """Of what dare drops."""
    attn_implementation: str | None = None
    """sdpa, eager (the reference), flex or flash_attention_2. Default: the best there is."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Let transformers run a model that Ardor does not know, and code from its repository if it
    names some. What will run is said first."""
    use_safetensors: bool = True
    """Weights from safetensors; --no-use-safetensors: from pickles (.bin), tensors alone."""
    chat_template: str | None = None
    """A chat template's name (such as chatml, llama3 or qwen3) or a jinja file, in place of the
    model's own."""

    def load(self, name: str) -> LM:
        """The model; how it is held is said on stderr."""
        adapters = _named(self.adapter)
        if self.adapter_weights and len(self.adapter_weights) != len(adapters):
            raise ConfigError(
                f"found {len(self.adapter_weights)} adapter_weights for {len(adapters)} adapters; "
                "give one for each"
            )
        if unused := [] if self.adapter_weights else self._combination():
            raise ConfigError(
                f"{', '.join(unused)} says how adapters are added up, but there is no sum; give "
                "adapter_weights, one for each adapter"
            )
        how = self._how() if self.adapter_weights else {}  # refused before anything is loaded
        lm = self._load(name, next(iter(adapters.values()), None))
        if len(adapters) < 2 and not self.adapter_weights:
            return lm
        lm.name_adapter("default", next(iter(adapters)))
        for other in [*adapters][1:]:
            lm.load_adapter(adapters[other], other)
        if self.adapter_weights:
            summed = "+".join(adapters)
            weights = dict(zip(adapters, self.adapter_weights, strict=True))
            lm.combine_adapters(summed, weights, **how)
            lm.use_adapter(summed)
        return lm

    def _how(self) -> dict[str, Any]:
        from ardor.adapters.combine import Combination  # later: help needs no torch

        combination = Combination(
            how=self.adapter_combination,
            rank=self.adapter_rank,
            density=self.adapter_density,
            majority_sign_method=self.adapter_majority_sign,
            seed=self.adapter_seed,
        )
        return asdict(combination)

    def _combination(self) -> list[str]:
        """The settings of a sum that were given."""
        return [
            one.name
            for one in fields(ModelFlags)
            if one.name.startswith("adapter_")
            and one.name != "adapter_weights"
            and getattr(self, one.name) != one.default
        ]

    def _load(self, name: str, adapter: str | None) -> LM:
        from ardor.lm import load  # later: help needs no torch
        from ardor.load import default_device

        return load(
            name,
            device_map=_devices(self.device_map) or str(default_device()),
            max_memory=_amounts(self.max_memory),
            offload_folder=self.offload_folder,
            dtype=self.dtype,
            quantization=self.quantization,
            load_in_4bit=self.load_in_4bit,
            load_in_8bit=self.load_in_8bit,
            adapter=adapter,
            attn_implementation=self.attn_implementation,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            use_safetensors=self.use_safetensors,
            chat_template=self.chat_template,
        )


def _named(given: tuple[str, ...]) -> dict[str, str]:
    """Name -> directory; an adapter without a name has that of its folder.

    Raises: ConfigError for a name that is given twice.
    """
    found: dict[str, str] = {}
    for one in given:
        name, equals, place = one.partition("=")
        if not equals or Path(one).exists():
            name, place = Path(one).name, one
        if name in found:
            raise ConfigError(
                f"--adapter: {name!r} is the name of two; write NAME={place} with another name"
            )
        found[name] = place
    return found


def _devices(given: str | None) -> str | dict[str, str | int] | None:
    if given is None or not given.lstrip().startswith("{"):
        return given
    try:
        return json.loads(given)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"--device-map {given} is no JSON: {error}; write names and devices in double quotes"
        ) from None


def _amounts(given: str | None) -> dict[str, str] | None:
    if given is None:
        return None
    pairs = [pair.partition("=") for pair in given.split(",")]
    if wrong := next((name for name, equals, _ in pairs if not equals), None):
        raise ConfigError(
            f"--max-memory {given}: {wrong!r} has no amount; write it as 0=10GiB,cpu=30GiB"
        )
    return {name.strip(): amount.strip() for name, _, amount in pairs}
