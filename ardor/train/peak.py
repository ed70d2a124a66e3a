"""The memory that a run will take, by the arithmetic of `memory`, and what it took."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ardor.adapters.kbit import Upcast
from ardor.adapters.lora import LoraLinear, lora_modules
from ardor.arch import spec as specs
from ardor.arch.causal import CausalLM
from ardor.data.batches import BatchPlan
from ardor.data.dataset import Dataset
from ardor.errors import ArdorError
from ardor.load import CONFIG, Model
from ardor.memory.estimate import PROCESS, Use
from ardor.memory.fit import Choice, expected
from ardor.memory.formats import counted
from ardor.memory.machine import Machine, forget_peak, peak_resident, this_machine
from ardor.memory.products import bound_products
from ardor.outline import beside, originals, outline, outline_of
from ardor.precision import training_compute
from ardor.quant.formats import format_name
from ardor.train.config import Finetune, Optimisation
from ardor.train.evaluate import TOKENS
from ardor.train.optim import trainable
from ardor.train.preference import WITHOUT_REFERENCE


def check_finetune(config: Finetune, device: torch.device) -> None:
    """Refuse a model before it is loaded if one example of one token cannot be trained on.

    What is not read here (another family, no such model) is for `load` to tell.

    Raises: ConfigError with the numbers and what would fit.
    """
    try:
        found = outline(config.model, config.revision)
    except ArdorError:
        return
    if found.opaque or found.quantization is not None or Path(config.quantization).suffix:
        return  # packed already, or as a YAML file says
    full = config.method == "full"
    compute = _name(training_compute(config.dtype, device).compute)
    use = Use(
        task="train",
        method=config.method,
        weights=config.master_dtype if full else compute,
        compute=compute,
        quantization=format_name(config.quantization) if config.method == "qlora" else None,
        upcast=_upcast(config),
        **_updates(config),
        length=1,
        rank=config.lora_r,
        begun=_begun(config),
        originals=originals(found, _begun(config)),
        dora=config.use_dora,
    )
    expected(found.spec, use, _machine(device), f"{config.method} fine-tuning of {config.model}")


def check_scratch(spec: specs.Decoder, config: Optimisation, device: torch.device) -> None:
    """The same of a model that is made anew, before its data are read.

    Raises: ConfigError with the numbers.
    """
    compute = _name(training_compute(config.dtype, device).compute)
    use = Use(
        task="train",
        scratch=True,
        weights=config.master_dtype,
        compute=compute,
        length=1,
        **_updates(config),
    )
    expected(spec, use, _machine(device), "training this model from scratch")


def predicted(
    model: Model, plan: BatchPlan, heldout: Dataset | None, config: Optimisation
) -> Choice | None:
    """What the run will take, from its own batches; None for a model run by transformers,
    or packed in a format whose bytes are not known here.

    Raises: ConfigError if it surely does not fit, with what would.
    """
    spec = model.decoder.facts
    packed = model.quantization
    if not isinstance(spec, specs.Decoder) or (packed is not None and not counted(packed)):
        return None
    compute = _name(model.decoder.compute)
    full, accumulation = model.adapter is None, config.gradient_accumulation_steps
    steps = None if config.max_steps is None else config.max_steps * accumulation
    method = "full" if full else "lora" if model.quantization is None else "qlora"
    file = outline_of(model.config, Path(CONFIG))
    use = Use(
        task="train",
        method=method,
        weights=config.master_dtype if full else compute,
        compute=compute,
        quantization=model.quantization,
        upcast=_upcast(config),
        accumulation=accumulation,
        **_updates(config),
        rank=1 if model.adapter is None else model.adapter.r,
        **trains(model.decoder),
        **_passes(plan, heldout, config),
        originals=originals(file, _begun(config)),
        scratch=full,
        beside=beside(file, config.master_dtype if full else compute, method),
        **_largest_batch(plan, steps, config),
    )
    return expected(spec, use, _machine(model.decoder.device), "this run")


def _updates(config: Optimisation) -> dict[str, Any]:
    return {
        "optim": config.optim,
        "momentum": config.optim == "sgd" and config.sgd_momentum > 0,
        "recompute": config.gradient_checkpointing,
        "in_backward": config.optimizer_in_backward,
        "offloaded": config.offload_optimizer,
    }


def _begun(config: Optimisation) -> str:
    """What adapters begin with."""
    if not isinstance(config, Finetune) or config.method == "full":
        return "default"
    return config.init_lora_weights


def _upcast(config: Optimisation) -> Upcast:
    """Of what is not packed; adapters on a checkpoint that is packed already leave it alone."""
    if not isinstance(config, Finetune) or config.method != "qlora":
        return "none"
    return config.kbit_upcast


def begin_measuring() -> int:
    """Let `measured` speak of the run that begins now; the bytes that are there before it.

    That is what the process holds beyond what one that only trains would: another model, or memory
    that an earlier run gave back and the allocator keeps. Where the system does not let a peak be
    forgotten, it is the earlier peak.
    """
    bound_products()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_reserved()
    forget_peak()
    return max(0, (peak_resident() or 0) - PROCESS["train"])


def measured(device: torch.device) -> int | None:
    """The most bytes that this process has held since, of the kind that was predicted."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return peak_resident()


