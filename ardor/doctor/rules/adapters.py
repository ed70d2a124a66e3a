"""Rules about adapters: whether they fit their base, and whether what they need was trained.

Axes: R adapter rank.
"""

import math
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch

from ardor.doctor.checkpoint import Checkpoint, Findings, Registry
from ardor.doctor.finding import Finding, listed, many
from ardor.files.json import read_object
from ardor.files.runs import ORIGIN
from ardor.files.weights import WeightFiles

PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"
TABLES = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "mica")
QUANTIZATION_LOSS = 0.092  # root mean square of what NF4 loses, of that of a Gaussian weight
SHOWN = 0.3  # share of the loss below which an adapter does not survive it


class _Pair(NamedTuple):
    module: str  # as the base names it
    a: str  # tensors of the adapter
    b: str


def adapter_base(it: Checkpoint) -> Findings:
    """An adapter's base is here, and its adapters have the shapes of the base's weights."""
    if not it.adapter:
        return
    named = it.adapter_config.get("base_model_name_or_path")
    if it.base is None:
        absolute = isinstance(named, str) and named.startswith("/")
        yield Finding(
            "E" if absolute else "I",
            "its base is not where the adapter says"
            if absolute
            else "it is an adapter; its base was not looked at",
            f"base: {named}",
            "give the base's new place as the model, and this as adapter; run doctor on it too",
        )
        return
    base, files = it.base.files, it.files
    if base is None or files is None:
        return
    wrong = []
    for pair in _pairs(files):
        shape = _shape(base, f"{pair.module}.weight")
        inputs, outputs = files.shape(pair.a)[1], files.shape(pair.b)[0]
        if shape is not None and {inputs, outputs} != {*shape} and (inputs, outputs) != shape[::-1]:
            wrong.append(f"{pair.module} is {list(shape)}, its adapter {outputs} x {inputs}")
    if wrong:
        fix = "take the base that it was trained on"
        what = f"{many(len(wrong), 'adapter')} that do not fit the base"
        yield Finding("E", what, listed(wrong, 3), fix)


def adapter_tokens(it: Checkpoint) -> Findings:
    """Tokens that the adapter's tokenizer adds to the base's have rows, and these were trained."""
    base = it.base
    if not it.adapter or base is None or base.tokenizer is None or it.tokenizer is None:
        return
    added = {
        id: text for text, id in it.tokenizer.added.items() if text not in base.tokenizer.added
    }
    if not added:
        return
    names = it.files.names() if it.files is not None else ()
    whole = any(table in name and "lora" not in name for name in names for table in TABLES)
    kept = it.adapter_config.get("trainable_token_indices") or ()
    rows = set(kept if isinstance(kept, list) else chain(*kept.values()) if kept else ())
    whole = whole and not rows
    frozen = [f"{text!r} ({id})" for id, text in added.items() if id not in rows]
    if frozen and not whole:
        yield Finding(
            "E",
            f"{many(len(frozen), 'token')} that the adapter adds and never trained",
            listed(frozen),
            "train their rows: --train-control-tokens yes (trainable_token_indices in PEFT)",
        )
    beyond = [f"{text!r} ({id})" for id, text in added.items() if it.rows and id >= it.rows]
    if beyond and not whole:
        yield Finding(
            "E",
            f"{many(len(beyond), 'token')} of the adapter without a row in the base",
            f"{listed(beyond)}; the base has {it.rows:,} rows",
            "give the base the rows that it was trained with, and save it",
        )


def adapter_start(it: Checkpoint) -> Findings:
    """The adapter works on the base as it is published: it did not begin by changing that."""
    start = str(it.adapter_config.get("init_lora_weights", True)).lower()
    if start.startswith(CHANGES_BASE):
        yield Finding(
            "E",
            f"the adapter began as {start}, which takes its start out of the base's weights",
            f"init_lora_weights={start!r}; on the original base it counts twice",
            "convert it with PEFT (path_initial_model_for_weight_conversion), or use its own base",
        )


