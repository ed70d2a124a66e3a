"""What is looked at. Each rule is a function: what it finds in a checkpoint, or nothing."""

import json
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch

from ardor.adapters.peft_files import ADAPTER_CONFIG
from ardor.doctor.checkpoint import Checkpoint
from ardor.doctor.finding import Finding, listed, many
from ardor.doctor.tensors import Statistics
from ardor.files.json import read_object
from ardor.text.tokenizer import lacks_rows

Findings = Iterator[Finding]
OUTLIER = 100.0  # times the root mean square of the tensor's others
SAME_PLACE = "take config.json and the weights from the same place"


def config_file(it: Checkpoint) -> Findings:
    """config.json, generation_config.json and the tokenizer can be read."""
    for part in ("config", "generation", "tokenizer"):
        if problem := it.problems.get(part):
            yield Finding("E", f"the {part} file cannot be read", problem, "mend or replace it")


def config_value(it: Checkpoint) -> Findings:
    """Every value in config.json is one that we can honour exactly."""
    if (problem := it.problems.get("family")) and not any(heads(it)):
        fix = "correct the key, or load the model with its own library"
        yield Finding("E", "config.json asks for what is not implemented", problem, fix)


def config_key(it: Checkpoint) -> Findings:
    """Every key in config.json is read, or known to be harmless."""
    if it.unread and it.config is not None:
        keys = [f"{key}={json.dumps(it.config[key])[:60]}" for key in it.unread]
        yield Finding(
            "E",
            f"{many(len(keys), 'key')} in config.json that nothing reads",
            listed(keys, 8),
            "correct or remove them: skipping one may change results",
        )


HEADS = (("num_attention_heads", "num_key_value_heads"), ("num_attention_heads", "num_kv_heads"))


def heads(it: Checkpoint) -> Findings:
    """The query heads share the kv heads evenly."""
    for section, (queries, keys) in product(_sections(it.config), HEADS):
        count, shared = section.get(queries), section.get(keys)
        if type(count) is not int or type(shared) is not int or shared < 1:
            continue
        if it.spec is None and count % shared:
            evidence = f"{queries}={count}, {keys}={shared}"
            fix = f"correct one of them; {SAME_PLACE}"
            yield Finding("E", "the heads cannot share the kv heads evenly", evidence, fix)


def weights_file(it: Checkpoint) -> Findings:
    """The weights are there, with every shard, and whole."""
    if problem := it.problems.get("weights"):
        said, _, remedy = problem.partition("; ")
        fix = remedy or "download or copy the files again"
        yield Finding("E", "the weights cannot be opened", said, fix)


def pickle_only(it: Checkpoint) -> Findings:
    """Some weights are no pickles."""
    if it.pickles and not it.safetensors and not it.adapter:
        fix = "load with use_safetensors=False (--no-use-safetensors), save, and use the copy"
        if it.files is None:
            fix += "; doctor looks into the weights with that flag too"
        what = "the weights are pickles alone, which can run code and are refused by default"
        yield Finding("W", what, listed(it.pickles), fix)


def tensor_missing(it: Checkpoint) -> Findings:
    """Every tensor that config.json describes is there."""
    if it.account and (names := it.account.missing):
        what = f"{many(len(names), 'tensor')} missing that config.json describes"
        yield Finding("E", what, listed(names, 8), SAME_PLACE)


def tensor_unexpected(it: Checkpoint) -> Findings:
    """Every tensor that is there has a place in the model."""
    if it.account and (names := it.account.unexpected):
        what = f"{many(len(names), 'tensor')} without a place in what config.json describes"
        yield Finding("E", what, listed(names, 8), SAME_PLACE)


def tensor_shape(it: Checkpoint) -> Findings:
    """Every tensor has the shape and dtype of its place."""
    if it.misfits:
        what = f"{many(len(it.misfits), 'tensor')} unlike what config.json describes"
        yield Finding("E", what, listed([m.partition(";")[0] for m in it.misfits], 3), SAME_PLACE)