def _sizes(plan: BatchPlan, steps: int | None = None) -> list[int]:
    """Tokens of the micro-batches of the first epoch, or of its first `steps`."""
    lengths = plan.dataset.lengths
    return [int(lengths[list(members)].sum()) for members in plan.epoch(0)[:steps]]


def _largest_batch(plan: BatchPlan, steps: int | None, config: Optimisation) -> dict[str, Any]:
    """The micro-batch of the first epoch that has the most tokens, and how many sizes there are."""
    sizes = _sizes(plan, steps)
    found = plan.batch(plan.epoch(0)[int(np.argmax(sizes))]).lengths
    if isinstance(config, Finetune) and config.objective == "kto":
        found = found[::2]  # the others, answers to other prompts, are read without a gradient
    read = round(len(_sizes(plan)) * config.num_train_epochs) if steps is None else steps
    alike = len({*plan.dataset.lengths.tolist()}) == 1
    different = {"batch_sizes": len({*sizes}), "batches": 1 if alike else max(1, read)}
    if len({*found}) == 1:
        return {"rows": len(found), "length": found[0], **different}
    return {"rows": 1, "length": sum(found), "ragged": True, **different}


def trains(decoder: CausalLM) -> dict[str, Any]:
    """What the optimizer changes, and what adapters hold beside it."""
    adapters = dict(lora_modules(decoder))
    linears = [one for one in adapters.values() if isinstance(one, LoraLinear)]
    return {
        "trained": {name: tuple(p.shape) for name, p in trainable(decoder).items()},
        "ranks": {name: one.r for name, one in adapters.items()},
        "offset": any(one.offset_A is not None for one in adapters.values()),
        "dora": any(one.lora_magnitude_vector is not None for one in linears),
    }


def _passes(plan: BatchPlan, heldout: Dataset | None, config: Optimisation) -> dict[str, Any]:
    """How adapters begin, and tokens of the largest passes that nothing is learnt from."""
    found: dict[str, Any] = {
        "evaluated": 0 if heldout is None else min(TOKENS, int(heldout.lengths.sum()))
    }
    if not isinstance(config, Finetune):
        return found
    most = max(_sizes(plan))
    if config.method != "full":
        found["begun"] = _begun(config)
        found["surveyed"] = most if config.init_lora_weights == "eva" else 0
    if config.objective not in ("sft", *WITHOUT_REFERENCE):
        early = config.precompute_ref_log_probs
        found["reference"] = min(TOKENS, int(plan.dataset.lengths.sum())) if early else most
    return found


def _machine(device: torch.device) -> Machine:
    machine = this_machine()
    return machine if device.type == "cuda" else replace(machine, gpus=())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
