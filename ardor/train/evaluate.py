"""What a run says about held-out data: loss, perplexity, and how many answers end by themselves."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from ardor.data.batches import Batch, BatchPlan
from ardor.data.dataset import Dataset
from ardor.data.preferences import Judged
from ardor.generate.text import Settings, chat_prompt, generate
from ardor.load import Model, tokenizer_of
from ardor.score import heldout_loss
from ardor.train.preference import LabelObjective, PairObjective

TOKENS = 8192  # of a batch; the result does not depend on it
ANSWERS = 64  # decoded side by side
ANSWER_TOKENS = 96  # an answer that is longer counts as one that does not end


def in_order(data: Dataset) -> Iterator[Batch]:
    """Every example once, in batches of about TOKENS tokens."""
    budget = max(TOKENS, int(data.lengths.max()))
    plan = BatchPlan(data, tokens_per_batch=budget, shuffle=False)
    return (plan.batch(members) for members in plan.epoch(0))


def evaluate(model: Model, heldout: Dataset, *, answers: int = 0) -> dict[str, Any]:
    """{"loss": nats per target, "perplexity", "targets"} and, if `answers`, {"stop_rate"}."""
    found = heldout_loss(model.decoder, in_order(heldout))
    loss = float(found.nats) / int(found.targets)
    row: dict[str, Any] = {
        "kind": "eval",
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "targets": int(found.targets),
    }
    if answers:
        row["stop_rate"] = stop_rate(model, heldout, answers)
    return row


def evaluate_preference(
    model: Model, heldout: Judged, objective: PairObjective | LabelObjective
) -> dict[str, Any]:
    """{"loss": per pair (or labelled answer), "examples"} with rewards, accuracy and margins.

    `objective` must be that of the held-out data. The result does not depend on batches.
    """
    batches = [*in_order(heldout)]
    model.decoder.eval()
    with torch.no_grad():
        count = objective.begin(model.decoder, batches)
        losses = [float(objective.loss(model.decoder, batch, None).nats) for batch in batches]
    loss = sum(losses) / count
    return {"kind": "eval", "loss": loss, "examples": count, **objective.tally.means()}


def stop_rate(model: Model, heldout: Dataset, count: int) -> float:
    """Share of greedy answers to the first `count` held-out prompts that end by themselves.

    A prompt is an example up to its first trained token. An answer ends by itself if the model
    writes a stop token within ANSWER_TOKENS tokens.
    """
    settings = Settings(max_new_tokens=ANSWER_TOKENS, temperature=0.0, repetition_penalty=1.0)
    prompts = []
    for index in range(min(count, len(heldout))):
        example = heldout[index]
        prompts.append(example.tokens[: max(1, example.supervised.index(True))])
    model.decoder.eval()
    ended = 0
    for start in range(0, len(prompts), ANSWERS):
        answers = generate(model, prompts[start : start + ANSWERS], settings)
        ended += sum(answer.stopped for answer in answers)
    return ended / len(prompts)


def samples(model: Model, prompts: tuple[str, ...], tokens: int) -> list[dict[str, Any]]:
    """A greedy answer to each prompt: of the chat where the model has one, else a continuation."""
    if not prompts:
        return []
    settings = Settings(max_new_tokens=tokens, temperature=0.0, repetition_penalty=1.2)
    if continues := model.template is None:
        asked = [tokenizer_of(model).encode(prompt) for prompt in prompts]
    else:
        asked = [chat_prompt(model, [{"role": "user", "content": one}]) for one in prompts]
    model.decoder.eval()
    found = generate(model, asked, settings, continues=continues)
    return [
        {"kind": "sample", "prompt": prompt, "text": answer.text}
        for prompt, answer in zip(prompts, found, strict=True)
    ]
