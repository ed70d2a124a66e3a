"""Flags that say how a model is loaded: the same for every verb that uses one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ardor.cli.console import remarks

if TYPE_CHECKING:
    from ardor.lm import LM


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """How to hold the model."""

    device_map: str | None = None
    """cpu, or a GPU such as cuda:0. Default: the GPU where there is one."""
    dtype: str = "auto"
    """auto (as stored), float32, bfloat16 or float16."""
    quantization: str | None = None
    """nf4, nf4-dq, fp4, int8 (LLM.int8), int8-g128, int4-g128 (and -g64, -g32), none, or a YAML
    file of BitsAndBytesConfig's settings. Default: as stored, or as the run was trained."""
    load_in_4bit: bool = False
    """The same as --quantization nf4."""
    load_in_8bit: bool = False
    """The same as --quantization int8."""
    adapter: str | None = None
    """A PEFT adapter directory to put on the model."""
    attn_implementation: str | None = None
    """sdpa, eager (the reference), flex or flash_attention_2. Default: sdpa."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Let transformers run a model that Ardor does not know, and code from its repository if it
    names some. What will run is said first."""
    use_safetensors: bool = True
    """Weights from safetensors; --no-use-safetensors: from pickles (.bin), tensors alone."""

    def load(self, name: str) -> LM:
        """The model, with one line on stderr that says how it is held."""
        from ardor.lm import load  # later: help needs no torch
        from ardor.load import default_device

        lm = load(
            name,
            device_map=self.device_map or str(default_device()),
            dtype=self.dtype,
            quantization=self.quantization,
            load_in_4bit=self.load_in_4bit,
            load_in_8bit=self.load_in_8bit,
            adapter=self.adapter,
            attn_implementation=self.attn_implementation,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            use_safetensors=self.use_safetensors,
        )
        model = lm.model
        held = model.quantization or str(model.precision.weights).removeprefix("torch.")
        compute = str(model.precision.compute).removeprefix("torch.")
        text = f"{name}: {held}, computing in {compute} on {model.decoder.device}"
        remarks().print(text if model.adapter is None else f"{text}, adapter on {model.source}")
        return lm
