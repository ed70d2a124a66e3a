"""Each rule about adapters, dtypes and packed weights, on a case of it and on its neighbour."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ardor
from ardor.doctor.rules import adapters, precision
from ardor.files.runs import newest_checkpoint

from .damage import EMBED, NORM, UP, edit, look, said, template, value

MODULE = UP.removesuffix(".weight")
FILE = "adapter_model.safetensors"


@pytest.fixture
def adapter(chat, tmp_path) -> Path:
    """Of rank 2 on one matrix of the chat model."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"base_model_name_or_path": str(chat), "peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": ["up_proj"]})
    )
    a, b = (f"base_model.model.{MODULE}.lora_{x}.weight" for x in "AB")
    generator = torch.Generator().manual_seed(0)
    shapes = {a: (2, 16), b: (24, 2)}
    save_file({n: torch.randn(s, generator=generator) for n, s in shapes.items()}, folder / FILE)
    return folder


def told(folder: Path, rule: str) -> str:
    return "\n".join(f"{level} {text}" for level, text in said(look(folder), rule))


def with_token(folder: Path, chat: Path) -> None:
    """The adapter's own tokenizer, with one token more."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(chat / name, folder / name)
    held = json.loads((folder / "tokenizer.json").read_text())
    held["added_tokens"].append(held["added_tokens"][-1] | {"id": 280, "content": "<|call|>"})
    (folder / "tokenizer.json").write_text(json.dumps(held))


def test_an_adapter_that_fits_is_well(adapter):
    assert look(adapter).findings == ()


def test_adapter_base(adapter, chat):
    held = load_file(adapter / FILE)
    name = next(name for name in held if name.endswith("lora_B.weight"))
    save_file(held | {name: torch.ones(20, 2)}, adapter / FILE)
    assert "is [24, 16], its adapter 20 x 16" in told(adapter, "adapter-base")
    save_file(held, adapter / FILE)
    chat.rename(chat.with_name("moved"))
    assert told(adapter, "adapter-base").startswith("E its base is not where")
    edit("adapter_config.json", base_model_name_or_path="owner/base")(adapter)
    assert told(adapter, "adapter-base").startswith("I it is an adapter")


def test_adapter_tokens(adapter, chat):
    with_token(adapter, chat)
    assert told(adapter, "adapter-tokens").startswith("E 1 token that the adapter adds")
    edit("adapter_config.json", trainable_token_indices={"embed_tokens": [280]})(adapter)
    assert not told(adapter, "adapter-tokens")
    edit("adapter_config.json", trainable_token_indices=None)(adapter)
    held = load_file(adapter / FILE)
    save_file(held | {"base_model.model.lm_head.weight": torch.ones(320, 16)}, adapter / FILE)
    assert not told(adapter, "adapter-tokens")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda"])
def test_adapter_start(adapter, start):
    edit("adapter_config.json", init_lora_weights=start)(adapter)
    assert told(adapter, "adapter-start").startswith("E the adapter began as")
    edit("adapter_config.json", init_lora_weights="gaussian")(adapter)
    assert not told(adapter, "adapter-start")


@pytest.mark.parametrize(
    ("alpha", "rslora", "level"), [(2, False, ""), (3, False, "W"), (4, False, "E"), (2, True, "W")]
)
def test_loftq_scale(adapter, alpha, rslora, level):
    edit("adapter_config.json", init_lora_weights="loftq", lora_alpha=alpha, use_rslora=rslora)(
        adapter
    )
    assert told(adapter, "loftq-scale")[:1] == level


def test_what_that_scale_leaves_of_a_quantization_error():
    """The claim of the rule: of the largest errors |1 - s| is left, where B A = W - Q."""
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    error = weight - weight.mul(4).round().div(4)
    u, s, v = torch.linalg.svd(error)
    start = (u[:, :4] * s[:4]) @ v[:4]
    for scale in (0.5, 1.0, 2.0, 4.0):
        left = torch.linalg.svdvals(u[:, :4].mT @ (error - scale * start) @ v[:4].mT)
        torch.testing.assert_close(left, abs(1 - scale) * s[:4], rtol=1e-4, atol=1e-5)


def test_adapter_tables(adapter):
    edit("adapter_config.json", modules_to_save=["lm_head"])(adapter)
    assert told(adapter, "adapter-tables").startswith("W the adapter changes the embedding")
    edit("adapter_config.json", ensure_weight_tying=True)(adapter)
    assert not told(adapter, "adapter-tables")


def test_merge_residual(adapter):
    (adapter / "ardor.json").write_text('{"quantization": "nf4"}')
    assert told(adapter, "merge-residual").startswith("I merged into 4-bit")
    held = load_file(adapter / FILE)
    save_file({name: tensor * 0.004 for name, tensor in held.items()}, adapter / FILE)
    assert told(adapter, "merge-residual").startswith("W merged into 4-bit")
    (adapter / "ardor.json").write_text('{"quantization": "none"}')
    assert not told(adapter, "merge-residual")


def test_tied_head(chat):
    held = load_file(chat / "model.safetensors")
    save_file(held | {"lm_head.weight": held[EMBED].clone()}, chat / "model.safetensors")
    assert not told(chat, "tied-head")
    save_file(held | {"lm_head.weight": held[EMBED] + 1}, chat / "model.safetensors")
    assert told(chat, "tied-head").startswith("E config.json ties the head")
    with pytest.raises(ardor.CheckpointError, match="ties the head"):
        ardor.load(chat)


# ---- dtypes and packed weights ----


def to(dtype: torch.dtype) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        held = load_file(model / "model.safetensors")
        save_file({name: t.to(dtype) for name, t in held.items()}, model / "model.safetensors")
        edit("config.json", dtype=str(dtype).removeprefix("torch."))(model)

    return change


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_hardware(chat, monkeypatch, fast):
    """What a GPU without bfloat16 would get; there is none here."""
    monkeypatch.setattr(precision, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(precision, "fast_bfloat16", lambda device: fast)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert not told(chat, "bfloat16-hardware")  # float32
    to(torch.bfloat16)(chat)
    assert bool(told(chat, "bfloat16-hardware")) is not fast


def test_float16_family(chat):
    to(torch.float16)(chat)
    assert not told(chat, "float16-family")
    edit("config.json", model_type="gemma2")(chat)
    assert told(chat, "float16-family").startswith("W gemma2 in float16")


def packed(chat: Path, **tensors: torch.Tensor) -> None:
    held = load_file(chat / "model.safetensors")
    renamed = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(held | renamed, chat / "model.safetensors")


def test_head_quantized(chat):
    up = {f"{MODULE.replace('.', '__')}__SCB": torch.ones(24)}
    packed(chat, **up)
    assert not told(chat, "head-quantized")
    edit("config.json", quantization_config={"llm_int8_skip_modules": ["up_proj"]})(chat)
    packed(chat, lm_head__SCB=torch.ones(320))
    assert "lm_head is quantized" in told(chat, "head-quantized")
    assert "llm_int8_skip_modules=['up_proj']" in told(chat, "head-quantized")


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_packed_storage(chat, tmp_path, storage):
    ardor.load(chat, quantization="nf4").save(tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    held = {name: tensor.clone() for name, tensor in load_file(file).items()}
    codes = [n for n, t in held.items() if n.endswith("_proj.weight") and t.dtype == torch.uint8]
    assert codes
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    section = config["quantization_config"] | {"bnb_4bit_quant_storage": storage}
    edit("config.json", quantization_config=section)(tmp_path / "q")
    if storage == "bfloat16":
        for name in codes:
            held[name][:2] = torch.tensor([[0xC0], [0x7F]])  # a NaN, as a bfloat16
            held[name] = held[name].flatten().view(torch.bfloat16)[:, None]
    save_file(held, file)
    text, broken = told(tmp_path / "q", "packed-storage"), told(tmp_path / "q", "not-finite")
    assert not broken  # codes are no numbers
    assert bool(text) is (storage == "bfloat16")
    assert storage == "uint8" or f"{len(codes)} quantized weights" in text
    assert storage == "uint8" or ("of them look like NaN" in text and "\n0 of" not in text)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}, "computes in float32"),
        ({"load_in_8bit": True, "llm_int8_threshold": 0.0}, "no outlier"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}, ""),
        ({"load_in_8bit": True, "llm_int8_threshold": 6.0}, ""),
    ],
)
def test_quantized_compute(chat, section: dict[str, Any], says):
    edit("config.json", quantization_config={"quant_method": "bitsandbytes"} | section)(chat)
    text = told(chat, "quantized-compute")
    assert text.startswith("I") == bool(says) and says in text


COVERED = {
    *("adapter-base", "adapter-tokens", "adapter-start", "loftq-scale", "adapter-tables"),
    *("merge-residual", "bfloat16-hardware", "float16-family", "head-quantized"),
    *("packed-storage", "quantized-compute"),
}


def test_every_rule_has_its_test():
    assert {*adapters.RULES, *precision.RULES} == COVERED
    names = {f"test_{rule.replace('-', '_')}" for rule in COVERED}
    assert names <= {*globals()}


def test_a_run_s_adapter_is_looked_at_with_its_base(adapter, chat, base):
    template((chat / "chat_template.jinja").read_text())(chat)
    value(NORM, 0, 1.5)(chat)
    assert look(adapter).findings == () and newest_checkpoint(base) is not None
