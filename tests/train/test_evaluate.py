"""Held-out data: what is said of them does not depend on how they are batched."""

import math
from dataclasses import replace

import pytest
import torch

from ardor.data.dataset import Dataset
from ardor.data.readers import Row
from ardor.generate.settings import Settings
from ardor.load import load_model, tokenizer_of
from ardor.loss import next_token_loss
from ardor.train import evaluate as evaluate_module
from ardor.train.evaluate import evaluate

from ..tiny import sentences
from .conftest import prepare, train_config

pytestmark = pytest.mark.sweep


def test_evaluation_does_not_depend_on_how_it_is_batched(base, monkeypatch):
    model = load_model(base("llama"), dtype="float32")
    heldout = Dataset.from_documents(sentences(30, seed=7), tokenizer_of(model))
    found = evaluate(model, heldout)
    losses = []
    for tokens in (1, 70, 10_000):  # one document at a time; a few; all of them
        monkeypatch.setattr(evaluate_module, "TOKENS", tokens)
        row = evaluate(model, heldout)
        assert row["targets"] == found["targets"] == heldout.census.targets
        losses.append(row["loss"])
    assert losses == pytest.approx([found["loss"]] * 3, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    each = []
    for index in range(len(heldout)):
        ids = torch.tensor([heldout[index].tokens])
        loss = next_token_loss(
            model.decoder.token_logits(model.decoder.hidden(ids))[:, :-1], ids[:, 1:]
        )
        each.append(float(loss.nats))
    assert found["loss"] == pytest.approx(sum(each) / found["targets"], rel=1e-6)


def test_of_one_long_document_the_end_is_held_out_and_of_few_examples_nothing(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(" ".join(sentences(200)))
    run = prepare(train_config(path, tmp_path / "a", max_steps=1))
    assert run.heldout is not None and len(run.heldout) == round(
        0.1 * len([*run.train, *run.heldout])
    )
    path.write_text("the cat sat on the mat.")
    assert prepare(train_config(path, tmp_path / "b", max_steps=1)).heldout is None


def test_the_stop_rate_counts_answers_to_held_out_prompts_that_end(base, monkeypatch):
    model = load_model(base("llama"), dtype="float32")
    rows = [
        Row({"prompt": p, "completion": f" {c}"}, f"row {i}")
        for i, (p, c) in enumerate(zip(sentences(9, 1), sentences(9, 2), strict=True))
    ]
    heldout = Dataset.build(rows, tokenizer_of(model))
    asked = []
    real = evaluate_module.generate

    def generate(model, prompts, settings):
        asked.extend(prompts)
        return real(model, prompts, settings)

    monkeypatch.setattr(evaluate_module, "generate", generate)
    monkeypatch.setattr(evaluate_module, "ANSWERS", 4)  # several batches
    monkeypatch.setattr(evaluate_module, "ANSWER_TOKENS", 3)
    free = evaluate(model, heldout, answers=7)
    assert [tokenizer_of(model).decode(ids) for ids in asked] == sentences(9, 1)[:7]
    answers = real(model, asked, Settings(max_new_tokens=3, temperature=0.0))
    assert free["stop_rate"] == sum(a.stop_reason == "stop_token" for a in answers) / 7
    firsts = [answer.tokens[0] for answer in answers]
    model.stops = replace(model.stops, ids=frozenset(firsts[:1]))
    assert evaluate(model, heldout, answers=7)["stop_rate"] >= firsts.count(firsts[0]) / 7 > 0
    model.stops = replace(model.stops, ids=frozenset(range(model.decoder.spec.vocab)))
    assert evaluate(model, heldout, answers=99)["stop_rate"] == 1.0
    model.stops = replace(model.stops, ids=frozenset())
    assert evaluate(model, heldout, answers=2)["stop_rate"] == 0.0
    assert "stop_rate" not in evaluate(model, heldout)
