"""Rules about files, config.json, and the tensors' names and shapes."""

import json
from collections.abc import Iterator
from itertools import product
from typing import Any

from ardor.doctor.checkpoint import Checkpoint, Findings, Registry
from ardor.doctor.finding import Finding, listed, many
from ardor.families import implemented

SAME_PLACE = "take config.json and the weights from the same place"


def config_file(it: Checkpoint) -> Findings:
    """config.json, generation_config.json and the tokenizer can be read."""
    for part in ("config", "generation", "tokenizer"):
        if problem := it.problems.get(part):
            yield Finding("E", f"the {part} file cannot be read", problem, "mend or replace it")


def config_value(it: Checkpoint) -> Findings:
    """Every value in config.json is one that we can honour exactly."""
    if it.trusted and it.config is not None and not implemented(it.config):
        what, fix = "transformers runs it, as Ardor does not know it", "none, if it is trusted"
        yield Finding("I", what, str(it.problems.get("family")), fix)
    elif (problem := it.problems.get("family")) and not any(heads(it)):
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


def _sections(config: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if config is not None:
        yield config
        if isinstance(inner := config.get("text_config"), dict):
            yield inner


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


def tied_keys(config: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """(section, key) wherever config.json says whether the head is the embedding."""
    found = [section for section in _sections(config) if "tie_word_embeddings" in section]
    yield from ((section, "tie_word_embeddings") for section in found or [config])


RULES: Registry = {
    "config-file": config_file,
    "config-value": config_value,
    "config-key": config_key,
    "heads": heads,
    "weights-file": weights_file,
    "pickle-only": pickle_only,
    "tensor-missing": tensor_missing,
    "tensor-unexpected": tensor_unexpected,
    "tensor-shape": tensor_shape,
}
