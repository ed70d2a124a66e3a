"""`ardor finetune`: a model that exists, on examples of what it should do."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from ardor.adapters.lora import ALL_LINEAR, LoraConfig, add_lora, lora_parameters
from ardor.arch.attention import backend_for
from ardor.arch.experts import ExpertLinear, Router
from ardor.data.dataset import Dataset
from ardor.data.formats import Completion, Conversation, recognise
from ardor.data.sources import Row, read_rows
from ardor.errors import ConfigError
from ardor.files.json import read_text
from ardor.load import Model, default_device, load_model, stops_of, tokenizer_of
from ardor.precision import Precision, training_compute
from ardor.quant.fp8 import FP8Experts, FP8Linear
from ardor.quant.mxfp4 import MXFP4Experts
from ardor.text.chat import CHATML, ChatTemplate
from ardor.text.templates import default_template
from ardor.text.tokenizer import Tokenizer
from ardor.train.config import Finetune
from ardor.train.evaluate import evaluate, samples
from ardor.train.groups import aliases, choose_trained
from ardor.train.peak import check_finetune
from ardor.train.ranks import Ranks
from ardor.train.run import (
    Run,
    begin,
    choose_attention,
    data_note,
    output_folder,
    resumed_from,
    split,
)

LEARNING_RATES = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4}


def prepare(config: Finetune) -> Run:
    """Everything up to the first step.

    Raises: an ArdorError before anything is written.
    """
    Ranks.take_device()
    if config.learning_rate is None:
        config = replace(config, learning_rate=LEARNING_RATES[config.method])
    folder = output_folder(config, "finetune")
    rows = read_rows(config.data)  # lazily: a missing file is told before a model is loaded
    rows = [*islice(rows, 1), *rows]
    checkpoint = resumed_from(config)
    check_finetune(config, default_device())
    model, added = _model(config, checkpoint, chats=_chats(rows))
    # Trust is given by whoever loads, each time; the files of a run do not hand it on.
    config = replace(config, trust_remote_code=False)
    limit = min(config.max_length, model.decoder.facts.max_positions)
    data = _dataset(rows, model, config, limit)
    held = None
    if config.eval_data is not None:
        held = _dataset(list(read_rows(config.eval_data)), model, config, limit)
    if checkpoint is None:
        _make_trainable(config, model, added)
    frozen = choose_trained(model.decoder, config, aliases(model))
    train, heldout = split(config, data, held)
    run = begin(
        config,
        folder,
        model,
        (train, heldout),
        evaluate=lambda: [
            *(
                []
                if heldout is None
                else [evaluate(model, heldout, answers=config.stop_rate_samples)]
            ),
            *samples(model, config.sample_prompts, config.sample_tokens),
        ],
        notes=(
            data_note(data, train, heldout, limit),
            f"model: {_described(model, config)}",
            f"compute: {model.decoder.compute} ({model.precision.why}), trained in "
            f"{config.master_dtype if config.method == 'full' else 'float32'}",
            *frozen,
            *choose_attention(model, config.attn_implementation),
            *_experts_note(model, config),
        ),
    )
    run.opening = _opening(rows[0])
    return run


def _chats(rows: list[Row]) -> bool:
    """Whether a chat template is needed: texts and completions are learnt without one.

    A row that cannot be read counts, and is told of with its place when it is encoded.
    """
    plain = {"text", "prompt-completion"}
    for row in rows:
        format = recognise(row.values, row.where)
        strings = all(isinstance(row.values[column], str) for column in format.columns)
        if format.name not in plain or not strings:
            return True
    return False


def _opening(row: Row) -> str | None:
    """The first words of a text that the model learns to continue; None if it learns to chat."""
    content = recognise(row.values, row.where).read(row.values)
    if isinstance(content, Conversation):
        return None
    text = content.prompt if isinstance(content, Completion) else content.text
    return " ".join(text.split()[:8]) or "The"


def _dataset(rows: list[Row], model: Model, config: Finetune, limit: int) -> Dataset:
    return Dataset.build(
        rows,
        tokenizer_of(model),
        model.template,
        max_length=limit,
        over_length=config.over_length,
        vocab=model.decoder.facts.vocab,
    )


def _model(config: Finetune, checkpoint: Path | None, *, chats: bool) -> tuple[Model, bool]:
    """The model with the chat template it will be trained on, and whether that is new to it.

    Where nothing `chats`, none is added: a template says that a model was trained on it.
    """
    device = default_device()
    precision = training_compute(config.dtype, device)
    backend_for(config.attn_implementation, device, trains=True)  # before a model is loaded
    full = config.method == "full"
    resumed = full and checkpoint is not None  # its weights are all in the checkpoint
    model = load_model(
        checkpoint if full and checkpoint is not None else config.model,
        dtype=_masters(config, precision) if full else precision.compute,
        device=device,
        attn_implementation=config.attn_implementation,
        quantization=config.quantization if config.method == "qlora" else "none",
        adapter=None if full else checkpoint,
        revision=None if resumed else config.revision,
        trust_remote_code=config.trust_remote_code,
        # A checkpoint of the run is ours, and never a pickle.
        use_safetensors=config.use_safetensors or resumed,
        check_finite=True,
    )
    if model.adapter is not None and checkpoint is None:
        raise ConfigError(
            f"{config.model} is an adapter on {model.source}; fine-tune that model, or add "
            "--resume with -o to go on with the run"
        )
    model.precision = precision
    model.decoder.compute = precision.compute
    added = config.chat_template is not None or (chats and model.template is None)
    if checkpoint is None and added:
        model.template = _template(config, tokenizer_of(model))
    model.stops = stops_of(model.tokenizer, model.template, model.generation_config, model.config)
    model.generation_config["eos_token_id"] = model.stops.eos_token_id
    if full:
        model.config["eos_token_id"] = model.stops.eos_token_id
    if checkpoint is not None:
        _require_grad(config, model)
    return model, added


def _masters(config: Finetune, precision: Precision) -> torch.dtype:
    """What weights that are all trained are held in."""
    return torch.bfloat16 if config.master_dtype == "bfloat16" else precision.weights


def _template(config: Finetune, tokenizer: Tokenizer) -> ChatTemplate:
    if config.chat_template is None:
        return default_template(tokenizer)
    if config.chat_template == "chatml":
        return CHATML
    path = Path(config.chat_template)
    if not path.is_file():
        raise ConfigError(
            f"chat_template={config.chat_template!r} is neither chatml nor a file that exists"
        )
    return ChatTemplate(read_text(path), name=str(path), tokens=tokenizer.names)


def _make_trainable(config: Finetune, model: Model, template_added: bool) -> None:
    if config.method != "full":
        targets = config.target_modules
        rows = _control_rows(config, model, template_added)
        model.adapter = LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=ALL_LINEAR if targets == (ALL_LINEAR,) else targets,
            use_rslora=config.use_rslora,
            trainable_token_indices=rows,
        )
        disk = model.form.disk_linears()
        add_lora(
            model.decoder,
            model.adapter,
            names=lambda name: disk[name].name,
            generator=torch.Generator().manual_seed(config.seed),
        )
    torch.manual_seed(config.seed)
    _require_grad(config, model)


# Modules whose weights are kept in the format of their file, and its name.
_STORED: dict[type, str] = {MXFP4Experts: "MXFP4", FP8Experts: "FP8", FP8Linear: "FP8"}


def _require_grad(config: Finetune, model: Model) -> None:
    if config.method == "full":
        kinds = {_STORED[type(m)] for m in model.decoder.modules() if type(m) in _STORED}
        if kinds:
            raise ConfigError(
                f"weights of {config.model} are stored in {' and '.join(sorted(kinds))}, which "
                "full fine-tuning cannot change; use --method lora, or a checkpoint in bfloat16"
            )
        for parameter in model.decoder.parameters():
            # What a file is mapped to must not be written to.
            parameter.data = parameter.data.clone()
        model.decoder.requires_grad_(True)
        return
    for parameter in lora_parameters(model.decoder):
        parameter.requires_grad_(True)


def _control_rows(config: Finetune, model: Model, template_added: bool) -> tuple[int, ...]:
    """Control tokens that the template writes, where the model has never been trained on them."""
    if config.train_control_tokens == "no" or model.template is None:
        return ()
    if config.train_control_tokens == "auto" and not template_added:
        return ()
    tokenizer = tokenizer_of(model)
    probe = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    text = model.template.render(probe, add_generation_prompt=True)
    written = {part for part in tokenizer.split(text) if isinstance(part, int)}
    return tuple(sorted(written - {tokenizer.special.bos, tokenizer.special.eos}))


def _described(model: Model, config: Finetune) -> str:
    parameters = list(model.decoder.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    held = sum(t.nbytes for t in (*parameters, *model.decoder.buffers()))
    text = f"{config.method}, {trained / 1e6:.2f} M trained parameters, {held / 2**20:.0f} MiB"
    return text + (f", base in {model.quantization}" if model.quantization else "")


def _experts_note(model: Model, config: Finetune) -> tuple[str, ...]:
    """What becomes of experts, where a model has any."""
    modules = model.decoder.modules()
    held = [p for m in modules if isinstance(m, ExpertLinear | Router) for p in m.parameters()]
    if not held:
        return ()
    fate = {
        "full": "trained",
        "lora": "frozen: an adapter has no place on weights that are stacked",
        "qlora": "frozen and not quantized: neither has a place on weights that are stacked",
    }[config.method]
    millions, balance = sum(p.numel() for p in held) / 1e6, model.decoder.facts.balance
    added = f"; {balance:g} x their load-balancing loss is minimised with the rest"
    return (f"experts: {millions:.2f} M parameters, {fate}" + (added if balance else ""),)
