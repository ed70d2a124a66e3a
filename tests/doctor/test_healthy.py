"""Models as they are published are well: no error and no warning in any family, or template."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import ardor

from ..parity.cases import CASES
from ..parity.peer import Case, peer
from .damage import edit, look, template

FIRST = {
    case.model_type: case for case in reversed(CASES.values()) if "text_config" not in case.keys
}
QUICK = ("llama", "qwen3", "gemma2", "gpt2", "mixtral", "bloom")
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL_1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + "
    "' [/INST]' }}{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
QWEN_3 = (
    "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and not loop.last %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last and '<think>' not in c %}"
    "<think>\n\n</think>\n\n{% endif %}{{ c }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def beside(folder: Path, base: Path) -> None:
    """The tokenizer of the base, and a config that names its ends."""
    newest = sorted(base.glob("checkpoint-*"))[-1]
    for name in TEXT_FILES:
        shutil.copy(newest / name, folder / name)
    file = folder / "generation_config.json"
    if file.exists():
        edit(file.name, eos_token_id=276, pad_token_id=277, bos_token_id=None)(folder)


def model_of(case: Case, folder: Path, base: Path) -> None:
    sizes = dict(case.sizes) | {"vocab_size": 320, "eos_token_id": 276, "pad_token_id": 277}
    per_layer = {key: 320 for key in (*sizes, *case.keys) if key.startswith("vocab_size_per")}
    sizes |= {"bos_token_id": None}
    peer(replace(case, sizes=sizes, keys={**case.keys, **per_layer})).save_pretrained(folder)
    edit("config.json", eos_token_id=276, pad_token_id=277, bos_token_id=None)(folder)
    beside(folder, base)


def assert_well(folder: Path) -> None:
    report = ardor.doctor(folder, probe=True)
    assert not [found for found in report.findings if found.level != "I"], report.findings
    assert report.probe is not None and report.probe.failed is None and report.exit_code == 0


@pytest.mark.parametrize(
    "kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in FIRST]
)
def test_a_family_as_transformers_saves_it(tmp_path, base, kind):
    model_of(FIRST[kind], tmp_path, base)
    assert_well(tmp_path)


@pytest.mark.parametrize(
    ("source", "ends", "remarks"),
    [
        (LLAMA_3, "<|eot_id|>", {"double-bos"}),
        (GEMMA, "<end_of_turn>", {"double-bos", "roles"}),
        (MISTRAL_1, "<|endoftext|>", {"double-bos", "roles"}),
        (QWEN_3, "<|im_end|>", {"keeps-past"}),
        (PHI_3, "<|end|>", {"token-strips", "keeps-past"}),
    ],
)
def test_a_template_as_it_is_published(chat, source, ends, remarks):
    """Remarks are what its authors know of; one that pads with its end is well, too."""
    used = [w for w in WORDS if w in source or ("'<|' + m.role" in source and w.startswith("<|"))]
    held = json.loads((chat / "tokenizer.json").read_text())
    flags = {"special": True, "rstrip": source == PHI_3}
    fresh = [word for word in used if word not in [one["content"] for one in held["added_tokens"]]]
    for id, word in enumerate(fresh, 280):
        held["added_tokens"].append(held["added_tokens"][-1] | flags | {"id": id, "content": word})
    if "<think>" in used:
        for one in held["added_tokens"]:
            one["special"] &= "think" not in one["content"]
    if "bos_token" in source:
        piece = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
        around = [piece, {"Sequence": {"id": "A", "type_id": 0}}]
        token = {"id": "<|im_start|>", "ids": [278], "tokens": ["<|im_start|>"]}
        held["post_processor"] = {
            "type": "TemplateProcessing",
            "single": around,
            "pair": around,
            "special_tokens": {"<|im_start|>": token},
        }
        for name in TEXT_FILES[1:]:
            edit(name, bos_token="<|im_start|>")(chat)
    (chat / "tokenizer.json").write_text(json.dumps(held))
    template(source)(chat)
    id = next(one["id"] for one in held["added_tokens"] if one["content"] == ends)
    for name in ("config.json", "generation_config.json"):
        edit(name, eos_token_id=[id, 276], pad_token_id=277)(chat)
    report = look(chat)
    assert {found.rule for found in report.findings} == remarks, report.findings
    assert report.exit_code == 0


WORDS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>")
WORDS += ("<end_of_turn>", "[INST]", "[/INST]", "<think>", "</think>")
WORDS += ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
