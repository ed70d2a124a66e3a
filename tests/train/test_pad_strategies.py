"""Whatever pads, a model learns to stop; masked by the id of a padding EOS, it never does."""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from ardor.load import tokenizer_of
from ardor.train import finetune
from ardor.train.config import Finetune
from ardor.train.evaluate import stop_rate

from ..test_vocabulary import made
from ..tiny import WORDS, write_rows


def counting(path: Path, count: int, seed: int) -> Path:
    """Some words and a digit; the answer is as many times "cat". Lengths differ in every batch."""
    chosen = Random(seed)
    rows = []
    for _ in range(count):
        words, number = chosen.choices(WORDS, k=chosen.randint(1, 5)), chosen.randint(1, 4)
        rows.append({"prompt": f"{' '.join(words)} {number}:", "completion": " cat" * number})
    return write_rows(path, rows)


def trained(folder: Path, base: Path, strategy: str) -> tuple[Any, float]:
    """A run of all weights, and the share of 100 held-out prompts whose answers end."""
    folder.mkdir(exist_ok=True)
    data = counting(folder / "d.jsonl", 300, 1)
    heldout = counting(folder / "h.jsonl", 100, 2)
    config = Finetune(
        model=str(base),
        data=str(data),
        eval_data=str(heldout),
        output=folder / f"run-{strategy}",
        method="full",
        pad_strategy=strategy,
        max_steps=60,
        learning_rate=1e-2,
        per_device_train_batch_size=16,
        eval_on_start=False,
        dtype="float32",
    )
    run = finetune.prepare(config)
    list(run.events())
    assert run.heldout is not None
    return run.model, stop_rate(run.model, run.heldout, 100)


@pytest.mark.slow
def test_every_pad_strategy_learns_to_stop_and_masking_by_id_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bare = made(tmp_path / "bare")
    cases = {
        "auto": made(tmp_path / "reserved", reserve="<|finetune_right_pad_id|>"),
        "unk": made(tmp_path / "unk", unk_token="<unk>"),
        "eos": bare,
        "new": bare,
    }
    pads = {}
    for strategy, base in cases.items():
        model, rate = trained(tmp_path, base, strategy)
        assert rate >= 0.99, strategy
        special = tokenizer_of(model).special
        pads[strategy] = tokenizer_of(model).token(special.pad)
        assert model.generation_config["pad_token_id"] == special.pad
    assert pads == {
        "auto": "<|finetune_right_pad_id|>",
        "unk": "<unk>",
        "eos": "<|endoftext|>",
        "new": "<|pad|>",
    }
    right = finetune.split

    def masked_by_id(*given: Any) -> Any:
        """labels[labels == pad_id] = -100, as collators of other tools do."""
        train, heldout = right(*given)
        kept = train.tokens != 268  # <|endoftext|>, which pads
        assert (train.tokens == 268).sum() >= len(train)
        return replace(train, supervised=train.supervised & kept), heldout

    monkeypatch.setattr(finetune, "split", masked_by_id)
    wrong, rate = trained(tmp_path / "wrong", bare, "eos")
    assert tokenizer_of(wrong).special.pad == tokenizer_of(wrong).special.eos == 268
    assert rate <= 0.5
