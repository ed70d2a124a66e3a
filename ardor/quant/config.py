"""What is asked for, by name or as a BitsAndBytesConfig; and what config.json says is there."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ardor.errors import ConfigError
from ardor.precision import dtype_of
from ardor.quant.bnb8 import THRESHOLD
from ardor.quant.formats import FORMATS, GROUPED, format_name

SECTION = "quantization_config"
OURS = ("format", "skip_modules", "compute_dtype")
# BitsAndBytesConfig's keys; and those of them that must have the value they have there by default.
THEIRS: dict[str, Any] = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": False,
    "load_in_8bit": False,
    "_load_in_4bit": None,
    "_load_in_8bit": None,
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_compute_dtype": None,
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_threshold": THRESHOLD,
    "llm_int8_skip_modules": None,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
}
FIXED = ("llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight")


@dataclass(frozen=True)
class Quantization:
    """To which format linear maps are quantized, which are not, and how they compute.

    `skip` adds to what is never quantized: the head, embeddings, norms and routers.
    """

    format: str  # a name of FORMATS
    skip: tuple[str, ...] = ()
    threshold: float = THRESHOLD  # of LLM.int8
    compute: torch.dtype | None = None  # None: as without quantization

    def record(self) -> str | dict[str, Any]:
        """The same for a file, as `asked` reads it: the name alone if that says all."""
        found: dict[str, Any] = {"skip_modules": [*self.skip]} if self.skip else {}
        if self.threshold != THRESHOLD:
            found["llm_int8_threshold"] = self.threshold
        if self.compute is not None:
            found["compute_dtype"] = str(self.compute).removeprefix("torch.")
        return {"format": self.format, **found} if found else self.format

    def section(self, dense: list[str], compute: torch.dtype) -> dict[str, Any]:
        """config.json's quantization_config for a model quantized so, but for the maps `dense`."""
        if grouped := GROUPED.fullmatch(self.format):
            return {
                "quant_method": "ardor",
                "bits": int(grouped["bits"]),
                "group_size": int(grouped["group"]),
                "modules_to_not_convert": dense,
            }
        eight = self.format == "llm-int8"
        kind = "fp4" if eight else self.format.removesuffix("-dq")
        loads = {"load_in_4bit": not eight, "load_in_8bit": eight}
        return {
            **THEIRS,
            **loads,
            **{f"_{key}": value for key, value in loads.items()},
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": self.format.endswith("-dq"),
            "bnb_4bit_compute_dtype": str(compute).removeprefix("torch."),
            "llm_int8_threshold": self.threshold,
            "llm_int8_skip_modules": dense,
        }


def asked(value: Any) -> Quantization | None:
    """From a name, a mapping, or an object such as transformers' BitsAndBytesConfig.

    None and "none" are None. Mappings have BitsAndBytesConfig's keys, with its meaning and its
    defaults, or "format", "skip_modules" and "compute_dtype".

    Raises: ConfigError for an unknown name or key, or a value that we cannot honour.
    """
    if value is None or value == "none":
        return None
    if isinstance(value, Quantization):
        return value
    if isinstance(value, str):
        return Quantization(format_name(value))
    if not isinstance(value, Mapping):
        told = getattr(value, "to_dict", None)
        value = told() if callable(told) else vars(value) if hasattr(value, "__dict__") else value
    if not isinstance(value, Mapping):
        raise ConfigError(f"quantization={value!r} is neither a name nor a set of settings")
    return _from_mapping(value)


def _from_mapping(given: Mapping[str, Any]) -> Quantization:
    _known(given, (*OURS, *THEIRS))
    if given.get("quant_method", "bitsandbytes") != "bitsandbytes":
        raise ConfigError(
            f"quant_method={given['quant_method']!r}: that cannot be made here; choose a format of "
            f"{', '.join(FORMATS)}, or load a checkpoint that is quantized so"
        )
    settings = {**THEIRS, **given}
    for key in FIXED:
        if settings[key] != THEIRS[key]:
            raise ConfigError(f"{key}={settings[key]!r} is not implemented; leave it out")
    threshold, skip = settings["llm_int8_threshold"], given.get("skip_modules")
    theirs = settings["llm_int8_skip_modules"]
    if type(threshold) not in (int, float) or threshold < 0:
        raise ConfigError(f"llm_int8_threshold={threshold!r} is not a number of at least 0")
    compute = given.get("compute_dtype", settings["bnb_4bit_compute_dtype"])
    return Quantization(
        _format(settings),
        (*_names("skip_modules", skip), *_names("llm_int8_skip_modules", theirs)),
        float(threshold),
        None if compute is None else dtype_of(compute),
    )


def _format(settings: Mapping[str, Any]) -> str:
    four, eight = settings["load_in_4bit"], settings["load_in_8bit"]
    name = settings.get("format")
    if [bool(name), bool(four), bool(eight)].count(True) != 1:
        raise ConfigError(
            f"quantization: found format={name!r}, load_in_4bit={four!r} and "
            f"load_in_8bit={eight!r}; give exactly one of them"
        )
    if name:
        return format_name(str(name))
    if eight:
        return "llm-int8"
    kind = settings["bnb_4bit_quant_type"]
    if kind not in ("nf4", "fp4"):
        raise ConfigError(f"bnb_4bit_quant_type={kind!r} is neither nf4 nor fp4")
    return f"{kind}-dq" if settings["bnb_4bit_use_double_quant"] else kind


