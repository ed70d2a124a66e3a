"""`ardor train`: a tokenizer and a model from scratch, on text."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ardor.arch import spec as specs
from ardor.arch.attention import backend_for
from ardor.arch.decoder import Decoder
from ardor.arch.init import initialise
from ardor.data.dataset import Dataset
from ardor.data.sources import Row, read_rows
from ardor.errors import ConfigError, DataError
from ardor.families import FAMILIES
from ardor.files.hub import resolve
from ardor.files.runs import newest_checkpoint
from ardor.generate.text import Settings, generate
from ardor.load import Model, default_device, load_model, stops_of
from ardor.precision import training_compute
from ardor.text.tokenizer import Tokenizer
from ardor.train.config import Train
from ardor.train.evaluate import evaluate
from ardor.train.run import Run, begin, data_note, output_folder, resumed_from, split

LEARNING_RATE = 2e-3
ROW_MULTIPLE = 64  # embedding rows are a multiple of this: matrix units like it
SAMPLE_TOKENS = 40


def prepare(config: Train, rows: list[Row] | None = None, heldout: list[Row] | None = None) -> Run:
    """Everything up to the first step. `rows` stand in for config.data when they are at hand.

    Raises: DataError, ConfigError or TextError before anything is written.
    """
    if config.learning_rate is None:
        config = replace(config, learning_rate=LEARNING_RATE)
    folder = output_folder(config, "train")
    rows = list(read_rows(config.data)) if rows is None else rows
    if heldout is None and config.eval_data is not None:
        heldout = list(read_rows(config.eval_data))
    checkpoint = resumed_from(config)
    tokenizer = _tokenizer(config, rows, checkpoint)
    data, held = (
        None
        if part is None
        else Dataset.build(
            part, tokenizer, max_length=config.max_length, over_length=config.over_length
        )
        for part in (rows, heldout)
    )
    assert data is not None
    train, held = split(config, data, held)
    model = new_model(config, tokenizer, folder)
    if checkpoint is not None:
        model = _resumed(model, checkpoint)
    _make_trainable(model)
    count = sum(p.numel() for p in model.decoder.parameters())
    return begin(
        config,
        folder,
        model,
        (train, held),
        evaluate=lambda: _evaluate(model, held, config),
        notes=(
            data_note(data, train, held, config.max_length),
            f"model: {config.family}, {count / 1e6:.1f} M parameters, "
            f"{model.decoder.spec.vocab:,} embedding rows",
            f"compute: {model.precision.compute} ({model.precision.why}), float32 masters",
        ),
    )


def _tokenizer(config: Train, rows: list[Row], checkpoint: Path | None) -> Tokenizer:
    if checkpoint is not None:
        return Tokenizer.from_directory(checkpoint)
    if config.tokenizer is not None:
        found = resolve(config.tokenizer).path
        return Tokenizer.from_directory(newest_checkpoint(found) or found)
    return Tokenizer.train((_text(row) for row in rows), vocab_size=config.vocab_size)


def _text(row: Row) -> str:
    text = row.values.get("text")
    if not isinstance(text, str):
        raise DataError(
            f"{row.where} has no text (found {', '.join(row.values) or 'nothing'}); training from "
            "scratch reads plain text files, or rows with a text column"
        )
    return text


def new_model(config: Train, tokenizer: Tokenizer, folder: Path) -> Model:
    """A randomly initialised model as `config` describes it, seeded by config.seed."""
    spec = _spec(config, -(-tokenizer.vocab_rows // ROW_MULTIPLE) * ROW_MULTIPLE)
    family = FAMILIES[config.family]
    device = default_device()
    precision = training_compute(config.dtype, device)
    decoder = Decoder(
        spec, compute=precision.compute, attn=backend_for(config.attn_implementation, device)
    )
    initialise(decoder, torch.Generator().manual_seed(config.seed))
    decoder.to(device)
    torch.manual_seed(config.seed)
    special = tokenizer.special
    raw = family.config(spec, bos=special.bos, eos=special.eos, pad=special.pad)
    generation = {
        key: value
        for key, value in (
            ("bos_token_id", special.bos),
            ("eos_token_id", special.eos),
            ("pad_token_id", special.pad),
        )
        if value is not None
    }
    return Model(
        decoder=decoder,
        family=family,
        rules=family.rules(spec),
        config=raw,
        generation_config=generation,
        tokenizer=tokenizer,
        template=None,
        stops=stops_of(tokenizer, None, generation, raw),
        precision=precision,
        source=str(folder.resolve()),
        revision=None,
    )


def _resumed(fresh: Model, checkpoint: Path) -> Model:
    """The model of a checkpoint, held as `fresh` is."""
    model = load_model(
        checkpoint,
        dtype=fresh.precision.weights,
        device=fresh.decoder.device,
        attn_implementation=fresh.decoder.attn,
        check_finite=True,
    )
    return replace(model, source=fresh.source, precision=fresh.precision)


def _make_trainable(model: Model) -> None:
    model.decoder.compute = model.precision.compute
    for parameter in model.decoder.parameters():
        # What a file is mapped to must not be written to.
        parameter.data = parameter.data.clone()
    model.decoder.requires_grad_(True)


def _spec(config: Train, rows: int) -> specs.Decoder:
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads or heads
    if config.hidden_size % heads or heads % kv_heads:
        raise ConfigError(
            f"hidden_size={config.hidden_size}, num_attention_heads={heads} and "
            f"num_key_value_heads={kv_heads} do not fit: each must be a multiple of the next"
        )
    width = config.hidden_size // heads
    if config.family == "gpt2" and kv_heads != heads:
        raise ConfigError("gpt2 has as many key-value heads as heads; leave them out, or use llama")
    if config.family == "llama" and width % 2:
        raise ConfigError(
            f"hidden_size / num_attention_heads = {width} is odd, and rotary positions turn pairs "
            "of channels; choose an even head width"
        )
    llama = config.family == "llama"
    norm = (
        specs.Norm(kind="rms", eps=1e-5) if llama else specs.Norm(kind="layer", eps=1e-5, bias=True)
    )
    attention = specs.Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_width=width,
        scale=width**-0.5,
        rope=specs.Rope(theta=10_000.0, rotated=width) if llama else None,
        qkv_bias=not llama,
        out_bias=not llama,
    )
    mlp = specs.Mlp(
        width=config.intermediate_size,
        act="silu" if llama else "gelu_tanh",
        gated=llama,
        bias=not llama,
    )
    return specs.Decoder(
        vocab=rows,
        width=config.hidden_size,
        layers=(specs.Layer(mixer=attention, ffn=mlp, norm=norm),) * config.num_hidden_layers,
        norm=norm,
        tied=config.tie_word_embeddings,
        max_positions=config.max_length,
        learned_positions=not llama,
    )


def _evaluate(model: Model, heldout: Dataset | None, config: Train) -> list[dict[str, Any]]:
    rows = [] if heldout is None else [evaluate(model, heldout)]
    settings = Settings(max_new_tokens=SAMPLE_TOKENS, temperature=0.0, repetition_penalty=1.2)
    assert model.tokenizer is not None
    prompts = [model.tokenizer.encode(prompt) for prompt in config.sample_prompts]
    model.decoder.eval()
    found = generate(model, prompts, settings, continues=True) if prompts else []
    return rows + [
        {"kind": "sample", "prompt": prompt, "text": answer.text}
        for prompt, answer in zip(config.sample_prompts, found, strict=True)
    ]
