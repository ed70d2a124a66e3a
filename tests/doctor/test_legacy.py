"""A tokenizer without a tokenizer.json is looked at, and repaired, like any other."""

import json
from pathlib import Path

from ardor.text.tokenizer import Tokenizer

from .damage import EMBED, flag, look, said, value


def split_up(model: Path) -> None:
    """tokenizer.json as vocab.json and merges.txt, as GPT-2 has them."""
    path = model / "tokenizer.json"
    held = json.loads(path.read_text())
    merges = (" ".join(m) if isinstance(m, list) else m for m in held["model"]["merges"])
    (model / "merges.txt").write_text("\n".join(merges) + "\n")
    (model / "vocab.json").write_text(json.dumps(held["model"]["vocab"]))
    config = json.loads((model / "tokenizer_config.json").read_text())
    added = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in held["added_tokens"]}
    config |= {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": added}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    path.unlink()


def test_what_is_wrong_is_found_without_a_tokenizer_json(chat):
    before = Tokenizer.from_directory(chat)
    split_up(chat)
    now = Tokenizer.from_directory(chat)
    assert now.added == before.added and now.special == before.special
    assert not [f for f in look(chat).findings if f.level != "I"]
    value(EMBED, 279, 0.0)(chat)
    assert [level for level, _ in said(look(chat), "untrained-tokens")] == ["E"]


def test_the_copy_of_one_that_is_repaired_has_a_tokenizer_json(chat, tmp_path):
    flag("<|im_end|>", special=False)(chat)
    split_up(chat)
    report = look(chat, fix=tmp_path / "fixed")
    assert report.repaired is not None and "token-flags" in report.repaired.rules
    fixed = Tokenizer.from_directory(tmp_path / "fixed")
    assert fixed.is_special(279) and fixed.encode("the cat<|im_end|>")[-1] == 279
    assert not said(report.repaired.report, "token-flags")
