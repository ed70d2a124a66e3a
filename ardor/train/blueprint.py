"""What `ardor train` builds, before anything is allocated: from a preset, a file, or sizes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ardor.arch import spec as specs
from ardor.arch.grow import ROW_MULTIPLE
from ardor.arch.init import STD, WITHOUT_STD
from ardor.errors import ConfigError
from ardor.families import family_for, family_of
from ardor.families.contradictions import check
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig
from ardor.families.native import NATIVE
from ardor.families.spec_data import from_data, to_data
from ardor.files.json import read_object
from ardor.files.yaml import read_yaml, to_yaml
from ardor.text.special import SpecialTokens
from ardor.train.config import Train
from ardor.train.presets import INITS, PRESETS, STDS, starter

# Setting -> the keys under which families keep it. The first is also that of a family which has
# none of them in its file, and which refuses it by name if it does not know it.
SIZES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "tie_word_embeddings": ("tie_word_embeddings",),
    "initializer_range": ("initializer_range", "init_std"),
}
# Other names of a decoder that transformers writes, and reads back whole, as what is beside it.
_RENAMED = {
    "gemma3": "gemma3_text",
    "RefinedWeb": "falcon",
    "RefinedWebModel": "falcon",
    "gemma4": "gemma4_text",
    "llama4": "llama4_text",
    "mistral3": "mistral",
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
}


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """A decoder to be made, and the form in which it will be saved."""

    source: str  # for people: "preset gpt2-124m", or the path of a file
    spec: specs.Decoder
    family: Family
    config: Mapping[str, Any] | None  # of the family, as given; None: written from the spec
    vocab: int | None  # as the source says; None: as the tokenizer needs
    init: str
    std: float

    def with_rows(self, rows: int) -> "Blueprint":
        """The same with so many embedding rows."""
        config, inputs = self.config, self.spec.token_input
        if config is not None:
            config = {**config, "vocab_size": rows}
        if inputs is not None:  # its table has a row for each id, too
            inputs = replace(inputs, rows=rows)
            config = None if config is None else {**config, "vocab_size_per_layer_input": rows}
        spec = replace(self.spec, vocab=rows, token_input=inputs)
        return replace(self, spec=spec, config=config)

    def config_json(self, special: SpecialTokens) -> dict[str, Any]:
        """The config.json of every checkpoint."""
        bos, eos, pad = special.bos, special.eos, special.pad
        if self.config is None:
            return self.family.config(self.spec, bos=bos, eos=eos, pad=pad)
        tokens = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
        found = {**self.config, **tokens, "dtype": "float32", "torch_dtype": "float32"}
        assert self.family.spec(HFConfig(found, path="config.json")) == self.spec
        return found

    def notes(self) -> tuple[str, ...]:
        """For people: what it is, who reads it, and how its weights start."""
        if self.family is NATIVE:
            form = "no published architecture is this: only Ardor reads it"
        else:
            form = f"written as {self.family.model_type}: transformers reads it"
        spread = "" if self.init in WITHOUT_STD else f", standard deviation {self.std:g}"
        return f"model: {self.source}; {form}", f"init: {self.init}{spread}"

    def to_yaml(self) -> str:
        """The spec as a file that `--model` takes, whatever its family is."""
        return to_yaml(to_data(self.spec), header=self.notes()[0])


def read_blueprint(config: Train) -> Blueprint:
    """The model that the settings describe; its vocabulary may still change.

    Raises: ConfigError naming the preset, the flag, or the place in the file that is wrong.
    """
    if config.model is None:
        family = config.family or "llama"
        raw = starter(family, config.max_length)
        del raw["vocab_size"]
        return _of_family(raw, f"a small {family}", config, init="megatron")
    preset = PRESETS.get(config.model)
    if preset is not None:
        return _of_family(preset.config, f"preset {config.model}", config, init=preset.init)
    path = Path(config.model)
    if not path.is_file():
        raise ConfigError(_unknown(config.model, path))
    raw = read_object(path) if path.suffix == ".json" else read_yaml(path).values
    if raw.get("model_type") == NATIVE.model_type:
        raw = raw.get("spec")
    elif "model_type" in raw:
        return _of_family(raw, str(path), config)
    elif "layers" not in raw:
        raise ConfigError(
            f"{path} has neither model_type, as a config.json, nor layers, as a spec of Ardor's; "
            "docs/TRAINING.md shows both"
        )
    return _of_spec(raw, str(path), config)


def _unknown(name: str, path: Path) -> str:
    listed = f"presets: {', '.join(PRESETS)}"
    if path.is_dir():
        return (
            f"model={name} is a directory; to train its architecture anew give its config.json, "
            "and to go on with its weights use `ardor finetune`"
        )
    if path.suffix in (".yaml", ".yml", ".json"):
        return f"model={name} does not exist; give a file that does, or a preset ({listed})"
    near = get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"model={name!r} is neither a preset nor a file; {hint}{listed}"


def _of_family(
    raw: Mapping[str, Any], source: str, config: Train, init: str | None = None
) -> Blueprint:
    model_type = raw["model_type"]
    if model_type in _RENAMED:
        raise ConfigError(
            f"{source}: model_type={model_type!r} is not trained from scratch; its decoder is that "
            f"of {_RENAMED[model_type]!r}, so write it as that"
        )
    changes = _changes(raw, config)
    where = source
    if changes:
        where += f" with {', '.join(f'--{s}'.replace('_', '-') for s in _given(config))}"
    vocab = HFConfig(raw, path=where).optional_count("vocab_size")
    found = {**raw, **changes, "vocab_size": vocab or ROW_MULTIPLE}
    family = family_of(found, where)
    spec = family.spec(HFConfig(found, path=where))
    check(spec, where)
    std = HFConfig(found, path=where).number
    key = "init_std" if "init_std" in found else "initializer_range"
    return Blueprint(
        source=source,
        spec=spec,
        family=family,
        config=found,
        vocab=vocab,
        init=config.init or init or INITS.get(family.model_type, "normal"),
        std=std(key, STDS.get(family.model_type, STD)),
    )


def _changes(raw: Mapping[str, Any], config: Train) -> dict[str, Any]:
    """What the flags say, under the names that `raw` has for it."""
    found = {
        next((key for key in keys if key in raw), keys[0]): getattr(config, setting)
        for setting, keys in SIZES.items()
        if getattr(config, setting) is not None
    }
    shared, heads = "num_key_value_heads", "num_attention_heads"
    if heads in found and shared in raw and raw[shared] == raw.get(heads):
        return {shared: found[heads], **found}  # each head keeps keys of its own, unless told
    return found


def _given(config: Train) -> list[str]:
    return [setting for setting in SIZES if getattr(config, setting) is not None]


def _of_spec(data: Any, source: str, config: Train) -> Blueprint:
    kept = ("tie_word_embeddings", "initializer_range")
    if refused := [name for name in _given(config) if name not in kept]:
        flags = ", ".join(f"--{name}".replace("_", "-") for name in refused)
        raise ConfigError(
            f"{source} is a spec, which says the sizes of each layer; leave out {flags}, or change "
            "the file"
        )
    defaults = {"vocab": ROW_MULTIPLE, "max_positions": config.max_length}
    spec = from_data(data, source, defaults)
    if config.tie_word_embeddings is not None:
        spec = replace(spec, tied=config.tie_word_embeddings)
        check(spec, f"{source} with --tie-word-embeddings")
    family = family_for(spec)
    return Blueprint(
        source=source,
        spec=spec,
        family=family,
        config=None,
        vocab=spec.vocab if "vocab" in data else None,
        init=config.init or INITS.get(family.model_type, "normal"),
        std=config.initializer_range or STDS.get(family.model_type, STD),
    )
