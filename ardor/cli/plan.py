"""`ardor plan MODEL`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ardor.cli.console import NARROW, print_json, results
from ardor.train.config import MasterDtype, Optim, Recompute

if TYPE_CHECKING:
    from ardor.memory.fit import Choice
    from ardor.plan import Plan

BAR = 24  # columns


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a model will take in memory, whether that fits, and the cheapest setting that does.

    Only config.json is read. Ends with 0 if it fits as asked, 1 if only with the changes that are
    named, 2 if in no way.
    """

    model: str
    """Hub id, directory, config.json, a preset or a spec file of `ardor train --model`."""
    purpose: Literal["generate", "finetune", "train"] = "finetune"
    """What for; --for is the same. train: from scratch."""
    method: Literal["full", "lora", "qlora"] = "lora"
    """Of fine-tuning."""
    lora_r: int = 16
    """Rank of the adapters, on all linear maps of the layers."""
    init_lora_weights: str = "default"
    """Where adapters begin, as in `finetune`: default, gaussian, orthogonal, pissa, pissa_niter_N,
    olora, eva or loftq."""
    use_dora: bool = False
    """Train a magnitude of each output beside the adapters (DoRA)."""
    kbit_upcast: Literal["norms", "peft", "none"] = "norms"
    """What of qlora's 16-bit weights is made float32, as in `finetune`."""
    optim: Optim = "adamw"
    """adamw, adamw_8bit, lion, lion_8bit, adafactor, muon, sgd or schedule_free_adamw."""
    master_dtype: MasterDtype = "float32"
    """Dtype of weights that are trained in full, their gradients and moments."""
    gradient_checkpointing: Recompute = "none"
    """Activations computed again instead of kept: none, selective or layers."""
    optimizer_in_backward: bool = False
    """Update each weight as soon as its gradient is there, and forget the gradient."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in the memory of the CPU."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16: as `generate` and `finetune` mean it."""
    quantization: str | None = None
    """nf4, nf4-dq, fp4, llm-int8, int8-g128 or int4-g128. Default: none; nf4 for qlora."""
    batch_size: int | None = None
    """Examples per micro-batch, or prompts side by side. Default: 8, or 1."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    max_length: int | None = None
    """Tokens of the longest example, or of the prompt. Default: 1024, or what the model reads."""
    max_new_tokens: int = 256
    """Tokens to generate beyond the prompt."""
    gpus: str | None = None
    """Plan for another machine: 2x24GiB, or none. Default: this machine's."""
    ram: str | None = None
    """Its memory: 128GiB. Default: this machine's."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    json: bool = False
    """Print one JSON document."""


def run(config: Config) -> int:
    from ardor.cli.config import narrowed  # later: help needs no torch
    from ardor.plan import Settings, make_plan

    plan = make_plan(config.model, narrowed(config, Settings))
    code = 0 if plan.asked.fits else 1 if plan.cheapest is not None else 2
    if config.json:
        print_json(_document(plan) | {"exit_code": code})
    else:
        _show(plan)
    return code


def _show(plan: Plan) -> None:
    from rich.table import Table

    from ardor.memory.fit import PLACES
    from ardor.memory.machine import shown
    from ardor.memory.shapes import count, parameters

    console, asked = results(), plan.asked
    peak = asked.estimate.peak
    number = count(parameters(plan.model.spec))
    console.print(
        f"{plan.model.source}: {number / 1e6:,.1f} M parameters; {plan.machine.summary()}"
    )
    console.print(f"as asked: {_described(asked)}")
    table = Table(box=None, padding=(0, 1), pad_edge=False, show_header=False)
    narrow = console.width < NARROW
    table.add_column("what", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("bar", no_wrap=True)
    if not narrow:
        table.add_column("why", overflow="fold")
    for term in peak.terms:
        bar = "#" * max(1, round(BAR * term.bytes / peak.bytes))
        why = () if narrow else (term.why,)
        table.add_row(term.name, shown(term.bytes), bar, *why)
    table.add_row("peak", shown(peak.bytes), f"during {peak.name}")
    console.print(table, soft_wrap=False)
    console.print(_verdict(asked))
    if plan.cheapest is None:
        console.print("nothing that ardor can do fits there; take a smaller model, or more memory")
        return
    if not asked.fits:
        needed = shown(plan.cheapest.needed)
        changes = " ".join(plan.cheapest.changes)
        where = PLACES[plan.cheapest.place]
        console.print(f"cheapest that fits: {changes} ({needed}, {where})")
    if plan.device_map is not None:
        console.print(f"device map: {_map(plan.device_map)}")
    if plan.most_rows is not None:
        now = plan.cheapest.use
        console.print(
            f"then at most: {plan.most_rows:,} x {now.length:,} tokens, "
            f"or {now.rows:,} x {plan.longest:,}"
        )


def _described(choice: Choice) -> str:
    use = choice.use
    held = use.quantization or use.weights
    size = f"{use.rows} x {use.length:,} tokens"
    if use.task == "generate":
        return f"generate from {size} + {use.new_tokens:,}, {held} weights"
    method = "training from scratch" if use.scratch else f"{use.method} fine-tuning"
    said = [f"{method}, micro-batches of {size}, {held} weights, computing in {use.compute}"]
    said += [f"adapters from {use.begun}"] if use.begun != "default" else []
    said += ["DoRA"] if use.dora else []
    said += [use.optim] if use.optim != "adamw" else []
    return ", ".join(said)


def _verdict(choice: Choice) -> str:
    from ardor.memory.fit import PLACES
    from ardor.memory.machine import USABLE, shown

    fits = "fits" if choice.fits else "does not fit"
    where = f"{shown(choice.needed)} of {shown(choice.there)}"
    return f"{fits} {PLACES[choice.place]}: {where} (up to {USABLE:.0%} may be used)"


def _map(device_map: dict[str, Any]) -> str:
    """A map in few words: runs of modules on one device."""
    runs: list[tuple[str, str, Any]] = []
    for name, device in device_map.items():
        if runs and runs[-1][2] == device:
            runs[-1] = (runs[-1][0], name, device)
        else:
            runs.append((name, name, device))
    return "; ".join(
        f"{first or 'all'} on {device}" if first == last else f"{first} to {last} on {device}"
        for first, last, device in runs
    )


def _document(plan: Plan) -> dict[str, Any]:
    from dataclasses import asdict

    def choice(found: Choice | None) -> dict[str, Any] | None:
        if found is None:
            return None
        use = {k: v for k, v in asdict(found.use).items() if k != "adapted"}
        return {
            "fits": found.fits,
            "place": found.place,
            "bytes": found.needed,
            "memory": found.there,
            "changes": list(found.changes),
            "peak": found.estimate.peak.name,
            "terms": {term.name: term.bytes for term in found.estimate.peak.terms},
            "use": use,
        }

    return {
        "model": plan.model.source,
        "machine": asdict(plan.machine),
        "asked": choice(plan.asked),
        "cheapest": choice(plan.cheapest),
        "largest_batch": plan.most_rows,
        "longest": plan.longest,
        "device_map": plan.device_map,
    }
