"""`ardor train`: a tokenizer and a model from scratch, on text."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ardor.arch.decoder import Decoder
from ardor.arch.grow import rows_for
from ardor.arch.init import initialise
from ardor.data.cache import encode
from ardor.data.dataset import Dataset
from ardor.data.mixture import Mixture
from ardor.data.readers import Row
from ardor.errors import ConfigError, DataError
from ardor.families.spec_data import differences
from ardor.files.atomic import write_atomic
from ardor.files.hub import resolve
from ardor.files.runs import newest_checkpoint
from ardor.load import Model, Native, count_tokens, default_device, load_model, stops_of
from ardor.memory.shapes import count, parameters
from ardor.precision import training_compute
from ardor.text.tokenizer import Tokenizer
from ardor.train.blueprint import Blueprint, read_blueprint
from ardor.train.config import Train
from ardor.train.evaluate import evaluate, samples
from ardor.train.groups import aliases, choose_trained
from ardor.train.machine import check_machine
from ardor.train.peak import begin_measuring, check_scratch
from ardor.train.ranks import Ranks
from ardor.train.run import (
    Run,
    begin,
    choose_attention,
    data_note,
    output_folder,
    rate_note,
    resumed_from,
    split,
)

LEARNING_RATE = 2e-3
VOCABULARY = 4096  # entries of a tokenizer, where nothing says how many
SPEC = "model.yaml"  # in the folder of a run: what `--model` takes to train the same again


def prepare(config: Train, tell: Callable[[str], None] | None = None) -> Run:
    """Everything up to the first step.

    `tell` is given what is known of the model before it is allocated; else the run's notes have it.

    Raises: DataError, ConfigError or TextError before anything is written; a model that the memory
    cannot hold is refused before it is allocated.
    """
    Ranks.take_device()
    held_before = begin_measuring()
    config = replace(config, learning_rate=config.learning_rate or LEARNING_RATE)
    folder = output_folder(config, "train")
    check_machine(config, device := default_device())
    blueprint = read_blueprint(config)
    # Before the data is read, which may take long; the tokenizer's size is not known yet.
    rough = blueprint.with_rows(config.vocab_size or blueprint.spec.vocab)
    check_scratch(rough.spec, config, device)
    mixture = Mixture(config.data, streaming=config.streaming)
    apart = Mixture(config.eval_data) if config.eval_data else None
    checkpoint = resumed_from(config)
    tokenizer = _tokenizer(config, blueprint, mixture, checkpoint)
    blueprint = blueprint.with_rows(_embedding_rows(config, blueprint, tokenizer))
    limit = min(config.max_length, blueprint.spec.max_positions)
    cut = {"max_length": limit, "over_length": config.over_length, "cache": config.cache}
    data, kept = encode(mixture, tokenizer, **cut)
    held = None if apart is None else encode(apart, tokenizer, **cut).dataset
    train, held = split(config, data, held)
    check_scratch(blueprint.spec, config, device)
    notes = (*blueprint.notes(), _sizes(blueprint))
    if tell is not None:
        for note in notes:
            tell(note)
    if checkpoint is None:
        model = new_model(config, blueprint, tokenizer, folder)
    else:
        model = _resumed(config, checkpoint, folder)
    _make_trainable(model, config)
    frozen = choose_trained(model.decoder, config, aliases(model))
    run = begin(
        config,
        folder,
        model,
        (train, held),
        evaluate=lambda: _evaluate(model, held, config),
        mixture=mixture,
        checkpoint=checkpoint,
        notes=(
            *data_note(data, train, held, limit, kept),
            *(notes if tell is None else ()),
            f"compute: {model.precision.compute} ({model.precision.why}), "
            f"{config.master_dtype} masters",
            *frozen,
            *choose_attention(model, config.attn_implementation),
            *rate_note(config, LEARNING_RATE),
        ),
        other_model=differences(model.decoder.spec, blueprint.spec),
        beside=lambda: write_atomic(folder / SPEC, blueprint.to_yaml()),
    )
    run.held_before = held_before
    return run


def _sizes(blueprint: Blueprint) -> str:
    size = f"{count(parameters(blueprint.spec)) / 1e6:,.1f} M parameters"
    return f"{size}; {blueprint.spec.vocab:,} embedding rows"


def _tokenizer(
    config: Train, blueprint: Blueprint, rows: Iterable[Row], checkpoint: Path | None
) -> Tokenizer:
    if checkpoint is not None:
        return Tokenizer.from_directory(checkpoint)
    if config.tokenizer is not None:
        found = resolve(config.tokenizer).path
        return Tokenizer.from_directory(newest_checkpoint(found) or found)
    size = config.vocab_size or blueprint.vocab or VOCABULARY
    return Tokenizer.train((_text(row) for row in rows), vocab_size=size)


def _embedding_rows(config: Train, blueprint: Blueprint, tokenizer: Tokenizer) -> int:
    """As the flag says, else as the model does, else as the tokenizer needs.

    Raises: ConfigError if the tokenizer has more entries.
    """
    needed = tokenizer.vocab_rows
    where, given = "--vocab-size", config.vocab_size
    if given is None:
        where, given = blueprint.source, blueprint.vocab
    if given is not None and given < needed:
        raise ConfigError(
            f"{where} says {given:,} embedding rows, but the tokenizer has {needed:,} entries; "
            f"give --vocab-size {needed} or more, or another --tokenizer"
        )
    if config.vocab_size is None and blueprint.vocab is not None:
        return blueprint.vocab
    return rows_for(max(needed, config.vocab_size or 0))


def _text(row: Row) -> str:
    text = row.values.get("text")
    if not isinstance(text, str):
        raise DataError(
            f"{row.where} has no text (found {', '.join(row.values) or 'nothing'}); training from "
            "scratch reads plain text files, or rows with a text column"
        )
    return text


def new_model(config: Train, blueprint: Blueprint, tokenizer: Tokenizer, folder: Path) -> Model:
    """A randomly initialised model of `blueprint`, seeded by config.seed."""
    device = default_device()
    precision = training_compute(config.dtype, device)
    decoder = Decoder(blueprint.spec, compute=precision.compute)
    initialise(
        decoder,
        torch.Generator().manual_seed(config.seed),
        scheme=blueprint.init,
        std=blueprint.std,
    )
    decoder.to(device)
    torch.manual_seed(config.seed)
    special = tokenizer.special
    raw = blueprint.config_json(special)
    generation = {
        key: value
        for key, value in (
            ("bos_token_id", special.bos),
            ("eos_token_id", special.eos),
            ("pad_token_id", special.pad),
        )
        if value is not None
    }
    count_tokens(decoder, tokenizer)
    return Model(
        decoder=decoder,
        form=Native(blueprint.family, blueprint.spec, blueprint.family.rules(blueprint.spec)),
        config=raw,
        generation_config=generation,
        tokenizer=tokenizer,
        template=None,
        stops=stops_of(tokenizer, None, generation, raw),
        precision=precision,
        source=str(folder.resolve()),
        revision=None,
    )


def _resumed(config: Train, checkpoint: Path, folder: Path) -> Model:
    """The model of a checkpoint, held as a new one is."""
    device = default_device()
    precision = training_compute(config.dtype, device)
    model = load_model(
        checkpoint,
        dtype=precision.weights,
        device=device,
        attn_implementation=config.attn_implementation,
        check_finite=True,
    )
    return replace(model, source=str(folder.resolve()), precision=precision)


def _make_trainable(model: Model, config: Train) -> None:
    model.decoder.compute = model.precision.compute
    if config.master_dtype == "bfloat16":
        model.decoder.to(torch.bfloat16)
    for parameter in model.decoder.parameters():
        # What a file is mapped to must not be written to.
        parameter.data = parameter.data.clone()
    model.decoder.requires_grad_(True)


def _evaluate(model: Model, heldout: Dataset | None, config: Train) -> list[dict[str, Any]]:
    rows = [] if heldout is None else [evaluate(model, heldout)]
    return rows + samples(model, config.sample_prompts, config.sample_tokens)