def not_finite(it: Checkpoint) -> Findings:
    """No weight is NaN or infinite."""
    broken = [s for s in it.statistics if s.nan or s.infinite]
    if broken:
        nan, infinite = sum(s.nan for s in broken), sum(s.infinite for s in broken)
        counts = [f"{s.name} ({s.nan:,} NaN, {s.infinite:,} infinite)" for s in broken]
        yield Finding(
            "E",
            f"{nan:,} NaN and {infinite:,} infinite values in {many(len(broken), 'tensor')}",
            f"{listed(counts)} in {listed(sorted({s.file for s in broken}), 2)}",
            "take an earlier checkpoint, or download it again; training refuses it",
        )


def dead_tensor(it: Checkpoint) -> Findings:
    """No matrix is zero throughout. (Vectors may be: biases, and norms stored as w - 1.)"""
    dead = [s.name for s in _matrices(it) if s.zero]
    if dead:
        what = f"{many(len(dead), 'matrix', 'matrices')} of zeros throughout"
        fix = "check that it was trained, and saved whole"
        if it.adapter:
            what, fix = what + ": the adapter changes nothing there", "train it, or leave it out"
        yield Finding("W", what, listed(dead), fix)


def constant_rows(it: Checkpoint) -> Findings:
    """No row of a matrix holds one value throughout."""
    found = [s for s in _matrices(it) if s.constant_rows and not s.zero]
    inner = [s for s in found if it.spec is None or s.shape[0] != it.spec.vocab]
    if inner:
        facts = [f"{s.name} ({s.constant_rows:,} of {s.rows:,} rows)" for s in inner]
        what = f"{many(len(inner), 'matrix', 'matrices')} with rows of one value throughout"
        yield Finding("W", what, listed(facts, 3), "check that it was trained, and saved whole")
    for held in found:
        if held in inner:
            continue
        first = f"{held.name}, rows {listed(held.constant)}"
        what = f"{held.constant_rows:,} of {held.rows:,} rows of the vocabulary hold one value each"
        if it.tokenizer is not None and held.constant[0] >= it.tokenizer.vocab_rows:
            yield Finding("I", what, first, "none needed: the tokenizer has no such ids")
        else:
            fix = "these tokens were never trained: train their rows where texts use them"
            yield Finding("W", what, first, fix)


def outlier(it: Checkpoint) -> Findings:
    """No weight is far from all others of its tensor."""
    far = [s for s in _matrices(it) if s.largest > OUTLIER * s.rms]
    if far:
        far.sort(key=lambda s: s.rms / s.largest)
        facts = [f"{s.name} (largest {s.largest:.4g}, rms {s.rms:.4g})" for s in far]
        count = many(len(far), "matrix", "matrices")
        what = f"{count} with a value above {OUTLIER:g} times the rms of the others"
        fix = "none needed; 4-bit formats lose most in such blocks: compare scores if you quantize"
        yield Finding("I", what, listed(facts, 3), fix)


def float16_range(it: Checkpoint) -> Findings:
    """Every weight is a finite number in float16 too."""
    most = torch.finfo(torch.float16).max
    large = [s for s in it.statistics if s.dtype != torch.float16 and s.largest > most]
    if large:
        facts = [f"{s.name} (largest {s.largest:.4g})" for s in large]
        what = f"{many(len(large), 'tensor')} with values that are infinite in float16"
        yield Finding("W", what, listed(facts, 3), "load it in bfloat16 or float32")


