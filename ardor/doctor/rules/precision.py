"""Rules about dtypes and quantized weights: what a machine or a cast would make of them."""

from typing import Any

import torch

from ardor.doctor.checkpoint import Checkpoint, Findings, Registry
from ardor.doctor.finding import Finding, listed, many
from ardor.errors import CheckpointError
from ardor.load import default_device
from ardor.precision import fast_bfloat16

SECTION = "quantization_config"
# Families whose activations pass 65504, the largest float16 (unsloth PR 5092, transformers#29555).
OVERFLOWING = ("gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_text")
CODES = (
    ".qweight",
    ".weight.quant_state.bitsandbytes__nf4",
    ".weight.quant_state.bitsandbytes__fp4",
)
CODES += (".SCB", ".weight_scales")
HEADS = ("lm_head", "embed_out", "output", "embed_tokens", "wte")


def bfloat16_hardware(it: Checkpoint) -> Findings:
    """The machine computes in the dtype of the weights. (Ardor never emulates bfloat16.)"""
    device, stored = default_device(), _stored(it)
    if stored == torch.bfloat16 and device.type == "cuda" and not fast_bfloat16(device):
        yield Finding(
            "W",
            "the weights are bfloat16, which this GPU cannot compute in",
            f"{torch.cuda.get_device_name(device)}: it would compute in float16, whose range is "
            "smaller",
            "load it with dtype float32 if outputs are NaN; train on another GPU",
        )


def float16_family(it: Checkpoint) -> Findings:
    """A model whose activations are too large for float16 is not stored for it."""
    kind = (it.config or {}).get("model_type")
    if kind in OVERFLOWING and _stored(it) == torch.float16:
        yield Finding(
            "W",
            f"{kind} in float16: its activations go beyond 65504, and become infinite",
            "weights in float16",
            "load it in bfloat16 or float32 (--dtype)",
        )


def head_quantized(it: Checkpoint) -> Findings:
    """The output head is not among the quantized weights.

    A warning and no error: it computes what its weights say, at more loss than elsewhere, and some
    quantize it on purpose. A skip list given to transformers replaces its own, with the head in it.
    """
    if it.files is None:
        return
    modules = {
        name.removesuffix(mark)
        for name in it.files.names()
        for mark in CODES
        if name.endswith(mark)
    }
    heads = sorted(module for module in modules if module.rpartition(".")[2] in HEADS)
    if heads:
        skipped = _section(it).get("llm_int8_skip_modules")
        yield Finding(
            "W",
            f"{listed(heads)} is quantized, which costs more than any other matrix",
            f"llm_int8_skip_modules={skipped}" if skipped is not None else "codes in its place",
            "quantize the original again with lm_head in the skip list",
        )


def packed_storage(it: Checkpoint) -> Findings:
    """Codes of quantized weights are stored as integers.

    As floating-point numbers some of their patterns are NaN, and any arithmetic or cast changes
    them. Ardor only views them.
    """
    codes = [s for s in it.statistics if s.name in it.packed and s.name.endswith(".weight")]
    if codes:
        nan, count = sum(s.nan for s in codes), sum(s.rows * s.shape[-1] for s in codes)
        yield Finding(
            "W",
            f"the codes of {many(len(codes), 'quantized weight')} are stored as "
            f"{str(codes[0].dtype).removeprefix('torch.')}",
            f"{nan:,} of {count:,} of them look like NaN; "
            f"bnb_4bit_quant_storage={_section(it).get('bnb_4bit_quant_storage')}",
            "never cast such a checkpoint; quantize with bnb_4bit_quant_storage uint8",
        )


def quantized_compute(it: Checkpoint) -> Findings:
    """A quantized model names the dtype to compute in, and keeps outliers out of 8 bits.

    For information: both only cost time or accuracy elsewhere.
    """
    section = _section(it)
    if section.get("load_in_4bit") and section.get("bnb_4bit_compute_dtype") == "float32":
        what = "bitsandbytes computes in float32 where no other dtype is named"
        evidence = "bnb_4bit_compute_dtype=float32"
        yield Finding("I", what, evidence, "name bfloat16 where speed counts (--dtype)")
    if section.get("load_in_8bit") and section.get("llm_int8_threshold") == 0.0:
        what = "no outlier of the activations is kept out of 8 bits"
        evidence = "llm_int8_threshold=0.0"
        yield Finding("I", what, evidence, "6.0 is what LLM.int8 was published with")


def _section(it: Checkpoint) -> dict[str, Any]:
    found = (it.config or {}).get(SECTION)
    return found if isinstance(found, dict) else {}


def _stored(it: Checkpoint) -> torch.dtype | None:
    """The dtype of the weights, by the first that is not packed."""
    if it.files is None or it.adapter:
        return None
    floats = (torch.float32, torch.float16, torch.bfloat16)
    plain = (name for name in it.files.names() if name not in it.packed)
    try:
        dtypes = (it.files.dtype(name) for name in plain)
        return next((dtype for dtype in dtypes if dtype in floats), None)
    except CheckpointError:  # a dtype that nobody reads: another rule names it
        return None


RULES: Registry = {
    "bfloat16-hardware": bfloat16_hardware,
    "float16-family": float16_family,
    "head-quantized": head_quantized,
    "packed-storage": packed_storage,
    "quantized-compute": quantized_compute,
}
