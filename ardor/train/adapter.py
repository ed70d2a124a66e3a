"""The adapter of a fine-tuning run: its settings, and what its beginning needs."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ardor.adapters.config import ALL_LINEAR, LoraConfig
from ardor.adapters.initial import Sources, dense_weight, principal_inputs
from ardor.adapters.lora import add_lora, is_experts, select, select_saved
from ardor.arch.layout import Packed
from ardor.data.batches import BatchPlan
from ardor.data.dataset import Dataset
from ardor.errors import ConfigError
from ardor.files.pages import release
from ardor.load import Model, load_model
from ardor.train.config import Finetune, pattern_of

Rows = tuple[int, ...] | Mapping[str, tuple[int, ...]]
_REGEX = re.compile(r"[\\^$*+?()\[\]|]")  # in a name, none of these


def lora_config(config: Finetune, rows: Rows) -> LoraConfig:
    """What the settings of a run say of its adapter."""
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=_names(config.target_modules),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        lora_bias=config.lora_bias,
        init_lora_weights=config.init_lora_weights,
        exclude_modules=_names(config.exclude_modules),
        modules_to_save=config.modules_to_save,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        rank_pattern={
            key: int(r) for key, r in pattern_of("rank_pattern", config.rank_pattern).items()
        },
        alpha_pattern=pattern_of("alpha_pattern", config.alpha_pattern),
        trainable_token_indices=rows,
    )


def add_adapter(
    config: Finetune,
    model: Model,
    data: Dataset,
    rows: Rows,
) -> None:
    """Put the run's adapter on its model, quantized or not.

    Raises: ConfigError for what cannot be adapted or begun so, before anything is changed.
    """
    adapter = lora_config(config, rows)
    disk = model.form.disk_linears()

    def names(name: str) -> str:
        return disk[name].name if name in disk else name

    saved = select_saved(model.decoder, adapter, names)
    left = {name: ids for name, ids in adapter.token_rows.items() if name not in saved}
    if left != adapter.token_rows:  # rows of what is trained in full need no training of their own
        adapter = replace(adapter, trainable_token_indices=left)
    targets = select(model.decoder, adapter, names)
    _require_apart(targets, adapter.token_rows)
    _require_places(targets, disk.keys())
    sources = Sources()
    if adapter.init_lora_weights == "loftq":
        sources = Sources(originals=originals(model))
    if adapter.init_lora_weights == "eva":
        ranks = {
            name: adapter.rank((name, names(name)))
            for name in targets
            if name != "embed_tokens" and not is_experts(model.decoder.get_submodule(name))
        }
        found = principal_inputs(model.decoder, ranks, _batches(config, model, data))
        sources = Sources(inputs=found)
    generator = torch.Generator().manual_seed(config.seed)
    add_lora(model.decoder, adapter, names=names, generator=generator, sources=sources)
    model.adapter = adapter


def originals(model: Model) -> Callable[[str], Tensor]:
    """The full weights under a quantized model, read again from its checkpoint as they are needed.

    The pages of a mapped weight are given back when the next one is asked for.

    Raises: ConfigError for a checkpoint that holds its weights packed.
    """
    full = load_model(model.source, quantization="none", revision=model.revision)
    if full.quantization is not None:
        raise ConfigError(
            f"init_lora_weights=loftq needs the full weights, but {model.source} holds them as "
            f"{full.quantization}; give the checkpoint it was made from"
        )
    held: list[Tensor] = []

    def weight(name: str) -> Tensor:
        for tensor in held:
            release(tensor)
        module = full.decoder.get_submodule(name)
        held[:] = [parameter.data for parameter in module.parameters()]
        return dense_weight(module)

    return weight


def _names(given: tuple[str, ...]) -> str | tuple[str, ...]:
    """A lone regular expression, or all-linear, is a string for PEFT; names are a list."""
    if given == (ALL_LINEAR,) or (len(given) == 1 and _REGEX.search(given[0])):
        return given[0]
    if ALL_LINEAR in given:
        raise ConfigError(
            f"target_modules={' '.join(given)}: {ALL_LINEAR} stands alone; train others in full "
            "with modules_to_save"
        )
    return given


def _require_apart(targets: tuple[str, ...], rows: Mapping[str, tuple[int, ...]]) -> None:
    twice = next((name for name in targets if name in rows), None)
    if twice is not None:
        raise ConfigError(
            f"target_modules adapts {twice} as a whole, but {len(rows[twice])} rows of it were "
            "never trained (new tokens, or the chat template's control tokens) and train by "
            f"themselves; give --modules-to-save {twice} instead, or, for control tokens, "
            "--train-control-tokens no"
        )


def _require_places(targets: tuple[str, ...], places: Collection[str]) -> None:
    lost = [name for name in targets if name not in places]
    if lost:
        raise ConfigError(
            f"{len(lost)} targets, such as {lost[0]}, have no place in adapter files for this "
            "model and would stay frozen; leave them out: --exclude-modules '.*experts.*'"
        )


def _batches(config: Finetune, model: Model, data: Dataset) -> Iterator[Callable[[], object]]:
    """The first micro-batches of the run, as forward passes."""
    by_tokens = config.tokens_per_batch
    plan = BatchPlan(
        data,
        tokens_per_batch=by_tokens,
        examples_per_batch=None if by_tokens else config.per_device_train_batch_size,
        seed=config.seed,
    )
    decoder = model.decoder
    for members in [*plan.epoch(0)][: config.eva_batches]:
        batch = plan.batch(members)
        yield partial(decoder.hidden, batch.tokens.to(decoder.device), Packed((batch.lengths,)))
