"""A fine-tuning run that learns preferences: its objectives, and what they are measured against."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ardor.data.dataset import Dataset
from ardor.data.preferences import Judged, check_columns
from ardor.data.readers import Row
from ardor.load import Model
from ardor.train.config import Finetune
from ardor.train.preference import (
    BETAS,
    WITHOUT_REFERENCE,
    LabelObjective,
    PairObjective,
    Reference,
    kind_of,
)
from ardor.train.reference import Tell, begins_as_its_base, keep, tables, under_the_adapter

Judging = PairObjective | LabelObjective


class Preference(NamedTuple):
    train: Judging
    heldout: Judging | None
    note: str  # for people
    keep: Callable[[], None] | None = None  # writes what a resumed run reads again


def check_judged(first: list[Row], objective: str) -> None:
    """Raises: DataError if one of the first rows has not the judgements that `objective` needs."""
    if objective != "sft":
        for row in first:
            check_columns(row, kind_of(objective))


def prefer(
    config: Finetune,
    model: Model,
    folder: Path,
    data: tuple[Judged, Dataset | None],
    checkpoint: Path | None,
    tell: Tell | None,
) -> tuple[Finetune, Preference]:
    """The resolved settings, and the objectives of training and held-out data.

    The reference is the model as it was before the run: the base under an adapter that begins by
    changing nothing, else its log-probabilities, computed before the first step.

    Raises: CheckpointError if a resumed run has lost them.
    """
    beta = config.beta or BETAS[config.objective]
    config = replace(config, beta=beta)
    judged = [one for one in data if isinstance(one, Judged)]
    references: list[Reference] = []
    reference, keeping = "no reference model", None
    if config.objective not in WITHOUT_REFERENCE:
        early = config.precompute_ref_log_probs
        if checkpoint is None and not begins_as_its_base(model.decoder):
            early = True
        if early is None:
            early = config.method == "full"
        config = replace(config, precompute_ref_log_probs=early)
        if early:
            resumed = checkpoint is not None
            known = tables(folder, model.decoder, judged, resumed=resumed, tell=tell)
            references += known
            if not resumed:
                keeping = partial(keep, folder, judged, known)
            reference = "reference: this model before the first step, asked once"
        else:
            references += [under_the_adapter] * len(judged)
            reference = "reference: the base under the adapter"
    objectives = [
        _objective(config, one, references[i] if references else None)
        for i, one in enumerate(judged)
    ]
    note = f"objective: {config.objective}, beta {beta:g}; {reference}"
    heldout = objectives[1] if len(objectives) > 1 else None
    return config, Preference(objectives[0], heldout, note, keeping)


def _objective(config: Finetune, data: Judged, reference: Reference | None) -> Judging:
    if config.objective == "kto":
        assert reference is not None
        return LabelObjective(config, data, reference)
    return PairObjective(config, reference)
