"""Tokens out: as transformers decodes them, whatever shares the batch, and where they end."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ardor.arch.decoder import Decoder
from ardor.errors import ConfigError, ShapeError
from ardor.generate.decode import Request, Token, decode
from ardor.generate.sample import sampler
from ardor.load import load_model
from ardor.score import token_logprobs

from .conftest import CONTEXT

PROMPTS = [[5], [40, 7, 7, 200, 3, 90, 12, 61], [250, 1, 30], [77] * 20]


def run(decoder: Decoder, prompts: Sequence[list[int]], **request) -> list[list[Token]]:
    rows: list[list[Token]] = [[] for _ in prompts]
    for token in decode(decoder, prompts, Request(**{"max_new_tokens": 12, **request})):
        rows[token.row].append(token)
    return rows


def ids(tokens: Iterable[Token]) -> list[int]:
    return [token.id for token in tokens]


def spelled(wanted: Sequence[Sequence[int]]):
    """A choice that writes the given ids, row by row, and never ends a row by itself."""
    step = iter(zip(*wanted, strict=True))
    return lambda logits: torch.tensor(next(step)[: len(logits)])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_is_transformers_greedy(path: Path, prompt):
    peer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    wanted = peer.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=25,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    decoder = load_model(path, dtype="float32").decoder
    decoder.tokens_known = None  # transformers writes ids that have no token, too
    (found,) = run(decoder, [prompt], max_new_tokens=25)
    assert ids(found) == wanted
    assert len(set(wanted)) > 5  # not one token over and over


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_repetition_penalty_is_transformers(path: Path, penalty):
    peer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompt = PROMPTS[1]
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 20}
    mask = torch.ones(1, len(prompt), dtype=torch.long)
    wanted = peer.generate(
        torch.tensor([prompt]), attention_mask=mask, repetition_penalty=penalty, **settings
    )
    decoder = load_model(path, dtype="float32").decoder
    (found,) = run(decoder, [prompt], max_new_tokens=20, repetition_penalty=penalty)
    assert ids(found) == wanted[0, len(prompt) :].tolist()
    (free,) = run(decoder, [prompt], max_new_tokens=20)
    assert ids(found) != ids(free)


def test_a_batch_of_unequal_prompts_is_each_alone(path: Path):
    decoder = load_model(path, dtype="float32").decoder
    together = run(decoder, PROMPTS)
    for row, prompt in zip(together, PROMPTS, strict=True):
        (alone,) = run(decoder, [prompt])
        assert ids(row) == ids(alone)
        assert [t.logprob for t in row] == pytest.approx([t.logprob for t in alone], abs=1e-5)
        assert [t.finished for t in row] == [t.finished for t in alone]


def test_rows_that_end_early_leave_the_others_as_they_were(model):
    free = run(model.decoder, PROMPTS)
    # A stop for the first row that no other row meets before its end, and so on.
    stop = next(id for id in ids(free[0]) if all(id not in ids(row) for row in free[1:]))
    found = run(model.decoder, PROMPTS, stops=frozenset({stop}))
    end = ids(free[0]).index(stop)
    assert end < 11
    assert ids(found[0]) == ids(free[0])[: end + 1]
    assert [ids(row) for row in found[1:]] == [ids(row) for row in free[1:]]


def test_each_logprob_is_that_of_the_model_itself(path: Path):
    decoder = load_model(path, dtype="float32").decoder
    choose = sampler(temperature=0.7, top_k=40, generator=torch.Generator().manual_seed(0))
    assert decoder.tokens_known == decoder.spec.vocab - 7
    for row, prompt in zip(
        run(decoder, PROMPTS[:3], choose=choose, repetition_penalty=1.4, banned=frozenset({3})),
        PROMPTS,
        strict=False,
    ):
        scored = token_logprobs(decoder, [*prompt, *ids(row)])[len(prompt) - 1 :]
        assert [token.logprob for token in row] == pytest.approx(scored, abs=1e-4)


def test_it_stops_at_the_first_of_several_stop_tokens(model):
    written = [9, 8, 7, 6, 5, 4]
    for stops, end in [({6}, 4), ({7, 4}, 3), ({4, 5, 9}, 1), ({3}, 6)]:
        (found,) = run(
            model.decoder,
            [[1, 2]],
            max_new_tokens=6,
            stops=frozenset(stops),
            choose=spelled([written]),
        )
        assert ids(found) == written[:end]
        reasons = [token.finished for token in found]
        assert reasons == [None] * (end - 1) + ["length" if stops == {3} else "stop_token"]


def test_a_stop_token_in_the_prompt_stops_nothing(model):
    (found,) = run(model.decoder, [[7, 7]], max_new_tokens=4, stops=frozenset({7}),
                   choose=spelled([[1, 2, 3, 4]]))  # fmt: skip
    assert ids(found) == [1, 2, 3, 4]


def test_the_context_ends_a_row_and_the_others_go_on(path: Path):
    decoder = load_model(path, dtype="float32").decoder
    long, short = [3] * (CONTEXT - 4), [4]
    found = run(decoder, [long, short], max_new_tokens=9)
    assert [len(row) for row in found] == [4, 9]
    assert found[0][-1].finished == "context" and found[1][-1].finished == "length"
    (both,) = run(decoder, [long], max_new_tokens=4)
    assert both[-1].finished == "length"  # the limit that was asked for comes first


def test_a_prompt_without_room_or_without_tokens_is_refused(model):
    with pytest.raises(ShapeError, match=f"prompt 2 has {CONTEXT} tokens, but .* holds {CONTEXT}"):
        run(model.decoder, [[1], [2] * CONTEXT])
    with pytest.raises(ShapeError, match="prompt 1 holds no tokens"):
        run(model.decoder, [[]])
    assert len(run(model.decoder, [[2] * (CONTEXT - 1)])[0]) == 1
    assert run(model.decoder, []) == []


def test_limits_outside_their_range_are_refused(model):
    with pytest.raises(ConfigError, match="max_new_tokens=0 must be at least 1"):
        run(model.decoder, [[1]], max_new_tokens=0)
    for penalty in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="repetition_penalty=.* must be above 0"):
            run(model.decoder, [[1]], repetition_penalty=penalty)


def test_an_id_that_no_token_has_is_never_chosen(model, monkeypatch):
    free = run(model.decoder, PROMPTS, max_new_tokens=20)
    seen = sorted({id for row in free for id in ids(row)})
    limit = seen[len(seen) // 2]  # as if the tokenizer ended here: the model wants more
    monkeypatch.setattr(model.decoder, "tokens_known", limit)
    banned = frozenset(seen[: len(seen) // 4])
    for choose in (None, sampler(temperature=3.0, generator=torch.Generator().manual_seed(0))):
        request = {} if choose is None else {"choose": choose}
        found = run(model.decoder, PROMPTS, max_new_tokens=20, banned=banned, **request)
        written = {id for row in found for id in ids(row)}
        assert max(written) < limit and not written & banned


def test_drawing_tokens_leaves_no_mode_on_and_takes_no_gradient(model):
    model.decoder.requires_grad_(True)
    try:
        for token in decode(model.decoder, [[1, 2]], Request(max_new_tokens=3)):
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            assert token.id >= 0
    finally:
        model.decoder.requires_grad_(False)
