"""The one training loop. Pre-training, SFT, LoRA and QLoRA differ in data and trainable set only.

A step: micro-batches of whole documents -> summed nats -> one division by all their targets ->
clipped AdamW. The loop is a generator of events; who draws them is not its concern.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ardor.arch.causal import CausalLM
from ardor.arch.experts import Routing, load_balance
from ardor.data.batches import Batch, BatchPlan
from ardor.errors import ArdorError, CheckpointError, ConfigError
from ardor.files.runs import METRICS, newest_checkpoint
from ardor.loss import IGNORE, LossSum
from ardor.score import document_loss
from ardor.train.checkpoint import Progress, read_checkpoint, write_checkpoint
from ardor.train.config import Optimisation
from ardor.train.metrics import Metrics
from ardor.train.optim import adamw, optimizer_state, restore_optimizer, trainable
from ardor.train.schedule import rate_share

RNG = "rng"  # the first part of the names of the generators' states

# What may change between a run and its resumption without changing a single number of it. The
# content of the training data is compared, so its place may change.
_FREE = frozenset(
    {"output", "resume", "json", "data", "eval_data", "eval_on_start", "eval_steps", "save_steps"}
    | {"save_total_limit", "logging_steps", "sample_prompts", "stop_rate_samples", "allow"}
    # What these make of the data is in its fingerprint.
    | {"over_length", "preferences", "streaming", "cache"}
)

Event = Mapping[str, Any]
"""A line of metrics.jsonl: its "kind" is train | eval | sample | checkpoint | memory, and "step"
counts the steps that are done."""


@dataclass(frozen=True)
class Hooks:
    """What the loop calls but does not know: how weights are saved, and what evaluation means."""

    save_weights: Callable[[Path], None]
    evaluate: Callable[[], list[dict[str, Any]]] | None = None


class Diverged(ArdorError):
    """The loss or its gradient is not a finite number."""


class Trainer:
    """A run in a folder. Build it, then iterate `events()` to the end."""

    def __init__(
        self, decoder: CausalLM, plan: BatchPlan, config: Optimisation, run: Path, hooks: Hooks
    ):
        if config.learning_rate is None or config.gradient_accumulation_steps < 1:
            raise ConfigError("a run needs a learning_rate and gradient_accumulation_steps >= 1")
        self.decoder, self.plan, self.config, self.run, self.hooks = (
            decoder,
            plan,
            config,
            run,
            hooks,
        )
        self.parameters = trainable(decoder)
        self.optimizer = adamw(
            self.parameters,
            learning_rate=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            epsilon=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        self.steps = self._count_steps()
        self.progress = Progress(0, 0, 0, 0, 0, 0, plan.fingerprint, self._settings())
        self.stop_requested = False  # set from a signal handler: stop after the current step

    def _settings(self) -> dict[str, Any]:
        """As JSON gives them back, so that what a checkpoint holds can be compared."""
        kept = {k: v for k, v in asdict(self.config).items() if k not in _FREE}
        return json.loads(json.dumps(kept, default=str))

    def _count_steps(self) -> int:
        if self.config.max_steps is not None:
            return self.config.max_steps
        steps, left, epoch = 0, self.config.num_train_epochs, 0
        while left > 0:
            whole = math.ceil(len(self.plan.epoch(epoch)) / self.config.gradient_accumulation_steps)
            steps += math.ceil(whole * min(1.0, left) - 1e-9)  # 1.1 - 1 is above 0.1
            left, epoch = left - 1, epoch + 1
        return steps

    def resume(self) -> bool:
        """Take up the newest checkpoint of the run, if there is one, exactly where it stood.

        The decoder must hold that checkpoint's weights already.

        Raises: CheckpointError if it was written from other data or with other settings.
        """
        directory = newest_checkpoint(self.run)
        if directory is None:
            return False
        progress, tensors = read_checkpoint(directory)
        mine = self.progress
        if changed := _differences(progress.settings, mine.settings):
            raise CheckpointError(
                f"{directory} was written with other settings ({changed}); resume with those, "
                "or choose another output folder"
            )
        if progress.dataset != mine.dataset:
            raise CheckpointError(
                f"{directory} was trained on other data; resume with the data the run began with, "
                "or choose another output folder"
            )
        _restore_rng(tensors, self.decoder.device)
        restore_optimizer(self.optimizer, self.parameters, tensors.items())
        self.progress = progress
        return True

    def events(self) -> Iterator[Event]:
        """Train to the end, or to the step after `stop_requested`; yields as things happen.

        The last step that was done is always in a checkpoint.

        Raises: Diverged; CheckpointError if the disk is full. Earlier checkpoints stay.
        """
        config, every = self.config, math.ceil(self.steps / 10)
        evaluate_every = config.eval_steps or every
        save_every = config.save_steps or evaluate_every
        metrics = Metrics(self.run / METRICS, keep_bytes=self.progress.metrics_bytes)
        windows = self._windows()
        saved = self.progress.step
        if config.eval_on_start and self.progress.step == 0:
            yield from self._evaluate(metrics)
        while self.progress.step < self.steps and not self.stop_requested:
            event = self._step(*next(windows))
            step = self.progress.step
            if step % config.logging_steps == 0 or step == self.steps:
                metrics.append(dict(event))
            yield event
            if step % evaluate_every == 0 or step == self.steps:
                yield from self._evaluate(metrics)
            if step % save_every == 0 or step == self.steps:
                yield self._save(metrics.bytes)
                saved = step
        # The request may come at any moment, so only here it is known what is not saved yet.
        if self.progress.step > saved:
            yield self._save(metrics.bytes)

    def _evaluate(self, metrics: Metrics) -> Iterator[Event]:
        for found in self.hooks.evaluate() if self.hooks.evaluate else ():
            row = {"step": self.progress.step, **found}
            metrics.append(row)
            yield row

    def _save(self, metrics_bytes: int) -> Event:
        broken = [name for name, p in self.parameters.items() if not p.isfinite().all()]
        if broken:
            raise self._diverged(f"{broken[0]} is not finite after step {self.progress.step}")
        self.progress = replace(self.progress, metrics_bytes=metrics_bytes)
        tensors = optimizer_state(self.optimizer, self.parameters)
        path = write_checkpoint(
            self.run,
            self.progress,
            tensors | _rng(self.decoder.device),
            self.hooks.save_weights,
            keep=self.config.save_total_limit,
        )
        return {"step": self.progress.step, "kind": "checkpoint", "path": str(path)}

    def _windows(self) -> Iterator[tuple[list[Batch], int, int]]:
        """The micro-batches of each step, and where the next one starts. The last of an epoch may
        be short: it is divided by its own targets, so nothing needs to be made up."""
        epoch, index = self.progress.epoch, self.progress.index
        while True:
            batches = iter(self.plan.epoch(epoch)[index:])
            while window := list(islice(batches, self.config.gradient_accumulation_steps)):
                index += len(window)
                yield [self.plan.batch(members) for members in window], epoch, index
            epoch, index = epoch + 1, 0

    def _step(self, batches: list[Batch], epoch: int, index: int) -> Event:
        began = time.perf_counter()
        rate = self._set_rate()
        self.decoder.train()
        targets = sum(int((batch.targets != IGNORE).sum()) for batch in batches)
        nats = 0.0
        for batch in batches:
            routings: list[Routing] = []
            loss = document_loss(self.decoder, batch, routings)
            (self._minimised(loss, routings) / targets).backward()
            nats += float(loss.nats.detach())
        norm = self._clip()
        if not math.isfinite(nats) or not math.isfinite(norm):
            raise self._diverged(
                f"the loss ({nats / targets:.4g}) or its gradient (norm {norm:.4g}) is not finite "
                f"at step {self.progress.step + 1}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        tokens = sum(batch.tokens.numel() for batch in batches)
        seconds = time.perf_counter() - began
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            epoch=epoch,
            index=index,
            seen_tokens=self.progress.seen_tokens + tokens,
            seen_targets=self.progress.seen_targets + targets,
        )
        return {
            "step": self.progress.step,
            "kind": "train",
            "epoch": epoch,
            "loss": nats / targets,
            "learning_rate": rate,
            "grad_norm": norm,
            "targets": targets,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
        }

    def _minimised(self, loss: LossSum, routings: list[Routing]) -> Tensor:
        """The nats, and per target what an uneven choice of experts costs; only nats are told."""
        share = self.decoder.facts.balance
        if share == 0.0 or not routings:
            return loss.nats
        return loss.nats + share * load_balance(routings) * loss.targets

    def _diverged(self, what: str) -> Diverged:
        newest = newest_checkpoint(self.run)
        kept = "no checkpoint was written yet" if newest is None else f"{newest} is whole"
        return Diverged(
            f"{what}; {kept}; begin a new run with a lower learning_rate, or with dtype float32"
        )

    def _set_rate(self) -> float:
        config = self.config
        warmup = config.warmup_steps
        if warmup is None:
            warmup = round(config.warmup_ratio * self.steps)
        assert config.learning_rate is not None
        rate = config.learning_rate * rate_share(
            self.progress.step,
            steps=self.steps,
            warmup=warmup,
            kind=config.lr_scheduler_type,
            min_share=config.min_lr_ratio,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _clip(self) -> float:
        """The global gradient norm before clipping."""
        gradients: list[Tensor] = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(
                self.parameters.values(), self.config.max_grad_norm, norm
            )
        return float(norm)


def _rng(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that dropout draws from."""
    states = {f"{RNG}|cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states[f"{RNG}|cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_rng(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Inverse of `_rng`; takes the states out of `tensors`.

    Raises: CheckpointError if they are those of another kind of device.
    """
    states = {name: tensors.pop(name) for name in [*tensors] if name.startswith(f"{RNG}|")}
    if states.keys() != _rng(device).keys():
        raise CheckpointError(
            f"the checkpoint has random states {sorted(states)}, not those of a run on "
            f"{device.type}; resume on the kind of device it was begun on"
        )
    torch.set_rng_state(states[f"{RNG}|cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[f"{RNG}|cuda"], device)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    return ", ".join(f"{k}: {old.get(k)}, now {new.get(k)}" for k in changed)