def loftq_scale(it: Checkpoint) -> Findings:
    """LoftQ began with the scale that the adapter is applied with.

    PEFT starts with B A = W - Q and applies s B A: at s = 2 that mends nothing, above it is worse
    than no start at all.
    """
    config = it.adapter_config
    loftq = str(config.get("init_lora_weights", True)).lower() == "loftq"
    r, alpha = config.get("r"), config.get("lora_alpha")
    if not loftq or not isinstance(r, int) or not isinstance(alpha, int | float) or not r:
        return
    scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    if not math.isclose(scale, 1.0):
        yield Finding(
            "E" if scale >= 2 else "W",
            "LoftQ's start passes over the adapter's scale",
            f"scale {scale:g}: the largest errors of quantization become {abs(1 - scale):g} of "
            "what they were, instead of 0",
            "begin again with lora_alpha = r",
        )


def adapter_tables(it: Checkpoint) -> Findings:
    """No adapter lies on one of two matrices that are one in the base."""
    base = it.base
    if not it.adapter or base is None or base.spec is None or not base.spec.tied:
        return
    saved = it.adapter_config.get("modules_to_save") or ()
    targets = it.adapter_config.get("target_modules") or ()
    held = [
        name
        for name in (*saved, *(targets if isinstance(targets, list) else ()))
        if (name.rpartition(".")[2] in TABLES)
    ]
    if held and not it.adapter_config.get("ensure_weight_tying"):
        yield Finding(
            "W",
            "the adapter changes the embedding or the head, which are one matrix in the base",
            f"{listed(sorted({*held}))}, and the base ties them",
            "train rows (trainable_token_indices), which stay tied; merged, set "
            "tie_word_embeddings to false",
        )


def merge_residual(it: Checkpoint) -> Findings:
    """What merging this adapter into 4-bit weights would leave of it.

    For information while it is larger than what NF4 loses. Source: PITFALLS H11: at a hundredth of
    the loss the adapter is gone after requantizing; a merge into 16 bits keeps it.
    """
    if not it.adapter or it.base is None or it.base.files is None or it.files is None:
        return
    if not (it.path / ORIGIN).exists():
        return
    held = (read_object(it.path / ORIGIN)).get("quantization", "none")
    share = _residual(it, it.base.files)
    if held in ("none", None) or share is None:
        return
    yield Finding(
        "W" if share < SHOWN else "I",
        "merged into 4-bit weights, this adapter would "
        + ("be lost" if share < SHOWN else "lose a part of itself"),
        f"its changes are {share:.2g} times what quantization loses; trained on a base in {held}",
        "merge it into 16-bit weights, which is what Ardor does",
    )


def _residual(it: Checkpoint, base: WeightFiles) -> float | None:
    """Root mean square of the first adapter's change, over what NF4 loses of its weight."""
    config, files = it.adapter_config, it.files
    r, alpha = config.get("r"), config.get("lora_alpha")
    if files is None or not isinstance(r, int) or not isinstance(alpha, int | float):
        return None
    scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    for pair in _pairs(files):
        if _shape(base, f"{pair.module}.weight") is None:
            continue
        weight = base.read(f"{pair.module}.weight").float()
        change = scale * files.read(pair.b).float() @ files.read(pair.a).float()
        loss = QUANTIZATION_LOSS * float(weight.square().mean().sqrt())
        return float(change.square().mean().sqrt()) / max(loss, torch.finfo(torch.float32).tiny)
    return None


def _pairs(files: WeightFiles) -> Iterator[_Pair]:
    names = {*files.names()}
    for name in files.names():
        other = name.removesuffix(A) + B
        if name.endswith(A) and other in names:
            yield _Pair(name.removesuffix(A).removeprefix(PREFIX), name, other)


def _shape(base: WeightFiles, name: str) -> tuple[int, ...] | None:
    """Of a plain matrix; None for what is not there, or packed."""
    if name not in base.names() or not base.dtype(name).is_floating_point:
        return None
    shape = base.shape(name)
    return shape if len(shape) == 2 else None


RULES: Registry = {
    "adapter-base": adapter_base,
    "adapter-tokens": adapter_tokens,
    "adapter-start": adapter_start,
    "loftq-scale": loftq_scale,
    "adapter-tables": adapter_tables,
    "merge-residual": merge_residual,
}
