"""`ardor score MODEL DATA`."""

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ardor.cli.console import print_json, results
from ardor.cli.model import ModelFlags
from ardor.errors import ConfigError, DataError

FIGURES = (
    ("loss", "nats per token", "{:.4f}"),
    ("perplexity", "", "{:,.3f}"),
    ("bits_per_byte", "", "{:.4f}"),
    ("targets", "tokens scored", "{:,}"),
)


@dataclass(frozen=True, kw_only=True)
class Config(ModelFlags):
    """Loss, perplexity and bits per byte: of a text, or of a dataset's trained tokens."""

    model: str
    """Hub id, local directory, or the folder of a run."""
    data: str
    """A dataset in any format that finetune reads, - for text on standard input, or a text."""
    text: bool = False
    """DATA is the text itself, not the name of a file."""
    tokens: bool = False
    """With a text: show every token with its log-probability."""
    max_length: int | None = None
    """Longest example in tokens; documents are cut. Default: the model's context."""
    replay: bool = False
    """DATA is the stopped-at-step-N.jsonl of a run that stopped: what each of its documents costs
    this model, beside what it cost when the run stopped."""
    json: bool = False
    """Print one JSON document."""


def run(config: Config) -> int:
    if config.replay:
        return _replay(config)
    if config.text or config.data == "-":
        text = sys.stdin.read() if config.data == "-" else config.data
        return _score_text(config, text)
    if config.tokens:
        raise ConfigError("--tokens shows the tokens of one text; give --text, or - for input")
    return _score_dataset(config)


def _score_text(config: Config, text: str) -> int:
    lm = config.load(config.model)
    score = lm.score(text)
    figures: dict[str, Any] = {
        "loss": score.nats / score.targets,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "targets": score.targets,
    }
    if config.json:
        print_json(figures | asdict(score))
        return 0
    if config.tokens:
        for id_, logprob in zip(score.tokens[1:], score.logprobs, strict=True):
            results().print(f"{logprob:9.3f}  {lm.tokenizer.decode([id_])!r}")
    _show(figures)
    return 0


def _score_dataset(config: Config) -> int:
    from ardor.data.dataset import Dataset  # later: help needs no torch
    from ardor.data.sources import read_rows
    from ardor.train.evaluate import evaluate

    try:
        rows = list(read_rows(config.data))
    except DataError as error:
        if not Path(config.data).exists():
            error.add_note("if that is the text to score, and no name, add --text")
        raise
    lm = config.load(config.model)
    context = lm.spec.max_positions
    dataset = Dataset.build(
        rows,
        lm.tokenizer,
        lm.model.template,
        max_length=context if config.max_length is None else min(config.max_length, context),
        over_length="truncate_left",
        vocab=lm.spec.vocab,
    )
    found = evaluate(lm.model, dataset)
    figures = {key: found[key] for key in ("loss", "perplexity", "targets")}
    if not dataset.census.truncated and not dataset.census.dropped:
        scored = sum(
            len(lm.tokenizer.decode(_targets(dataset, i), skip_special=True).encode())
            for i in range(len(dataset))
        )
        figures["bits_per_byte"] = found["loss"] * found["targets"] / math.log(2) / max(1, scored)
    if config.json:
        print_json(figures | {"data": dataset.census.summary()})
        return 0
    results().print(dataset.census.summary())
    _show(figures)
    return 0


def _replay(config: Config) -> int:
    from ardor.train.watchdog import replayed  # later: help needs no torch

    if config.text or config.tokens or config.max_length is not None:
        raise ConfigError(
            "--replay asks about the ids of a file; leave --text, --tokens and --max-length out"
        )
    file = Path(config.data)
    if not file.is_file():
        raise DataError(
            f"no file at {file}; give the stopped-at-step-N.jsonl in the folder of the run"
        )
    found = list(replayed(config.load(config.model).model.decoder, file))
    if config.json:
        print_json({"documents": [one._asdict() for one in found]})
        return 0
    results().print("     row  targets  when it stopped      now  nats per target")
    for one in found:
        text = " ".join((one.text or "").split())
        results().print(
            f"{'–' if one.row is None else one.row:>8}  {one.targets:>7}  {_nats(one.before):>15}  "
            f"{_nats(one.now):>7}  {text}",
            overflow="ellipsis",
            no_wrap=True,
            markup=False,
        )
    return 0


def _nats(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _targets(dataset: Any, index: int) -> list[int]:
    example = dataset[index]
    pairs = zip(example.tokens[1:], example.supervised[1:], strict=True)
    return [token for token, supervised in pairs if supervised]


def _show(figures: dict[str, Any]) -> None:
    for key, unit, form in FIGURES:
        if key in figures:
            name = key.replace("_", " ")
            results().print(f"{name:14} {form.format(figures[key])} {unit}".rstrip())
