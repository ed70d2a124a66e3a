"""Which of the files beside tokenizer.json decides, as in transformers 5 and 4."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from ardor.errors import TextError
from ardor.text.tokenizer import Tokenizer

FLAGS = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)


def files(folder: Path, tokenizer: Tokenizer, **named: Any) -> Path:
    """tokenizer.json and whatever else is given: config, legacy, added."""
    tokenizer.save(folder)
    for name in ("tokenizer_config", "special_tokens_map"):
        (folder / f"{name}.json").unlink()
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | named.get("config", {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for key, name in (("legacy", "special_tokens_map"), ("added", "added_tokens")):
        if key in named:
            (folder / f"{name}.json").write_text(json.dumps(named[key]))
    return folder


def token(text: str, **flags: Any) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": text, **FLAGS, **flags}


CASES: dict[str, dict[str, Any]] = {
    "config alone": {"config": {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"}},
    "objects": {"config": {"eos_token": token("<|im_end|>")}},
    "legacy wins": {
        "config": {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"},
        "legacy": {"eos_token": token("<|endoftext|>")},
    },
    "decoder silences legacy": {
        "config": {
            "eos_token": "<|im_end|>",
            "added_tokens_decoder": {"399": token("<|im_end|>", special=True)},
        },
        "legacy": {"eos_token": "<|endoftext|>"},
    },
    "new in the decoder": {
        "config": {
            "eos_token": "<|im_end|>",
            "added_tokens_decoder": {
                "{rows}": token("<new>", special=False),
                "{rows+1}": token("<|special|>", special=True),
            },
        },
    },
    "added_tokens.json": {
        # In special_tokens_map.json it would be special for transformers 4 and for us, not for 5.
        "config": {"eos_token": "<|im_end|>", "additional_special_tokens": ["<a>"]},
        "added": {"<a>": "{rows}", "<b>": "{rows+1}"},
    },
    "additional": {"config": {"additional_special_tokens": ["<|im_start|>", "hello", "<c>"]}},
    "extra": {"config": {"eos_token": "<|im_end|>", "extra_special_tokens": ["<|d|>", "the"]}},
    "named extra": {"config": {"extra_special_tokens": {"image_token": "<image>"}}},
    "unadded name": {"config": {"eos_token": "the", "unk_token": "<|pad|>"}},
}


def filled(value: Any, rows: int) -> Any:
    """`{rows}` as the next free id."""
    text = json.dumps(value)
    for name, id in (("{rows}", rows), ("{rows+1}", rows + 1)):
        text = text.replace(f'": "{name}"', f'": {id}').replace(name, str(id))
    return json.loads(text)


@pytest.mark.parametrize("case", CASES)
def test_special_tokens_are_those_that_transformers_finds(
    tokenizer: Tokenizer, tmp_path: Path, case: str
):
    named = filled(CASES[case], tokenizer.vocab_rows)
    decoder = named.get("config", {}).get("added_tokens_decoder", {})
    if "399" in decoder:
        decoder[str(tokenizer.id("<|im_end|>"))] = decoder.pop("399")
    folder = files(tmp_path, tokenizer, **named)
    ours, theirs = Tokenizer.from_directory(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for kind in ("bos", "eos", "unk", "pad"):
        assert getattr(ours.special, kind) == getattr(theirs, f"{kind}_token_id"), kind
    assert ours.added == {t.content: id for id, t in theirs.added_tokens_decoder.items()}
    for id, added in theirs.added_tokens_decoder.items():
        assert ours.is_special(id) == added.special, added.content
    for text in ("the <a><b> <|d|> hello <new><|special|><image>", "<c> the end<|im_end|>"):
        assert ours.encode(text) == theirs(text)["input_ids"]
        ids = ours.encode(text)
        assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special_tokens=True)
    # What we save says the same, to them and to us.
    ours.save(tmp_path / "saved")
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert Tokenizer.from_directory(tmp_path / "saved").special == ours.special
    for kind in ("bos", "eos", "unk", "pad"):
        assert getattr(ours.special, kind) == getattr(again, f"{kind}_token_id"), kind
    assert ours.added == {t.content: id for id, t in again.added_tokens_decoder.items()}


@pytest.mark.parametrize("kind", ["bos", "eos"])
def test_a_special_token_that_the_vocabulary_lacks_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, kind: str
):
    folder = files(tmp_path, tokenizer, config={f"{kind}_token": "<gone>"})
    with pytest.raises(TextError, match=f"{kind}_token is '<gone>', which is not in the vocab"):
        Tokenizer.from_directory(folder)
    folder = files(tmp_path, tokenizer, config={"extra_special_tokens": [7]})
    with pytest.raises(TextError, match="extra_special_tokens holds 7; expected strings"):
        Tokenizer.from_directory(folder)


def version_4(folder: Path) -> dict[str, Any]:
    """The special tokens that transformers 4 finds in files without `added_tokens_decoder`.

    Source: transformers 4.57, tokenization_utils_base.py, _from_pretrained: the map of special
    tokens is read over tokenizer_config.json; additional_special_tokens must be a list of strings.
    """
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert "added_tokens_decoder" not in config and "extra_special_tokens" not in config
    found = config | json.loads((folder / "special_tokens_map.json").read_text())
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens")
    return {name: found[name] for name in names if name in found}


def test_transformers_4_llama_cpp_and_vllm_find_the_same(tokenizer: Tokenizer, tmp_path: Path):
    ours = tokenizer.naming(eos_token="<|im_end|>")
    ours.save(tmp_path)
    found = version_4(tmp_path)
    assert found["eos_token"] == "<|im_end|>" and found["pad_token"] == "<|pad|>"
    assert sorted(found["additional_special_tokens"]) == ["<|endoftext|>", "<|im_start|>"]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    # transformers 4 rebuilds parts of a tokenizer for classes named after models, and refuses v5's.
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    # llama.cpp (gguf-py, SpecialVocab) wants each name in added_tokens of tokenizer.json.
    added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    by_text = {entry["content"]: entry for entry in added}
    for name in ("eos_token", "pad_token"):
        entry = by_text[found[name]]
        assert entry["special"] and entry["id"] == ours.id(found[name])
    assert json.loads((tmp_path / "tokenizer.json").read_text())["padding"] is None
