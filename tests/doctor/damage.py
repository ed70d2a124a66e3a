"""What to do to a model so that a rule has something to find, and what is then said of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ardor
from ardor.doctor import Report
from ardor.files.weights import write_weights

UP, EMBED = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
NORM = "model.layers.0.input_layernorm.weight"

Change = Callable[[Path], object]


def weights(change: Callable[[dict[str, Tensor]], object]) -> Change:
    def apply(model: Path) -> None:
        held = {name: t.clone() for name, t in load_file(model / "model.safetensors").items()}
        change(held)
        save_file(held, model / "model.safetensors")

    return apply


def value(name: str, where: Any, new: float) -> Change:
    def change(held: dict[str, Tensor]) -> None:
        held[name][where] = new

    return weights(change)


def edit(file: str, **keys: Any) -> Change:
    def apply(model: Path) -> None:
        path = model / file
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return apply


def write(file: str, text: str) -> Change:
    return lambda model: (model / file).write_text(text)


def shrunk(rows: int) -> Change:
    def apply(model: Path) -> None:
        weights(lambda held: held.update({EMBED: held[EMBED][:rows].clone()}))(model)
        edit("config.json", vocab_size=rows)(model)

    return apply


def sharded(model: Path) -> None:
    write_weights(model, load_file(model / "model.safetensors"), max_shard_bytes=20_000)
    sorted(model.glob("model-*-of-*.safetensors"))[1].unlink()


def cut_short(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


class Case(NamedTuple):
    """What to do to a model, and what is then said of it."""

    change: Change
    level: str
    says: tuple[str, ...]  # parts of what, evidence or fix


def together(*changes: Change) -> Change:
    def apply(model: Path) -> None:
        for change in changes:
            change(model)

    return apply


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Change:
    """A change of tokenizer.json."""

    def apply(model: Path) -> None:
        path = model / "tokenizer.json"
        held = json.loads(path.read_text())
        change(held)
        path.write_text(json.dumps(held))

    return apply


def flag(token: str, **flags: bool) -> Change:
    """A change of an added token."""

    def change(held: dict[str, Any]) -> None:
        next(one for one in held["added_tokens"] if one["content"] == token).update(flags)

    return tokenizer(change)


def template(source: str) -> Change:
    def apply(model: Path) -> None:
        (model / "chat_template.jinja").write_text(source)
        edit("tokenizer_config.json", chat_template=None)(model)

    return apply


def look(model: Path, **settings: Any) -> Report:
    """Without running the model, which takes longer than all the rest."""
    return ardor.doctor(model, **({"probe": False} | settings))


def said(report: Report, rule: str) -> list[tuple[str, str]]:
    return [
        (found.level, f"{found.what}\n{found.evidence}\n{found.fix}")
        for found in report.findings
        if found.rule == rule
    ]


def check(report: Report, rule: str, case: "Case") -> None:
    found = said(report, rule)
    assert case.level in [level for level, _ in found], (rule, report.findings)
    text = "\n".join(text for level, text in found if level == case.level)
    assert all(part in text for part in case.says), found
