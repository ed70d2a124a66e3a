"""What is looked at by itself before a model is trained or served: all that needs no weights read.

Files, names and shapes are left to the loader, which refuses them with a message of its own.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from ardor.arch.decoder import Decoder
from ardor.data.choices import Preferences
from ardor.data.readers import Row
from ardor.doctor.checkpoint import Checkpoint, Training, find_checkpoint, reading_of
from ardor.doctor.data import sample
from ardor.doctor.finding import Finding
from ardor.doctor.rules import RULES, SUBJECTS
from ardor.errors import ConfigError, DataError
from ardor.load import Model
from ardor.sketch import sketch_of
from ardor.text.chat import TrainOn
from ardor.vocabulary import PadStrategy, set_pad

ROWS = 500  # of the data: enough to see what is wrong with all, soon enough to wait for
LOADER = ("files", "weights", "behaviour", "runs")  # subjects that are looked at elsewhere
# Rules whose errors are those of the loader, or of whoever builds the dataset, in better words.
REFUSED_ANYWAY = ("vocabulary", "row-ids", "row-targets")

# Changes the tokens and the template of a model as the run will, before it trains.
Prepare = Callable[[Model], object]


def preflight(
    name: str | Path,
    *,
    rows: Iterable[Row] = (),
    heldout: Iterable[Row] = (),
    prepare: Prepare | None = None,
    pad: PadStrategy = "auto",
    training: Training | None = None,
    choices: tuple[Preferences, TrainOn] = ("refuse", "all"),
    max_length: int | None = None,
    allow: Sequence[str] = (),
    revision: str | None = None,
    use_safetensors: bool = True,
) -> tuple[Finding, ...]:
    """The warnings and remarks on a model and its data, before any weight is read.

    Of `rows` the first ROWS are looked at. `prepare` is tried on a model without weights: what is
    judged is what it makes of tokens, template and files, with the padding token that `pad` chooses
    beside these rows, as a run does beside all of them. `choices` are the run's preferences and
    train_on. An error among the rules named in `allow` is returned with the rest.

    Raises: ConfigError for any other error, or a name in `allow` that is no rule; DataError for a
    row that cannot be trained on; CheckpointError if there is no such model; what `prepare` raises.
    """
    check_rules(allow)
    found = find_checkpoint(name, revision, use_safetensors=use_safetensors)
    found.training = training
    model = None if prepare is None else _as_prepared(found, prepare)
    if found.tokenizer is not None and (some := [*islice(rows, ROWS + 1)]):
        reading = reading_of(found, max_length, *choices)
        found.data = sample(some, reading, most=ROWS, heldout=islice(heldout, ROWS))
    if model is not None:
        set_pad(model, pad, occurs=None if found.data is None else found.data.where)
        _take_tokens(found, model)
    names = [n for subject, rules in SUBJECTS.items() if subject not in LOADER for n in rules]
    findings = [replace(one, rule=rule) for rule in names for one in RULES[rule](found)]
    errors = [one for one in findings if one.level == "E" and one.rule not in allow]
    if errors and not any(one.rule == "vocabulary" for one in errors):
        _refuse(found, [one for one in errors if one.rule not in REFUSED_ANYWAY])
    return tuple(sorted(findings, key=lambda one: "EWI".index(one.level)))


def _as_prepared(found: Checkpoint, prepare: Prepare) -> Model | None:
    """Let `found` be the model after `prepare`; an adapter, which no run begins at, stays."""
    if found.tokenizer is None or found.config is None:
        return None
    own, generation = found.template, found.generation or {}
    model = sketch_of(found.path, found.config, generation, found.tokenizer, own)
    prepare(model)
    found.template = model.template
    found.template_added = found.template is not None and found.template is not own
    _take_tokens(found, model)
    return model


def _take_tokens(found: Checkpoint, model: Model) -> None:
    found.tokenizer, found.untrained = model.tokenizer, model.untrained
    found.config, found.generation = model.config, model.generation_config
    if isinstance(model.decoder, Decoder):
        found.spec = model.decoder.spec


def check_rules(names: Sequence[str]) -> None:
    """Raises: ConfigError for a name that is no rule, with the nearest that is."""
    for name in names:
        if name not in RULES:
            near = get_close_matches(name, RULES, n=1)
            hint = f"did you mean {near[0]}?" if near else "docs/DOCTOR.md lists them"
            raise ConfigError(f"allow={name}: doctor has no such rule; {hint}")


def _refuse(found: Checkpoint, errors: list[Finding]) -> None:
    """Raises for the first of `errors`, and names the others."""
    if not errors:
        return
    if errors[0].rule == "data-rows" and found.data is not None:
        raise DataError(found.data.broken.places[0])
    told = [f"{one.what} ({one.rule}): {one.evidence}; {one.fix}" for one in errors]
    flags = " ".join(f"--allow {rule}" for rule in dict.fromkeys(one.rule for one in errors))
    raise ConfigError("\n".join([*told, f"to go on all the same, add {flags}"]))


def told(findings: Iterable[Finding], allow: Sequence[str] = ()) -> tuple[str, ...]:
    """A line for each warning, and for each error that was set aside."""
    lines = []
    for one in findings:
        if one.level == "E":
            if one.rule in allow:
                lines.append(f"doctor, set aside by allow={one.rule}: {one.what} ({one.evidence})")
        elif one.level == "W" and one.rule not in allow:
            lines.append(f"doctor: {one.what} ({one.rule}): {one.evidence}; {one.fix}")
    return tuple(lines)
