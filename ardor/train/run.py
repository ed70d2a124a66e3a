"""The folder of a run, and what every kind of run does around the loop."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ardor import __version__
from ardor.adapters.peft_layout import ADAPTER_CONFIG
from ardor.arch.attention import backend_for
from ardor.arch.decoder import Decoder
from ardor.data.batches import BatchPlan
from ardor.data.dataset import Dataset
from ardor.data.mixture import Mixture
from ardor.errors import CheckpointError, ConfigError
from ardor.files.atomic import clean_partials, write_atomic
from ardor.files.lock import Lock
from ardor.files.runs import METRICS, checkpoints, newest_checkpoint
from ardor.files.runs import SETTINGS as CONFIG
from ardor.files.yaml import to_yaml
from ardor.load import CONFIG as MODEL
from ardor.load import Model, default_device
from ardor.memory.fit import note
from ardor.memory.heap import freed_memory_kept
from ardor.save import write_files
from ardor.train.config import Optimisation
from ardor.train.first_rows import FILE as FIRST_ROWS
from ardor.train.first_rows import write_first_rows
from ardor.train.groups import aliases, rate_shares
from ardor.train.metrics import Metrics
from ardor.train.optim import trainable
from ardor.train.peak import measured, predicted
from ardor.train.preference import LabelObjective
from ardor.train.ranks import Ranks
from ardor.train.recompute import ours
from ardor.train.report import write_report
from ardor.train.trackers import Dashboard, Log, open_trackers
from ardor.train.trainer import Diverged, Event, Hooks, Objective, Trainer

SPLIT_FROM = 10  # examples
HIGH = 100  # times the usual learning rate


@dataclass
class Run:
    """A run that is ready to go: iterate `events`."""

    folder: Path
    model: Model
    trainer: Trainer
    train: Dataset
    heldout: Dataset | None
    resumed: bool
    notes: tuple[str, ...]  # for people: what was found and chosen
    opening: str | None = None  # of a text to continue; None where the data are conversations
    predicted: int | None = None  # bytes at the peak
    held_before: int = 0  # bytes that were there before it, and are in the measured peak
    dashboards: tuple[Dashboard, ...] = ()
    lock: Lock | None = None  # on the folder, until the end

    def events(self) -> Iterator[Event]:
        """Train to the end; report.html follows every checkpoint, peak memory comes last.

        Raises: what `Trainer.events` does, after the report tells it too.
        """
        failed = False
        try:
            yield from self._events()
        except Exception as error:
            failed = True
            if isinstance(error, Diverged) and self.trainer.ranks.first:
                self._append({"kind": "stopped", "text": str(error)})
                write_report(self.folder)
            raise
        finally:
            for dashboard in self.dashboards:
                dashboard.close(failed)
            if self.lock is not None:
                self.lock.release()

    def _events(self) -> Iterator[Event]:
        first, saved = self.trainer.ranks.first, False
        with freed_memory_kept():
            for event in self.trainer.events(self._logs):
                if event["kind"] == "checkpoint" and first:
                    write_report(self.folder)
                    saved = True
                yield event
        if first:
            if saved:
                yield from self._memory()
            write_report(self.folder)  # with the peak; or it was killed before it was written

    @property
    def _logs(self) -> list[Log]:
        return [dashboard.log for dashboard in self.dashboards]

    def _append(self, row: dict[str, Any]) -> dict[str, Any]:
        """To metrics.jsonl, a row of the step that was done last."""
        row, file = {"step": self.trainer.progress.step, **row}, self.folder / METRICS
        Metrics(file, keep_bytes=file.stat().st_size, logs=self._logs).append(row)
        return row

    def _memory(self) -> Iterator[Event]:
        peak = measured(self.model.decoder.device)
        if peak is None or self.predicted is None:
            return
        row = {"kind": "memory", "peak_memory": peak, "predicted_memory": self.predicted}
        if self.held_before:
            row["held_before"] = self.held_before
        yield self._append(row)


def output_folder(config: Optimisation, verb: str) -> Path:
    """The folder to write: as asked, or the next free runs/<verb>-N.

    Raises: ConfigError if it already holds a run and `resume` is not set, or the reverse; if it is
    the folder of a model, or has checkpoints of something else.
    """
    if config.output is None:
        if config.resume:
            raise ConfigError("resume needs the folder of the run to go on with: -o RUN")
        taken = {path.name for path in Path("runs").glob(f"{verb}-*")}
        number = next(n for n in range(1, len(taken) + 2) if f"{verb}-{n}" not in taken)
        return Path("runs") / f"{verb}-{number}"
    holds_run = (config.output / CONFIG).exists()
    if holds_run and not config.resume:
        raise ConfigError(
            f"{config.output} already holds a run; add --resume to go on with it, "
            "or choose another folder with -o"
        )
    if config.output.exists() and not config.output.is_dir():
        raise ConfigError(f"{config.output} is a file; give a folder with -o")
    if not holds_run and (found := _not_a_run(config.output)):
        raise ConfigError(
            f"{config.output} holds {found}, but no {CONFIG} of a run; "
            "choose another folder with -o"
        )
    if config.resume and not holds_run:
        raise ConfigError(
            f"{config.output} holds no run to resume; leave --resume out to begin one"
        )
    return config.output


def _not_a_run(folder: Path) -> str | None:
    """What makes `folder` no place for a run: a model, or checkpoints that are not ours to drop."""
    names = [name for name in (MODEL, ADAPTER_CONFIG) if (folder / name).exists()]
    return next(iter([*names, *(path.name for path in checkpoints(folder))]), None)


def resumed_from(config: Optimisation) -> Path | None:
    """The checkpoint that this run will go on from, if any; tidies what a killed writer left."""
    if not config.resume or config.output is None:
        return None
    ranks = Ranks.joined(default_device())
    if ranks.first:  # two that tidy would take it from each other
        clean_partials(config.output)
    ranks.wait()
    return newest_checkpoint(config.output)


def split(
    config: Optimisation, data: Dataset, heldout: Dataset | None
) -> tuple[Dataset, Dataset | None]:
    """(training, held-out or None) data, holding out a part if none was given.

    Of fewer than SPLIT_FROM examples, or one row that was not cut, nothing is held out.
    """
    alone = data.census.rows < 2 and not data.census.cut
    if heldout is not None or config.eval_fraction <= 0 or len(data) < SPLIT_FROM or alone:
        return data, heldout
    return data.split(config.eval_fraction, config.seed)


def data_note(
    data: Dataset, train: Dataset, heldout: Dataset | None, limit: int, kept: str | None
) -> tuple[str, ...]:
    """Where every row went, and what is `kept` of them for the next run, for people."""
    held = "nothing" if heldout is None else f"{len(heldout):,} examples"
    note = (
        f"data: {data.census.summary()}, each at most {limit:,} tokens; "
        f"trained on {len(train):,}, held out {held}"
    )
    return (note,) if kept is None else (note, kept)


def _mixture_note(plan: BatchPlan, mixture: Mixture) -> str:
    """What an epoch has of each part, for people."""
    assert plan.counts is not None
    held = np.bincount(plan.dataset.part_of, minlength=len(plan.counts))
    parts = (
        f"{Path(part.path).name} {count:,} ({count / sum(plan.counts):.1%}, each "
        f"{count / have:.3g} times)"
        for part, count, have in zip(mixture.parts, plan.counts, held, strict=True)
    )
    return f"mixture: an epoch has {sum(plan.counts):,} examples: {', '.join(parts)}"


def choose_attention(model: Model, asked: str | None) -> tuple[str, ...]:
    """Let attention run by what is best for the dtype that is computed in; a note of it.

    Raises: ConfigError if what was asked for cannot run here, or cannot train.
    """
    decoder = model.decoder
    if not isinstance(decoder, Decoder):
        return ()
    choice = backend_for(
        asked, decoder.device, spec=decoder.spec, compute=decoder.compute, trains=True
    )
    decoder.attend_by(*choice)
    return (f"attention: {choice.name} ({choice.why})",)


def begin(
    config: Optimisation,
    folder: Path,
    model: Model,
    data: tuple[Dataset, Dataset | None],
    *,
    evaluate: Callable[[], list[dict[str, Any]]] | None,
    mixture: Mixture,
    checkpoint: Path | None,
    notes: tuple[str, ...] = (),
    other_model: Sequence[str] = (),
    objective: Objective | None = None,
    record: Sequence[str] = (),
    beside: Callable[[], None] | None = None,
) -> Run:
    """Write the resolved settings, build the trainer, and take up `checkpoint`.

    `other_model` says where the model that is asked for is not the checkpoint's. `record` are
    lines about what the run began from, which head config.yaml; `beside` writes what else the
    folder of this kind of run holds.

    Raises: CheckpointError, before anything is written, if settings, data or model are not those
    that the run was begun with; ConfigError if another process trains in this folder.
    """
    train, heldout = data
    ranks = Ranks.joined(model.decoder.device)
    plan = _planned(config, train, heldout, mixture)
    if plan.counts is not None:
        notes = (*notes[:1], _mixture_note(plan, mixture), *notes[1:])
    hooks = Hooks(
        save_weights=lambda directory: write_files(model, directory),
        evaluate=evaluate,
        tokenizer=model.tokenizer,
        names=aliases(model),
    )
    notes = (*notes, *_small_note(plan, config))
    found = predicted(model, plan, heldout, config)
    if found is not None:
        notes = (*notes, note(found))
    trainer = Trainer(model.decoder, plan, config, folder, hooks, ranks, objective)
    if checkpoint is not None:
        trainer.resume(checkpoint)
        _check_model(checkpoint, other_model)
    if ranks.count > 1:
        _agree(ranks, plan)
        if checkpoint is None:  # else restored
            torch.manual_seed(config.seed + ranks.rank)
        notes = (*notes, f"{ranks.count} processes share each step's micro-batches")
    run = Run(folder, model, trainer, train, heldout, checkpoint is not None, notes)
    run.predicted = None if found is None else found.estimate.bytes
    if ranks.first:
        run.lock = _claimed(config, folder, checkpoint)
        if beside is not None:
            beside()
        _show_first_rows(run, plan, mixture, objective)
        run.dashboards = open_trackers(config, folder, trainer.progress.step)
        # Last: it makes the folder that of a run, and until then the same command begins one.
        _write_config(config, run, record)
    return run


def _check_model(checkpoint: Path, other: Sequence[str]) -> None:
    if other:
        more = f"; and {len(other) - 3} more" if len(other) > 3 else ""
        raise CheckpointError(
            f"{checkpoint} holds another model ({'; '.join(other[:3])}{more}); "
            "resume with the model the run was begun with, or choose another output folder"
        )


def _agree(ranks: Ranks, plan: BatchPlan) -> None:
    """Wait until all have seen the folder as it was, and compare what they have read.

    Raises: ConfigError if that is not the same, as files of several machines may not be.
    """
    mine = torch.tensor([*bytes.fromhex(plan.fingerprint)], dtype=torch.uint8)
    others = [rank for rank, one in enumerate(ranks.gather(mine)) if not one.equal(mine)]
    if others:
        raise ConfigError(
            f"process {ranks.rank} has read other training data than {others}; give all of them "
            "the same files"
        )


def _claimed(config: Optimisation, folder: Path, checkpoint: Path | None) -> Lock:
    """The lock of the folder, in which nobody has written since it was looked at.

    Raises: ConfigError if somebody has, or does.
    """
    remedy = "wait until that has ended, or choose another folder with -o"
    lock = Lock(folder / METRICS, remedy)
    begun = not config.resume and (folder / CONFIG).exists()
    if begun or newest_checkpoint(folder) != checkpoint:
        raise ConfigError(
            f"another process has just trained in {folder}; look at it, and try again"
        )
    clean_partials(folder)
    return lock


def _planned(
    config: Optimisation, train: Dataset, heldout: Dataset | None, mixture: Mixture
) -> BatchPlan:
    """The run's order of micro-batches.

    Raises: ConfigError for settings that need held-out data where there are none.
    """
    if heldout is None and (config.early_stopping_patience or config.load_best_model_at_end):
        raise ConfigError(
            "early_stopping_patience and load_best_model_at_end compare held-out losses, and "
            "nothing is held out; give --eval-data, or --eval-fraction above 0"
        )
    fixed = config.per_device_train_batch_size if config.tokens_per_batch is None else None
    return BatchPlan(
        train,
        tokens_per_batch=config.tokens_per_batch,
        examples_per_batch=fixed,
        seed=config.seed,
        order=config.train_sampling_strategy,
        weights=mixture.weights,
    )


def check_steps(
    config: Optimisation, model: Model, data: tuple[Dataset, Dataset | None], mixture: Mixture
) -> None:
    """What `begin` would refuse, for whoever computes or writes something before.

    Raises: ConfigError for settings that do not fit the model or the data.
    """
    _planned(config, *data, mixture)
    rate_shares(trainable(model.decoder), config, aliases(model))
    if config.gradient_checkpointing != "none":
        ours(model.decoder, f"gradient_checkpointing={config.gradient_checkpointing}")
    if config.torch_compile:
        ours(model.decoder, "torch_compile")


def _small_note(plan: BatchPlan, config: Optimisation) -> tuple[str, ...]:
    """For people, where a step would have more examples than there are."""
    have, each = len(plan.dataset), config.gradient_accumulation_steps
    if len(plan.epoch(0)) >= each and (plan.examples_per_batch or 0) <= have:
        return ()
    wanted = "tokens_per_batch" if plan.examples_per_batch is None else "batch"
    return (
        f"small data: {have} example{'s' * (have != 1)}, fewer than one step's {wanted} takes; "
        f"every step trains on all of them, and an epoch is one step",
    )


def _show_first_rows(
    run: Run, plan: BatchPlan, mixture: Mixture, objective: Objective | None
) -> None:
    """A resumed run shows those that it began with."""
    if not (run.resumed and (run.folder / FIRST_ROWS).exists()):
        labels = isinstance(objective, LabelObjective)
        write_first_rows(run.folder, plan, run.model, mixture, labels=labels)


def _write_config(config: Optimisation, run: Run, record: Sequence[str]) -> None:
    file = run.folder / CONFIG
    text = to_yaml(replace(config, output=run.folder, resume=False))
    write_atomic(file, _header(file, run.model, run.resumed, record) + text)


def _header(file: Path, model: Model, resumed: bool, record: Sequence[str]) -> str:
    """Comments that say what a run began from; those of a run that is resumed stay."""
    if resumed and file.exists():
        lines = file.read_text().splitlines(keepends=True)
        return "".join(takewhile(lambda line: line.startswith("#"), lines))
    at = "" if model.revision is None else f" at {model.revision}"
    facts = (f"ardor {__version__}", f"model: {model.source!r}{at}; {model.precision}", *record)
    return "".join(f"# {fact}\n" for fact in facts)


def rate_note(config: Optimisation, usual: float) -> tuple[str, ...]:
    """For people, of a learning rate far above those that are known to learn."""
    rate = config.learning_rate
    # The steps of SGD are as large as gradients, those of the others about as large as the rate.
    if rate is None or rate <= HIGH * usual or config.optim == "sgd":
        return ()
    return (
        f"learning_rate={rate:g} is {rate / usual:,.0f} times the usual {usual:g}: expect the loss "
        "to diverge",
    )
