"""`ardor finetune`: a model that exists, on examples of what it should do."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ardor.adapters.kbit import prepare_kbit
from ardor.adapters.lora import LoraExperts, lora_modules, lora_parameters
from ardor.arch.experts import ExpertLinear, Router
from ardor.data.cache import Encoding, encode, encode_judged
from ardor.data.dataset import Dataset
from ardor.data.formats import Completion, Segments, Text
from ardor.data.mixture import Mixture
from ardor.data.preferences import Judged
from ardor.data.readers import Row
from ardor.doctor.checkpoint import Training
from ardor.doctor.finding import Finding
from ardor.doctor.preflight import preflight, told
from ardor.errors import ConfigError
from ardor.load import Model, default_device, load_model, tokenizer_of
from ardor.precision import Precision, training_compute
from ardor.quant.fp8 import FP8Experts, FP8Linear
from ardor.quant.mxfp4 import MXFP4Experts
from ardor.train.adapter import add_adapter
from ardor.train.checkpoint import as_begun
from ardor.train.config import Finetune
from ardor.train.evaluate import evaluate, evaluate_preference, samples, stop_rate
from ardor.train.groups import aliases, choose_trained
from ardor.train.machine import check_machine
from ardor.train.peak import begin_measuring, check_finetune
from ardor.train.prefer import Preference, check_judged, prefer
from ardor.train.preference import kind_of
from ardor.train.ranks import Ranks
from ardor.train.reference import Tell
from ardor.train.run import (
    Run,
    begin,
    check_steps,
    choose_attention,
    data_note,
    output_folder,
    rate_note,
    resumed_from,
    split,
)
from ardor.train.tokens import (
    Tokens,
    chats,
    content_of,
    occurrence,
    prepare_tokens,
    row_of_part,
    rows_to_train,
    with_date,
)
from ardor.vocabulary import set_pad

LEARNING_RATES = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4}
PREFERENCE_RATES = {"full": 1e-6, "lora": 1e-5, "qlora": 1e-5}


def prepare(config: Finetune, tell: Tell | None = None) -> Run:
    """Everything up to the first step; `tell` hears how far the reference of preferences is.

    Raises: an ArdorError before anything is written.
    """
    Ranks.take_device()
    held_before = begin_measuring()
    config = _with_rate(config)
    folder = output_folder(config, "finetune")
    check_machine(config, default_device())
    rows = Mixture(config.data, streaming=config.streaming)
    apart = Mixture(config.eval_data) if config.eval_data else None
    first = list(rows.first_rows())  # a missing file is told before a model is loaded
    check_judged(first, config.objective)
    config = as_begun(config, checkpoint := resumed_from(config))
    check_finetune(config, default_device())
    findings = () if checkpoint else _looked_at(config, rows, apart, first)
    model, tokens = _model(config, checkpoint, first)
    # Trust is given by whoever loads, each time; the files of a run do not hand it on.
    config = with_date(replace(config, trust_remote_code=False), model)
    limit = min(config.max_length, model.decoder.facts.max_positions)
    data, kept = _dataset(rows, model, config, limit)
    held = None if apart is None else _dataset(apart, model, config, limit).dataset
    train, heldout = split(config, data, held)
    packed = _prepared(config, model)
    pad: tuple[str, ...] = ()
    if tokens is not None:
        occurs = occurrence(data, row_of_part(data, rows))
        pad = (set_pad(model, config.pad_strategy, occurs=occurs),)
        _make_trainable(config, model, train, tokens)
    else:
        _require_grad(config, model)
    frozen = choose_trained(model.decoder, config, aliases(model))
    preference = None
    if isinstance(train, Judged):
        check_steps(config, model, (train, heldout), rows)
        config, preference = prefer(config, model, folder, (train, heldout), checkpoint, tell)
    run = begin(
        config,
        folder,
        model,
        (train, heldout),
        evaluate=lambda: _evaluated(model, heldout, config, preference),
        objective=None if preference is None else preference.train,
        beside=None if preference is None else preference.keep,
        mixture=rows,
        checkpoint=checkpoint,
        notes=(
            *data_note(data, train, heldout, limit, kept),
            *_model_notes(model, config, first, frozen),
            *packed,
            *(() if preference is None else (preference.note,)),
            *pad,
            *rate_note(config, _usual_rate(config)),
            *told(findings, config.allow),
        ),
        record=packed,
    )
    run.opening, run.held_before = _opening(first[0], config), held_before
    return run


def _with_rate(config: Finetune) -> Finetune:
    """With the learning rate that it trains at."""
    if config.learning_rate is not None:
        return config
    return replace(config, learning_rate=_usual_rate(config))


def _usual_rate(config: Finetune) -> float:
    rates = LEARNING_RATES if config.objective == "sft" else PREFERENCE_RATES
    return rates[config.method]


def _model_notes(
    model: Model, config: Finetune, first: list[Row], frozen: tuple[str, ...]
) -> tuple[str, ...]:
    masters = config.master_dtype if config.method == "full" else "float32"
    return (
        f"model: {_described(model, config)}",
        f"compute: {model.decoder.compute} ({model.precision.why}), trained in {masters}",
        *frozen,
        *_template_note(model, config, first),
        *choose_attention(model, config.attn_implementation),
        *_experts_note(model, config),
    )


def _evaluated(
    model: Model, heldout: Dataset | None, config: Finetune, preference: Preference | None
) -> list[dict[str, Any]]:
    """What is told of held-out data, and samples."""
    answers, rows = config.stop_rate_samples, []
    if isinstance(heldout, Judged) and preference is not None and preference.heldout is not None:
        rows = [evaluate_preference(model, heldout, preference.heldout)]
        if answers:
            rows[0]["stop_rate"] = stop_rate(model, heldout, answers)
    elif heldout is not None:
        rows = [evaluate(model, heldout, answers=answers)]
    return [*rows, *samples(model, config.sample_prompts, config.sample_tokens)]


def _looked_at(
    config: Finetune, rows: Mixture, heldout: Mixture | None, first: list[Row]
) -> tuple[Finding, ...]:
    """What doctor says of the model with the tokens and template of the run, and of the data.

    Raises: ConfigError or DataError for what would spoil the run.
    """

    def prepare_sketch(model: Model) -> None:
        prepare_tokens(config, model, first, config.seed)

    rows_are_trained = {"yes": True, "no": False}
    training = Training(
        config.method,
        trains_control_rows=lambda added: (
            config.method == "full" or rows_are_trained.get(config.train_control_tokens, added)
        ),
    )
    return preflight(
        config.model,
        rows=rows,
        heldout=heldout or (),
        prepare=prepare_sketch,
        pad=config.pad_strategy,  # and once more when all of the data are read
        training=training,
        choices=(config.answer_read, config.train_on),
        max_length=config.max_length,
        allow=config.allow,
        revision=config.revision,
        use_safetensors=config.use_safetensors,
    )


def _opening(row: Row, config: Finetune) -> str | None:
    """The first words of a text that the model learns to continue; None if it learns to chat."""
    match content_of(row, config.answer_read):
        case Text(text) | Completion(text) | Segments(((text, _), *_)):
            return " ".join(text.split()[:8]) or "The"
    return None


def _dataset(rows: Mixture, model: Model, config: Finetune, limit: int) -> Encoding:
    if config.objective != "sft":
        return encode_judged(
            rows,
            tokenizer_of(model),
            model.template,
            kind_of(config.objective),
            max_length=limit,
            over_length=config.over_length,
            vocab=model.decoder.facts.vocab,
            cache=config.cache,
        )
    return encode(
        rows,
        tokenizer_of(model),
        model.template,
        max_length=limit,
        over_length=config.over_length,
        preferences=config.preferences,
        vocab=model.decoder.facts.vocab,
        train_on=config.train_on,
        cache=config.cache,
    )


def _model(
    config: Finetune, checkpoint: Path | None, first: list[Row]
) -> tuple[Model, Tokens | None]:
    """The model, and what became of its tokens if the run begins with it."""
    device = default_device()
    precision = training_compute(config.dtype, device)
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
    if checkpoint is None:
        return model, prepare_tokens(config, model, first, config.seed)
    return model, None


def _masters(config: Finetune, precision: Precision) -> torch.dtype:
    """What weights that are all trained are held in."""
    return torch.bfloat16 if config.master_dtype == "bfloat16" else precision.weights


def _prepared(config: Finetune, model: Model) -> tuple[str, ...]:
    """A census of a quantized model before and after it was made ready for training."""
    if config.method != "qlora":
        return ()
    return prepare_kbit(model.decoder, config.kbit_upcast).lines()


def _make_trainable(config: Finetune, model: Model, train: Dataset, tokens: Tokens) -> None:
    if config.method != "full":
        add_adapter(config, model, train, rows_to_train(config, model, tokens))
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


def _described(model: Model, config: Finetune) -> str:
    parameters = list(model.decoder.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    held = sum(t.nbytes for t in (*parameters, *model.decoder.buffers()))
    text = f"{config.method}, {trained / 1e6:.2f} M trained parameters, {held / 2**20:.0f} MiB"
    return text + (f", base in {model.quantization}" if model.quantization else "")


def _template_note(model: Model, config: Finetune, first: list[Row]) -> tuple[str, ...]:
    """Which template conversations were rendered by, and which of their answers are trained on."""
    if model.template is None or not chats(first, config.answer_read):
        return ()
    which = "every answer" if config.train_on == "all" else "the last answer"
    return (f"chat template: {model.template.name}; {which} of a conversation is trained on",)


def _experts_note(model: Model, config: Finetune) -> tuple[str, ...]:
    """What becomes of experts, where a model has any."""
    modules = model.decoder.modules()
    held = [p for m in modules if isinstance(m, ExpertLinear | Router) for p in m.parameters()]
    if not held:
        return ()
    adapted = sum(isinstance(module, LoraExperts) for _, module in lora_modules(model.decoder))
    fate = "trained" if config.method == "full" else "frozen: target_modules leave them out"
    if adapted:
        fate = f"frozen under adapters of their own on {adapted} maps"
    millions, balance = sum(p.numel() for p in held) / 1e6, model.decoder.facts.balance
    added = f"; {balance:g} x their load-balancing loss is minimised with the rest"
    return (f"experts: {millions:.2f} M parameters, {fate}" + (added if balance else ""),)