def _names(key: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{key}={value!r} is not a list of names of modules")
    return tuple(names)


def _known(given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"quantization: unknown key {key!r}; {hint}")


@dataclass(frozen=True)
class Published:
    """How the linear maps of a checkpoint are quantized already."""

    method: str  # "bitsandbytes", "gptq", "awq" or "ardor"
    name: str  # as `asked` or a report says it
    bits: int
    group: int = 0
    less_one: bool = False  # GPTQ's first version
    threshold: float = THRESHOLD
    section: dict[str, Any] = field(default_factory=dict)


# Keys that change no number here, by quant_method: how it was made, or how a GPU may run it.
_HOW = """damp_percent damp_auto_increment true_sequential static_groups model_name_or_path
    model_file_base_name model_seqlen block_name_to_quantize module_name_preceding_first_block
    modules_in_block_to_quantize batch_size pad_token_id max_input_length cache_block_outputs
    dataset tokenizer use_exllama exllama_config use_cuda_fp16 disable_exllama backend meta desc_act
    sym act_group_aware quantizer mse_threshold"""
_AWQ_HOW = """modules_to_not_convert zero_point backend do_fuse modules_to_fuse fuse_max_seq_len
    exllama_config sym desc_act"""
HARMLESS: dict[str, set[str]] = {"gptq": {*_HOW.split()}, "awq": {*_AWQ_HOW.split()}}


def published(config: Mapping[str, Any], where: str) -> Published | None:
    """What config.json says, where it is a way of quantization that is read by the names of
    tensors; None if it says nothing, or names another way.

    Raises: ConfigError for a kind that is not read, or a key that nothing reads.
    """
    section = config.get(SECTION)
    if not isinstance(section, Mapping):
        return None
    given = {key: value for key, value in section.items() if value is not None}
    method = given.pop("quant_method", None)
    if method is None and (given.get("load_in_4bit") or given.get("load_in_8bit")):
        method = "bitsandbytes"  # as transformers wrote it at first
    where = f"{where}: {SECTION}"
    if method == "bitsandbytes":
        return _bitsandbytes(given, where)
    if method == "gptq":
        return _gptq(given, where)
    if method == "awq":
        return _awq(given, where)
    if method == "ardor":
        return _ardor(given, where)
    return None


def _bitsandbytes(given: dict[str, Any], where: str) -> Published:
    given.pop("llm_int8_enable_fp32_cpu_offload", None)  # of the machine that it was made on
    try:
        found = _from_mapping(given)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    bits = 8 if found.format == "llm-int8" else 4
    return Published("bitsandbytes", found.format, bits, threshold=found.threshold)


def _gptq(given: dict[str, Any], where: str) -> Published:
    bits, group = _whole(given, "bits", where), _whole(given, "group_size", where)
    form = given.pop("checkpoint_format", None) or given.pop("format", "gptq")
    given.pop("format", None)
    _one_of(where, "checkpoint_format", form, ("gptq", "gptq_v2"))
    _one_of(where, "bits", bits, (2, 4, 8))
    _one_of(where, "is_marlin_format", given.pop("is_marlin_format", False), (False,))
    _one_of(where, "pack_dtype", given.pop("pack_dtype", "int32"), ("int32",))
    _one_of(where, "dynamic", given.pop("dynamic", {}) or {}, ({},))
    _one_of(where, "lm_head", given.pop("lm_head", False), (False,))
    _finish(given, HARMLESS["gptq"], where)
    return Published("gptq", "gptq", bits, group, less_one=form == "gptq")


def _awq(given: dict[str, Any], where: str) -> Published:
    bits = given.pop("w_bit", None) or _whole(given, "bits", where)
    group = given.pop("q_group_size", None) or _whole(given, "group_size", where)
    form = given.pop("version", None) or given.pop("format", "gemm")
    given.pop("format", None)
    _one_of(where, "version", str(form).lower(), ("gemm",))
    _one_of(where, "bits", bits, (4,))
    _finish(given, HARMLESS["awq"], where)
    return Published("awq", "awq", bits, group)


def _ardor(given: dict[str, Any], where: str) -> Published:
    bits, group = _whole(given, "bits", where), _whole(given, "group_size", where)
    _one_of(where, "bits", bits, (4, 8))
    _finish(given, {"modules_to_not_convert"}, where)
    return Published("ardor", f"int{bits}-g{group}", bits, group)


def _whole(given: dict[str, Any], key: str, where: str) -> int:
    value = given.pop(key, None)
    if type(value) is not int or (value < 1 and value != -1):
        raise ConfigError(f"{where}: {key}={value!r} is not a whole number above 0, or -1")
    return value


def _one_of(where: str, key: str, value: Any, read: tuple[Any, ...]) -> None:
    if value not in read:
        names = ", ".join(str(one) for one in read)
        raise ConfigError(
            f"{where}: {key}={value!r} is not read, only {names}; load the weights it was made "
            "from, and quantize them here"
        )


def _finish(given: Mapping[str, Any], harmless: set[str], where: str) -> None:
    if unread := sorted(given.keys() - harmless):
        raise ConfigError(f"{where}: nothing reads {', '.join(unread)}, which may change results")