def config_dtype(it: Checkpoint) -> Findings:
    """The dtype that config.json names is the one that most of the weights have."""
    config = it.config or {}
    said = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    sizes: dict[str, int] = {}
    for held in it.statistics:
        name = str(held.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + held.rows * (held.shape or (1,))[-1]
    stored = max(sizes, key=lambda name: sizes[name], default=said)
    if said and said != stored:
        yield Finding(
            "W",
            f"config.json says {said}, and the weights are {stored}",
            ", ".join(f"{count:,} values in {name}" for name, count in sizes.items()),
            "none for Ardor, which goes by the weights; others convert them on loading",
        )


def vocabulary(it: Checkpoint) -> Findings:
    """The embedding has a row for every id that a text can become."""
    if it.tokenizer is None or it.spec is None:
        return
    rows = it.spec.vocab
    if problem := lacks_rows(it.tokenizer, rows):
        said, _, fix = problem.partition("; ")
        yield Finding("E", "the tokenizer has ids that the embedding lacks", said, fix)
    elif it.tokenizer.vocab_rows > rows:
        over = sorted((id, text) for text, id in it.tokenizer.added.items() if id >= rows)
        yield Finding(
            "I",
            f"{many(len(over), 'added token')} beyond the embedding's {rows:,} rows",
            listed([f"{text!r} (id {id})" for id, text in over]),
            "keep them out of texts: they are refused where they occur",
        )


KINDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def special_ids(it: Checkpoint) -> Findings:
    """The ids of special tokens in the config files are ids that the model has."""
    if it.spec is None:
        return
    for file, held in (("config.json", it.config), ("generation_config.json", it.generation)):
        for key in KINDS:
            ids = _ids((held or {}).get(key))
            wrong = [id for id in ids if not 0 <= id < it.spec.vocab]
            if not wrong:
                continue
            ends = key == "eos_token_id" and wrong == ids
            yield Finding(
                "E" if ends and wrong[0] >= 0 else "W",
                f"{key} in {file} names no token of the model"
                + (": no text would end by it" if ends else ""),
                f"{key}={(held or {})[key]}, and the ids are 0 to {it.spec.vocab - 1}",
                "correct it; null says that there is none",
            )


def ends(it: Checkpoint) -> Findings:
    """The files agree on which token ends a text."""
    named = {
        "tokenizer": set(_ids(it.tokenizer and it.tokenizer.special.eos)),
        "config.json": set(_ids((it.config or {}).get("eos_token_id"))),
        "generation_config.json": set(_ids((it.generation or {}).get("eos_token_id"))),
    }
    named = {source: ids for source, ids in named.items() if ids}
    if len({frozenset(ids) for ids in named.values()}) > 1:
        apart = not set.intersection(*named.values())
        yield Finding(
            "W" if apart else "I",
            "the files name different end tokens" + (", none of them in all" if apart else ""),
            "; ".join(f"{source}: {listed(sorted(ids))}" for source, ids in named.items()),
            "Ardor stops at each of them; for other programs let generation_config.json list all",
        )


def adapter_base(it: Checkpoint) -> Findings:
    """An adapter's weights are looked at alone."""
    if it.adapter:
        named = it.attempt("adapter", lambda: read_object(it.path / ADAPTER_CONFIG)) or {}
        base = named.get("base_model_name_or_path")
        what = "it is an adapter; its base was not looked at"
        yield Finding("I", what, f"base: {base}", "run doctor on the base too")


RULES: dict[str, Callable[[Checkpoint], Findings]] = {
    "config-file": config_file,
    "config-value": config_value,
    "config-key": config_key,
    "heads": heads,
    "weights-file": weights_file,
    "pickle-only": pickle_only,
    "tensor-missing": tensor_missing,
    "tensor-unexpected": tensor_unexpected,
    "tensor-shape": tensor_shape,
    "not-finite": not_finite,
    "dead-tensor": dead_tensor,
    "constant-rows": constant_rows,
    "outlier": outlier,
    "float16-range": float16_range,
    "config-dtype": config_dtype,
    "vocabulary": vocabulary,
    "special-ids": special_ids,
    "ends": ends,
    "adapter-base": adapter_base,
}


def _sections(config: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if config is not None:
        yield config
        if isinstance(inner := config.get("text_config"), dict):
            yield inner


def _ids(value: Any) -> list[int]:
    found = value if isinstance(value, list) else [value]
    return [id for id in found if type(id) is int]


def _matrices(it: Checkpoint) -> list[Statistics]:
    """Of weights: a scale of a quantized one says nothing by being like its neighbour."""
    return [s for s in it.statistics if len(s.shape) > 1 and s.name not in it.packed]
