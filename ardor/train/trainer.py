"""The one training loop. Pre-training, SFT, LoRA and QLoRA differ in data and trainable set only.

A step: micro-batches of whole documents -> summed nats -> one division by all their targets ->
a clipped update. The loop is a generator of events; who draws them is not its concern.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ardor.arch.causal import CausalLM
from ardor.arch.experts import Routing, load_balance
from ardor.data.batches import Batch, BatchPlan
from ardor.errors import ArdorError, CheckpointError, ConfigError
from ardor.files.atomic import write_atomic
from ardor.files.runs import BEST, METRICS
from ardor.loss import IGNORE, LossSum
from ardor.score import document_loss
from ardor.text.tokenizer import Tokenizer
from ardor.train import randomness, watchdog
from ardor.train.checkpoint import Progress, read_checkpoint, write_checkpoint
from ardor.train.compiled import compile_parts
from ardor.train.config import Optimisation
from ardor.train.groups import rate_shares
from ardor.train.metrics import Metrics
from ardor.train.noise import Noise
from ardor.train.optim import Optimizer, trainable
from ardor.train.peak import measured
from ardor.train.ranks import ALONE, Ranks
from ardor.train.recompute import recompute
from ardor.train.schedule import rate_share
from ardor.train.tally import Tally
from ardor.train.throughput import counter, device_peak
from ardor.train.trackers import Log
from ardor.train.watchdog import Diverged

__all__ = ["Diverged", "Event", "Hooks", "Trainer"]

# What may change between a run and its resumption without changing a single number of it. The
# content of the training data is compared, so its place may change.
_FREE = frozenset(
    {"output", "resume", "json", "data", "eval_data", "eval_on_start", "eval_steps", "save_steps"}
    | {"save_total_limit", "logging_steps", "sample_prompts", "sample_tokens", "stop_rate_samples"}
    | {"report_to", "max_loss_zscore", "peak_tflops", "load_best_model_at_end"}
    | {"early_stopping_patience", "early_stopping_threshold", "offload_optimizer", "allow"}
    # What these make of the data is in its fingerprint.
    | {"over_length", "preferences", "streaming", "cache"}
)

Event = Mapping[str, Any]
"""A line of metrics.jsonl: its "kind" is train | eval | sample | checkpoint | memory | note, and
"step" counts the steps that are done. Checkpoints and notes are told, not written."""


@dataclass(frozen=True)
class Hooks:
    """What the loop calls but does not know: how weights are saved, and what evaluation means."""

    save_weights: Callable[[Path], None]
    evaluate: Callable[[], list[dict[str, Any]]] | None = None
    tokenizer: Tokenizer | None = None  # to show what a batch said
    names: Mapping[str, str] = field(default_factory=dict)  # of parameters, in the checkpoint


@runtime_checkable
class Objective(Protocol):
    """What a run minimises: sums over a step's micro-batches, divided once by what `begin` says."""

    in_nats: bool  # per token: then a loss can be compared with that of guessing

    def begin(self, decoder: CausalLM, batches: list[Batch]) -> int:
        """Called before each step with all of its micro-batches; how many things they hold."""
        ...

    def loss(self, decoder: CausalLM, batch: Batch, routings: list[Routing] | None) -> LossSum: ...

    @property
    def tally(self) -> Tally:
        """What else is reported of the losses since `begin`."""
        ...


class NextToken:
    """Nats per target: pre-training and supervised fine-tuning."""

    in_nats = True
    tally = Tally()

    def __init__(self) -> None:
        self._targets = 1

    def begin(self, decoder: CausalLM, batches: list[Batch]) -> int:
        self._targets = sum(int((batch.targets != IGNORE).sum()) for batch in batches)
        return self._targets

    def loss(self, decoder: CausalLM, batch: Batch, routings: list[Routing] | None) -> LossSum:
        return document_loss(decoder, batch, routings, share=1 / self._targets)


