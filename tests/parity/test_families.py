"""Every family, through files: what transformers computes, we compute, however it is asked.

For each configuration in `cases`: logits on every backend; one token at a time with a cache, past
windows and scaling's switches; a padded batch there against rows here; packed documents against
separate ones; the gradients of all parameters; and saving, bit for bit.
"""

import pytest
import torch

import ardor
from ardor.arch.cache import KVCache
from ardor.arch.layout import Packed
from ardor.generate.decode import Request, decode

from .cases import CASES
from .peer import (
    CLOSE,
    Case,
    T,
    assert_config_kept,
    contents,
    logits,
    peer,
    reader,
    reloaded,
    saved,
    tokens,
)

FIRST = {case.model_type: name for name, case in reversed(CASES.items())}.values()
sweep = pytest.mark.sweep

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
both = pytest.mark.parametrize("attn", ["sdpa", pytest.param("eager", marks=sweep)])


@both
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[] if name in FIRST else sweep)
        for name, case in CASES.items()
    ],
)
def test_logits_are_those_of_transformers(tmp_path, case, attn):
    theirs = peer(case)
    expected = logits(theirs, tokens())
    assert expected.std() > 0.3  # an error would show
    ours = ardor.load(saved(theirs, tmp_path), attn_implementation=attn).logits(tokens())
    torch.testing.assert_close(ours, expected, **CLOSE)


@sweep
@torch.no_grad()
@every_case
def test_one_token_at_a_time_gives_the_logits_of_the_whole_text_so_far(tmp_path, case):
    """Their whole text, read again for every length: their cache can be stale (longrope)."""
    theirs = peer(case)
    decoder = ardor.load(saved(theirs, tmp_path)).model.decoder
    ids, start = tokens(2), 3
    cache = KVCache(decoder.spec, rows=2, capacity=T, dtype=torch.float32)
    for stop in (start, *range(start + 1, T + 1)):
        if cache.stale(stop - cache.past[0]):
            cache.past = [0, 0]  # what decoding does: the texts are read again from their start
        read = ids[:, cache.past[0] : stop]
        found = decoder.logits(decoder.hidden(read, cache=cache)[:, -1])
        cache.advance(read.shape[1])
        torch.testing.assert_close(found, logits(theirs, ids[:, :stop])[:, -1], **CLOSE)


@sweep
@every_case
def test_left_padded_rows_there_are_plain_rows_here(tmp_path, case):
    if not case.batched:
        pytest.skip("there a row depends on how long the others of its batch are")
    theirs = peer(case)
    lm = ardor.load(saved(theirs, tmp_path))
    ids, mask = tokens(3), torch.ones(3, T, dtype=torch.long)
    lengths = (T, T - 5, 1)
    for row, length in enumerate(lengths):
        mask[row, : T - length] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    given = {"attention_mask": mask, "position_ids": positions}
    expected = logits(theirs, ids, **{key: given[key] for key in case.padding})
    for row, length in enumerate(lengths):
        ours = lm.logits(ids[row : row + 1, T - length :])
        torch.testing.assert_close(ours[0], expected[row, T - length :], **CLOSE)


@sweep
@torch.no_grad()
@both
@every_case
def test_packed_documents_are_separate_ones(tmp_path, case, attn):
    theirs, ids = peer(case), tokens(2)
    decoder = ardor.load(saved(theirs, tmp_path), attn_implementation=attn).model.decoder
    packed = Packed(((T - 7, 4, 3), (2, 1, T - 3)))
    found = decoder.logits(decoder.hidden(ids, packed))
    for row, lengths in enumerate(packed.lengths):
        start = 0
        for length in lengths:
            piece = slice(start, start + length)
            expected = logits(theirs, ids[row : row + 1, piece])
            torch.testing.assert_close(found[row : row + 1, piece], expected, **CLOSE)
            start += length


@sweep
@every_case
def test_gradients_of_all_parameters_are_those_of_transformers(tmp_path, case):
    theirs, ids = peer(case), tokens()
    lm = ardor.load(saved(theirs, tmp_path))
    decoder = lm.model.decoder.requires_grad_(True)

    def loss(scores):
        return torch.nn.functional.cross_entropy(
            scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )

    loss(reader(theirs)(ids, use_cache=False).logits).backward()
    loss(lm.logits(ids)).backward()
    named = dict(decoder.named_parameters())
    untouched = {name for name, p in named.items() if p.grad is None}
    assert all(name.endswith("correction") for name in untouched)  # chosen by it, not made from it

    # Their gradients, under the names on disk, are read as if they were weights.
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    gradients = ardor.load(saved(theirs, tmp_path / "gradients")).model.decoder
    for name, gradient in gradients.named_parameters():
        if name in untouched:
            continue
        found = named[name].grad
        assert found is not None
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-4, msg=name)
    largest = max(float(p.abs().max()) for p in gradients.parameters())
    assert largest > 0.1  # an error would show


@sweep
@every_case
def test_what_is_loaded_is_saved_bit_for_bit(tmp_path, case):
    theirs = peer(case).bfloat16() if case.in_bfloat16 else peer(case)
    before = saved(theirs, tmp_path / "before")
    ardor.load(before).save(tmp_path / "after")
    assert contents(tmp_path / "after") == contents(before)
    assert_config_kept(tmp_path / "after", before)
    again = logits(reloaded(tmp_path / "after", case), tokens())
    assert torch.equal(again, logits(reloaded(before, case), tokens()))


def test_the_cases_name_the_family_that_they_are_of():
    assert all(isinstance(case, Case) and ": " in name for name, case in CASES.items())


@sweep
@every_case
def test_a_batch_of_unequal_prompts_generates_what_each_does_alone(tmp_path, case):
    """Greedy, past the windows of the cases; padding is a length, so there is no side to it."""
    decoder = ardor.load(saved(peer(case), tmp_path), dtype="float32").model.decoder
    longest = tokens(1)[0].tolist()
    room = decoder.facts.max_positions - 7
    prompts = [longest[:3], longest[: min(T - 2, room)], longest[4:5], longest[2:9]]
    request = Request(max_new_tokens=6)
    together: list[list[tuple[int, float]]] = [[] for _ in prompts]
    for token in decode(decoder, prompts, request):
        together[token.row].append((token.id, token.logprob))
    for row, prompt in zip(together, prompts, strict=True):
        alone = [(token.id, token.logprob) for token in decode(decoder, [prompt], request)]
        assert [id for id, _ in row] == [id for id, _ in alone]
        assert [p for _, p in row] == pytest.approx([p for _, p in alone], abs=1e-4)