class Trainer:
    """A run in a folder. Build it, then iterate `events()` to the end."""

    def __init__(
        self,
        decoder: CausalLM,
        plan: BatchPlan,
        config: Optimisation,
        run: Path,
        hooks: Hooks,
        ranks: Ranks = ALONE,
        objective: Objective | None = None,
    ):
        if config.learning_rate is None or config.gradient_accumulation_steps < 1:
            raise ConfigError("a run needs a learning_rate and gradient_accumulation_steps >= 1")
        if config.optimizer_in_backward and ranks.count > 1:
            raise ConfigError("optimizer_in_backward is for one process; leave it out")
        if config.gradient_accumulation_steps < ranks.count:
            raise ConfigError(
                f"{ranks.count} processes share the micro-batches of a step, and "
                f"gradient_accumulation_steps={config.gradient_accumulation_steps} counts those of "
                f"all; give {ranks.count} or more"
            )
        self.decoder, self.plan, self.config, self.run = decoder, plan, config, run
        self.hooks, self.ranks, self.objective = hooks, ranks, objective or NextToken()
        self.parameters = trainable(decoder)
        self.optimizer = Optimizer(
            self.parameters,
            config,
            rate_shares(self.parameters, config, hooks.names),
            home=torch.device("cpu") if config.offload_optimizer else None,
        )
        recompute(decoder, config.gradient_checkpointing)
        if config.torch_compile:
            compile_parts(decoder)
        alpha = config.neftune_noise_alpha
        self.noise = Noise(decoder, alpha) if alpha > 0 else None
        self.steps = self._count_steps()
        self.progress = Progress(0, 0, 0, 0, 0, 0, plan.fingerprint, self._settings())
        self.stop_requested = False  # set from a signal handler: stop after the current step
        self._count_flops = counter(decoder)
        self._peak: float | None = None  # FLOP/s of the device; 0.0: not known
        self._fresh = True  # no step was done by this process
        self._note: str | None = None  # what the last step found, for people
        self._lost_best: str | None = None  # what resuming found, for people

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

    @property
    def stopped_early(self) -> bool:
        """Whether evaluations were no better than the best for long enough."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.progress.misses >= patience

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.steps or self.stopped_early

    def resume(self, directory: Path) -> None:
        """Take up a checkpoint of the run exactly where it stood; the decoder has its weights.

        Raises: CheckpointError if it was written from other data or with other settings.
        """
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
        randomness.restore(tensors, self.decoder.device, self.ranks)
        self.optimizer.restore(tensors)
        self.progress = progress
        if not self.finished:
            self._forget_lost_best()

    def _forget_lost_best(self) -> None:
        """Judge afresh if the best checkpoint is asked for, and somebody has removed it."""
        best = self._kept_step()
        if best is not None and not self._checkpoint(best).exists():
            self.progress = replace(self.progress, best_step=None, best_loss=None, misses=0)
            self._lost_best = (
                f"the best checkpoint so far was that of step {best}, which is not there; the best "
                "of those to come will stand for the run"
            )

    def events(self, logs: Sequence[Log] = ()) -> Iterator[Event]:
        """Train to the end, or to the step after `stop_requested`; yields as things happen.

        The last step that was done is always in a checkpoint. `logs` get each row of metrics too.

        Raises: Diverged; CheckpointError if the disk is full. Earlier checkpoints stay.
        """
        config, every = self.config, math.ceil(self.steps / 10)
        evaluate_every = config.eval_steps or every
        save_every = config.save_steps or evaluate_every
        if self.finished:
            self._conclude()
            return
        if self._lost_best is not None:
            yield {"step": self.progress.step, "kind": "note", "text": self._lost_best}
        metrics = self._open_metrics(logs)
        windows = self._windows()
        saved = self.progress.step
        if config.eval_on_start and self.progress.step == 0:
            yield from self._evaluate(metrics)
        while not self.finished and not self.ranks.any(self.stop_requested):
            event = self._step(*next(windows))
            step = self.progress.step
            last = step == self.steps
            if step % config.logging_steps == 0 or last:
                metrics.append(dict(event))
            yield event
            if self._note is not None:
                yield {"step": step, "kind": "note", "text": self._note}
            best = self.progress.best_step
            if step % evaluate_every == 0 or last:
                yield from self._evaluate(metrics)
            better = config.load_best_model_at_end and self.progress.best_step != best
            if step % save_every == 0 or better or self.finished:
                yield self._save(metrics.settle())
                saved = step
        # The request may come at any moment, so only here it is known what is not saved yet.
        if self.progress.step > saved:
            yield self._save(metrics.settle())
        if self.finished:
            self._conclude()

    def _open_metrics(self, logs: Sequence[Log]) -> Metrics:
        if not self.ranks.first:
            return Metrics(None)
        # Whoever reads the folder meanwhile wants the newest; it has no best one before its end.
        (self.run / BEST).unlink(missing_ok=True)
        return Metrics(self.run / METRICS, keep_bytes=self.progress.metrics_bytes, logs=logs)

    def _evaluate(self, metrics: Metrics) -> Iterator[Event]:
        """Every process computes the same, so all know whether it is better."""
        with self.optimizer.evaluated_weights():
            found = self.hooks.evaluate() if self.hooks.evaluate else []
        for row in ({"step": self.progress.step, **one} for one in found):
            metrics.append(row)
            if row["kind"] == "eval" and row["step"] > 0:
                self._judge(row["loss"])
            yield row

    def _judge(self, loss: float) -> None:
        best, threshold = self.progress.best_loss, self.config.early_stopping_threshold
        if best is None or loss < best - threshold:
            step = self.progress.step
            self.progress = replace(self.progress, best_step=step, best_loss=loss, misses=0)
        else:
            self.progress = replace(self.progress, misses=self.progress.misses + 1)

    def _conclude(self) -> None:
        best = self._kept_step()
        if best is not None and self.ranks.first and self._checkpoint(best).exists():
            row = {"checkpoint": f"checkpoint-{best}", "loss": self.progress.best_loss}
            write_atomic(self.run / BEST, json.dumps(row) + "\n")

    def _save(self, metrics_bytes: int) -> Event:
        broken = [name for name, p in self.parameters.items() if not p.isfinite().all()]
        if broken:
            raise self._diverged(f"{broken[0]} is not finite after step {self.progress.step}")
        self.progress = replace(self.progress, metrics_bytes=metrics_bytes)
        tensors = self.optimizer.state() | randomness.states(self.decoder.device, self.ranks)
        if self.ranks.first:
            with self.optimizer.evaluated_weights():
                write_checkpoint(
                    self.run,
                    self.progress,
                    tensors,
                    self.hooks.save_weights,
                    keep=self.config.save_total_limit,
                    best=self._kept_step(),
                )
        self.ranks.wait()
        path = self._checkpoint(self.progress.step)
        return {"step": self.progress.step, "kind": "checkpoint", "path": str(path)}

    def _checkpoint(self, step: int) -> Path:
        return self.run / f"checkpoint-{step}"

    def _kept_step(self) -> int | None:
        return self.progress.best_step if self.config.load_best_model_at_end else None

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
        count = self.objective.begin(self.decoder, batches)
        loss = self._backward(batches, count) / count
        norm = self._clip()
        self._check(loss, norm, batches)
        self._note = self._without_gradient() if self._fresh else None
        self._fresh = False
        self.optimizer.step()
        self.optimizer.zero_grad()
        tokens = sum(batch.tokens.numel() for batch in batches)
        seconds = time.perf_counter() - began
        before = self.progress
        self.progress = replace(
            before,
            step=before.step + 1,
            epoch=epoch,
            index=index,
            seen_tokens=before.seen_tokens + tokens,
            seen_targets=before.seen_targets + targets,
            recent=watchdog.kept(before.recent, loss),
            first_loss=loss if before.first_loss is None else before.first_loss,
        )
        return {
            "step": self.progress.step,
            "kind": "train",
            "epoch": epoch,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "targets": targets,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            **self.objective.tally.means(self.ranks.sum),
            **self._utilisation(batches, seconds),
        }

    def _backward(self, batches: list[Batch], count: int) -> float:
        """Gradients of the mean over all targets (or pairs) of the step; its summed loss."""
        nats = 0.0
        for batch in self.ranks.share(batches):
            routings: list[Routing] = []
            if self.noise is not None:
                self.noise.lengths = batch.lengths
            loss = self.objective.loss(self.decoder, batch, routings)
            (self._minimised(loss, routings) / count).backward()
            nats += float(loss.nats.detach())
        self.ranks.sum_gradients(self.parameters.values())
        return self.ranks.sum(nats)

    def _check(self, loss: float, norm: float, batches: list[Batch]) -> None:
        """Raise before the update if this step is none that a run should take."""
        step, before = self.progress.step + 1, self.progress
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise self._diverged(
                f"the loss ({loss:.4g}) or its gradient (norm {norm:.4g}) is not finite "
                f"at step {step}",
                batches,
            )
        if norm == 0.0:
            raise self._nothing_learnt(loss, batches)
        if not self.objective.in_nats:  # single batches of pairs say little
            return
        vocab = self.decoder.facts.vocab
        if watchdog.diverging(loss, before.recent, before.first_loss, vocab):
            raise self._diverged(
                f"the loss is {loss:.4g} nats at step {step}, after {before.first_loss:.4g} at the "
                f"first, and guessing among {vocab:,} tokens costs {math.log(vocab):.4g}: "
                f"learning_rate={self.config.learning_rate:g} is too high",
                batches,
            )
        most, score = self.config.max_loss_zscore, watchdog.spike(loss, before.recent)
        if 0 < most < score:
            raise self._diverged(
                f"the loss jumped to {loss:.4g} nats at step {step}, {score:.0f} robust standard "
                f"deviations above the last {len(before.recent)}, where max_loss_zscore={most:g}",
                batches,
                remedy="look at its rows; to take the step all the same, resume with "
                "--max-loss-zscore 0",
            )

    def _nothing_learnt(self, loss: float, batches: list[Batch]) -> ArdorError:
        """Why every gradient of this step is zero."""
        step = self.progress.step + 1
        if step == 1:
            return ConfigError(
                f"all gradients are zero at step {step}, so nothing would be learnt: what is "
                f"trained ({', '.join([*self.parameters][:3])}, ...) has no part in the loss; look "
                "at freeze, train_only and target_modules"
            )
        first, rate = self.progress.first_loss, self.config.learning_rate
        what = f"all gradients are zero at step {step}, and those before were not: "
        if loss == 0.0:
            return self._diverged(
                f"{what}the loss is exactly 0, so there is nothing left to learn",
                batches,
                remedy="use the checkpoint, or begin a new run with fewer steps or a lower "
                "learning_rate",
            )
        return self._diverged(
            f"{what}the loss is {loss:.4g}, after {first:.4g} at the first step; learning_rate="
            f"{rate:g} is too high and has driven the weights to where nothing moves the loss",
            batches,
        )

    def _minimised(self, loss: LossSum, routings: list[Routing]) -> Tensor:
        """The nats, and per target what an uneven choice of experts costs; only nats are told."""
        share = self.decoder.facts.balance
        if share == 0.0 or not routings:
            return loss.nats
        return loss.nats + share * load_balance(routings) * loss.targets

    def _diverged(
        self,
        what: str,
        batches: list[Batch] | None = None,
        remedy: str | None = None,
    ) -> Diverged:
        if remedy is None:
            remedy = "begin a new run with a lower learning_rate"
            if self.decoder.compute != torch.float32:
                remedy += ", or with dtype float32"
        saved = None
        if batches is not None and self.ranks.first:
            step = self.progress.step + 1
            shown = self.hooks.tokenizer
            saved = watchdog.save_batch(self.run, step, batches, self.plan, self.decoder, shown)
        return watchdog.explained(self.run, what, remedy, saved)

    def _without_gradient(self) -> str | None:
        """For people: what is to be trained and had no part in the first step."""
        if self.optimizer.in_backward:
            return None
        missing = [name for name, p in self.parameters.items() if p.grad is None]
        if not missing:
            return None
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        return f"no gradient reached {', '.join(missing[:3])}{more} in the first step"

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
            decay=round(config.lr_decay_ratio * self.steps),
            power=config.lr_power,
        )
        self.optimizer.set_rate(rate)
        return rate

    def _clip(self) -> float:
        """The global gradient norm before clipping; float32 also where gradients are not."""
        if self.optimizer.in_backward:
            return self.optimizer.norm_in_backward()
        gradients: list[Tensor] = [p.grad for p in self.parameters.values() if p.grad is not None]
        if any(g.dtype != torch.float32 for g in gradients):
            norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
            norm = torch.linalg.vector_norm(torch.stack(norms))
        else:
            norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(
                self.parameters.values(), self.config.max_grad_norm, norm
            )
        return float(norm)

    def _utilisation(self, batches: list[Batch], seconds: float) -> dict[str, Any]:
        """What was measured of the machine: memory, and the share of its peak."""
        found: dict[str, Any] = {}
        if (memory := measured(self.decoder.device)) is not None:
            found["memory"] = memory
        if self._count_flops is None:
            return found
        flops = self._count_flops(n for batch in batches for n in batch.lengths)
        if self._peak is None:  # once
            device, compute = self.decoder.device, self.decoder.compute
            whole = float(flops) * self.steps
            peak = device_peak(device, compute, self.config.peak_tflops, whole)
            self._peak = 0.0 if peak is None else peak
        if self._peak:
            found["mfu"] = flops / (seconds * self._peak * self.ranks.count)
        return found


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    return ", ".join(f"{k}: {old.get(k)}, now {new.get(k)}" for k in changed)
