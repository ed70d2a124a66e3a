"""From rows to tokens: the shift, the length limit, and counts that add up."""

import json
import pickle
from dataclasses import replace
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ardor.data import dataset as dataset_module
from ardor.data.dataset import Dataset, permutation, shift
from ardor.data.encode import Encoded, marked
from ardor.data.formats import read
from ardor.data.lengths import keep_end, policy_of
from ardor.data.readers import Row
from ardor.data.sources import read_rows
from ardor.errors import ConfigError, DataError, ShapeError
from ardor.loss import IGNORE
from ardor.text.chat import CHATML
from ardor.text.example import Example, completion, document
from ardor.text.special import SpecialTokens

STOP, BOS = 9, 1


def build(monkeypatch, tokenizer, examples, *, bos=None, **options):
    """A dataset of ready-made examples, one per row, as if they had been encoded."""
    rows = [Row({"prompt": "", "completion": ""}, f"row {i}") for i in range(len(examples))]

    def encoded(rows):
        for row, example in zip(rows, examples, strict=True):
            yield Encoded(row, *read(row), [marked(example)])

    monkeypatch.setattr(dataset_module, "Encoder", lambda *_, **__: encoded)
    monkeypatch.setattr(tokenizer, "special", SpecialTokens(bos=bos))
    return Dataset.build(rows, tokenizer, **options)


def example_of(kept):
    return kept and Example(tuple(kept.tokens.tolist()), tuple(kept.supervised.tolist()))


def answer(prompt, length, *, bos=False, tail=0):
    """`prompt` tokens, then an answer of `length` that ends in STOP, then `tail` more."""
    tokens = ([BOS] if bos else []) + [20 + i for i in range(prompt)]
    marks = [False] * len(tokens) + [True] * length + [False] * tail
    tokens += [50 + i for i in range(length - 1)] + [STOP] + [80] * tail
    return Example(tuple(tokens), tuple(marks))


# ---- shift ----


def test_a_model_that_copies_the_next_token_is_always_right():
    tokens = torch.tensor([5, 6, 7, 8, 9])
    supervised = torch.tensor([True, False, True, True, True])
    targets = shift(tokens, supervised, (2, 3))
    assert targets.tolist() == [IGNORE, IGNORE, 8, 9, IGNORE]
    oracle = torch.cat([tokens[1:], torch.tensor([0])])  # what really comes next
    counted = targets != IGNORE
    assert torch.equal(oracle[counted], targets[counted])
    assert not torch.equal(tokens[counted], targets[counted])  # an unshifted copy would fail


def test_the_first_token_of_a_document_is_never_a_target():
    tokens, supervised = torch.arange(6), torch.ones(6, dtype=torch.bool)
    assert shift(tokens, supervised, (1, 3, 2)).tolist() == [IGNORE, 2, 3, IGNORE, 5, IGNORE]
    # One document would have had three more.
    assert (shift(tokens, supervised) != IGNORE).sum() == 5


def test_lengths_that_do_not_cover_the_row_are_refused():
    tokens, supervised = torch.arange(6), torch.ones(6, dtype=torch.bool)
    with pytest.raises(ShapeError, match="documents of 5 tokens .* row of 6 tokens"):
        shift(tokens, supervised, (2, 3))


# ---- length limit ----


@pytest.mark.parametrize("limit", range(2, 40))
def test_cutting_a_document_predicts_every_token_exactly_once(tokenizer, limit):
    text = "the cat sat on the mat; what is a cat?"
    whole = document(tokenizer, text)
    dataset = Dataset.from_documents([text], tokenizer, max_length=limit)
    pieces = [dataset[i].tokens for i in range(len(dataset))]
    assert all(2 <= len(piece) <= limit for piece in pieces)
    predicted = [token for piece in pieces for token in piece[1:]]
    assert tuple(predicted) == whole.tokens[1:]  # in order, and with the stop token
    assert dataset.census.targets == len(whole.tokens) - 1
    assert dataset.census.cut == (len(pieces) > 1) == (len(whole.tokens) > limit)
    # The usual way of cutting loses a target at each border.
    assert (
        sum(len(whole.tokens[i : i + limit]) - 1 for i in range(0, len(whole.tokens), limit))
        < (len(predicted))
        or len(pieces) == 1
    )


@pytest.mark.parametrize("policy", ["drop", "truncate"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("limit", range(2, 30))
def test_no_length_limit_takes_away_an_end(monkeypatch, tokenizer, policy, bos, limit):
    shapes = [(1, 3, 0), (8, 4, 0), (3, 12, 0), (10, 10, 2), (20, 2, 1), (1, 25, 0), (2, 1, 5)]
    examples = [answer(p, n, bos=bos, tail=t) for p, n, t in shapes]
    try:
        dataset = build(
            monkeypatch,
            tokenizer,
            examples,
            bos=BOS if bos else None,
            max_length=limit,
            over_length=policy,
        )
    except DataError as error:
        assert "nothing is trained on" in str(error)
        return
    census = dataset.census
    for i in range(len(dataset)):
        kept, row = dataset[i], int(dataset.rows[i])
        original = examples[row]
        assert len(kept.tokens) <= limit
        trained = [t for t, s in zip(kept.tokens, kept.supervised, strict=True) if s]
        wanted = [t for t, s in zip(original.tokens, original.supervised, strict=True) if s]
        assert trained == wanted and trained[-1] == STOP
        assert not kept.supervised[0]  # something stands before the answer
        assert kept.tokens[0] == BOS or not bos
        if kept != original:
            assert policy == "truncate" and len(original.tokens) > limit
    changed = sum(dataset[i] != examples[int(dataset.rows[i])] for i in range(len(dataset)))
    assert census.truncated == changed
    assert census.dropped == len(examples) - len(dataset)
    if policy == "drop":
        assert census.dropped == sum(len(e.tokens) > limit for e in examples)
    assert census.tokens == sum(len(dataset[i].tokens) for i in range(len(dataset)))
    assert census.targets == sum(dataset[i].targets for i in range(len(dataset)))
    assert census.longest == max(len(e.tokens) for e in examples)


def test_truncation_keeps_the_end_of_the_prompt_and_the_bos(monkeypatch, tokenizer):
    example = answer(5, 2, bos=True)
    (kept,) = [
        build(monkeypatch, tokenizer, [example], bos=BOS, max_length=5, over_length="truncate")[0]
    ]
    assert kept.tokens == (BOS, 23, 24, 50, STOP)
    assert kept.supervised == (False, False, False, True, True)


def test_an_earlier_answer_that_lost_its_start_is_not_trained_on(monkeypatch, tokenizer):
    first, second = answer(3, 4), answer(2, 3)
    both = Example(first.tokens + second.tokens, first.supervised + second.supervised)
    for limit in range(6, len(both.tokens)):
        dataset = build(monkeypatch, tokenizer, [both], max_length=limit, over_length="truncate")
        kept = dataset[0]
        whole_first = limit > len(both.tokens) - 3  # at least one token of its prompt is left
        assert kept.tokens == both.tokens[-limit:]
        assert sum(kept.supervised) == (7 if whole_first else 3)
        assert dataset.census.truncated == 1


def test_error_names_the_row_and_the_length(monkeypatch, tokenizer):
    examples = [answer(1, 2), answer(8, 3)]
    with pytest.raises(DataError, match="row 1 makes an example of 11 tokens, longer than"):
        build(monkeypatch, tokenizer, examples, max_length=10, over_length="error")
    whole = build(monkeypatch, tokenizer, examples, max_length=11, over_length="error")
    assert len(whole) == 2


def test_error_refuses_a_long_document_that_the_others_would_cut(tokenizer):
    rows = [Row({"text": "the cat sat on the mat"}, "a.txt")]
    with pytest.raises(DataError, match=r"a\.txt makes an example of \d+ tokens"):
        Dataset.build(rows, tokenizer, max_length=4, over_length="error")
    cut = [
        Dataset.build(rows, tokenizer, max_length=4, over_length=p) for p in ("drop", "truncate")
    ]
    assert cut[0] == cut[1] and cut[0].census.cut == 1 and cut[0].census.dropped == 0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    st.integers(2, 30),
    st.booleans(),
)
def test_a_truncated_conversation_trains_whole_answers_only(turns, limit, bos):
    tokens, marks, answers = ([BOS] if bos else []), [False] if bos else [], []
    for prompt, length in turns:
        tokens += range(len(tokens) + 100, len(tokens) + 100 + prompt)
        said = [*range(len(tokens) + 100, len(tokens) + 99 + length), STOP]
        answers.append(said)
        marks += [False] * prompt + [True] * length
        tokens += said
    whole = Example(tuple(tokens), tuple(marks))
    if len(tokens) <= limit:
        return
    kept = example_of(keep_end(marked(whole), limit, BOS if bos else None))
    if kept is None:
        assert len(answers[-1]) + 1 + bos > limit
        return
    assert len(kept.tokens) == limit and not kept.supervised[0]
    trained = [t for t, s in zip(kept.tokens, kept.supervised, strict=True) if s]
    suffixes = [list(chain.from_iterable(answers[i:])) for i in range(len(answers))]
    assert trained in suffixes


# ---- rows ----


def test_counts_add_up_over_a_file(tmp_path, tokenizer):
    turns = [{"role": "user", "content": "what is a cat?"}, {"role": "assistant", "content": "the"}]
    rows = [
        {"messages": turns, "id": 1},
        {"messages": turns[:1], "id": 2},
        {"messages": [{"role": "user", "content": "the cat " * 50}, turns[1]], "id": 3},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = []
    dataset = Dataset.build(read_rows(path), tokenizer, CHATML, max_length=60, progress=done.append)
    census = dataset.census
    assert done == [1, 2, 3]
    assert (census.rows, census.examples, census.dropped, census.empty) == (3, 1, 1, 1)
    assert census.formats == (("messages", 3),) and census.unread == ("id",)
    assert "3 rows (messages): 1 examples" in census.summary()
    assert census.summary().endswith("1 dropped, 1 empty")
    assert ("columns not read", "id") in census.table()
    truncated = Dataset.build(
        read_rows(path), tokenizer, CHATML, max_length=60, over_length="truncate"
    )
    assert (truncated.census.examples, truncated.census.truncated) == (2, 1)


def test_two_formats_in_one_file_are_refused_with_both_lines(tokenizer):
    rows = [
        Row({"text": "the cat"}, "a.jsonl:1", "a.jsonl"),
        Row({"prompt": "the", "completion": " cat"}, "a.jsonl:2", "a.jsonl"),
    ]
    message = (
        "a.jsonl:2 is in the format 'prompt-completion of strings' but .*a.jsonl:1 is in 'text'"
    )
    with pytest.raises(DataError, match=message):
        Dataset.build(rows, tokenizer)
    apart = [rows[0], Row(rows[1].values, "b.jsonl:2", "b.jsonl")]
    assert Dataset.build(apart, tokenizer).census.formats == (("text", 1), ("prompt-completion", 1))


def test_nothing_to_train_on_is_an_error_with_a_remedy(monkeypatch, tokenizer):
    with pytest.raises(DataError, match="nothing is trained on: none of the 1 rows holds"):
        Dataset.from_documents([" "], tokenizer)
    with pytest.raises(DataError, match="nothing is trained on: there are no rows"):
        Dataset.from_documents([], tokenizer)
    rows = [Row({"prompt": "the cat sat", "completion": " on"}, "a.jsonl:1")]
    with pytest.raises(DataError, match="1 of 1 rows were dropped .* raise max_length, or set"):
        Dataset.build(rows, tokenizer, max_length=2)
    with pytest.raises(DataError, match="raise max_length: prompts lose .* an answer is never cut"):
        Dataset.build(rows, tokenizer, max_length=2, over_length="truncate")
    # A target at the first place is no target: nothing comes before it.
    only_first = Example((5, 6), (True, False))
    with pytest.raises(DataError, match="nothing is trained on"):
        build(monkeypatch, tokenizer, [only_first])


def test_limits_that_mean_nothing_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="max_length is 1; predicting one token takes at least 2"):
        Dataset.from_documents(["the cat"], tokenizer, max_length=1)


def test_a_row_and_its_dataset_hold_the_same_tokens(tokenizer):
    rows = [Row({"prompt": "the", "completion": f" cat {i}"}, f"row {i}") for i in range(3)]
    dataset = Dataset.build(rows, tokenizer)
    assert [dataset[i] for i in range(3)] == [
        completion(tokenizer, "the", f" cat {i}") for i in range(3)
    ]
    with pytest.raises(IndexError):
        dataset[3]


# ---- identity and splits ----


def test_a_fingerprint_tells_datasets_apart(tokenizer):
    def of(*texts, prompt=""):
        rows = [Row({"prompt": prompt, "completion": text}, text) for text in texts]
        return Dataset.build(rows, tokenizer)

    dataset = of("the cat", "sat")
    assert pickle.loads(pickle.dumps(dataset)) == dataset == of("the cat", "sat")
    assert len({dataset, of("the cat", "sat")}) == 1
    assert pickle.loads(pickle.dumps(dataset)).census == dataset.census
    others = [
        of("sat", "the cat"),
        of("the cat"),
        of("the catsat"),
        of("the cat", "sat", prompt="a"),
    ]
    assert len({dataset.fingerprint, *(other.fingerprint for other in others)}) == 5
    # The same tokens, of which fewer are trained on.
    marks = dataset.supervised.copy()
    marks[1] = False
    less = replace(dataset, supervised=marks)
    assert less.fingerprint != dataset.fingerprint


@pytest.mark.parametrize("seed", range(4))
def test_a_split_keeps_the_pieces_of_a_document_together(tokenizer, seed):
    texts = [f"{word} the cat sat on the mat" for word in ("one", "two", "three", "four", "five")]
    dataset = Dataset.from_documents(texts, tokenizer, max_length=8)
    train, heldout = dataset.split(0.4, seed)
    assert not set(train.row_of.tolist()) & set(heldout.row_of.tolist())
    assert (train.census.rows, heldout.census.rows) == (3, 2)
    parts = [part[i] for part in (train, heldout) for i in range(len(part))]
    wholes = [dataset[i] for i in range(len(dataset))]
    assert sorted(parts, key=repr) == sorted(wholes, key=repr)
    assert train.census.targets + heldout.census.targets == dataset.census.targets
    assert train.census.tokens == train.lengths.sum() < len(train.tokens)
    assert dataset.split(0.4, seed) == (train, heldout)
    assert dataset.split(0.4, seed + 1)[1] != heldout


def test_a_split_that_leaves_a_side_empty_is_refused(tokenizer):
    one = Dataset.from_documents(["the cat"], tokenizer)
    with pytest.raises(DataError, match="one row cannot be split"):
        one.split(0.5)
    two = Dataset.from_documents(["the cat", "sat"], tokenizer)
    assert [len(part) for part in two.split(0.001)] == [1, 1]
    with pytest.raises(DataError, match="must lie between 0 and 1"):
        two.split(1.0)


def test_of_a_lone_document_the_end_is_held_out(tokenizer):
    whole = Dataset.from_documents(["the cat sat on the mat; " * 30], tokenizer, max_length=9)
    train, heldout = whole.split(0.2)
    count = len(whole)
    assert len(heldout) == round(0.2 * count) > 1
    assert [*train, *heldout] == [whole[i] for i in range(count)]
    assert train.census.targets + heldout.census.targets == whole.census.targets


def test_the_shuffle_is_pinned():
    # Resuming an old run needs this very order; a change here breaks every saved run.
    assert permutation(8, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert sorted(permutation(100, 3).tolist()) == list(range(100))


# ---- both ends ----


@pytest.mark.parametrize("limit", range(2, 12))
def test_truncation_at_the_right_fakes_no_end_and_counts_what_lost_it(
    monkeypatch, tokenizer, limit
):
    examples = [answer(2, 3), answer(4, 6), answer(3, 2, tail=3)]
    try:
        dataset = build(
            monkeypatch, tokenizer, examples, max_length=limit, over_length="truncate_right"
        )
    except DataError as error:
        assert "nothing is trained on" in str(error) and limit < 3
        return
    for i in range(len(dataset)):
        original, kept = examples[int(dataset.rows[i])], dataset[i]
        assert kept.tokens == original.tokens[:limit]  # a start, and nothing put after it
        trained = [t for t, s in zip(kept.tokens, kept.supervised, strict=True) if s]
        assert dataset.unended[i] == (trained[-1] != STOP)
    census = dataset.census
    assert census.unended == sum(dataset.unended)
    assert census.truncated == sum(len(examples[int(r)].tokens) > limit for r in dataset.rows)
    assert census.dropped == len(examples) - len(dataset)
    assert ("without their end" in census.summary()) == bool(census.unended)


def test_a_conversation_loses_its_first_turns_but_not_its_system_prompt(tokenizer):
    turns = [{"role": "system", "content": "the mat"}]
    for i in range(4):
        turns += [{"role": "user", "content": f"what {i}?"}, {"role": "assistant", "content": "a"}]
    row = Row({"messages": turns}, "row 1")
    whole = Dataset.build([row], tokenizer, CHATML)
    for limit in range(20, int(whole.lengths[0])):
        cut = Dataset.build([row], tokenizer, CHATML, max_length=limit, over_length="truncate_left")
        text = tokenizer.decode(cut[0].tokens)
        kept = next(
            n for n in (1, 2, 3) if f"what {4 - n}?" in text and f"what {3 - n}?" not in text
        )
        shorter = [turns[0], *turns[-2 * kept :]]
        expected = Dataset.build([Row({"messages": shorter}, "")], tokenizer, CHATML)
        if expected.lengths[0] > limit:
            assert kept == 1  # the last turn alone is too long: its prompt loses its start
            continue
        assert cut[0] == expected[0] and cut.census.truncated == 1 and not cut.census.unended
        more = [turns[0], *turns[-2 * (kept + 1) :]]
        assert Dataset.build([Row({"messages": more}, "")], tokenizer, CHATML).lengths[0] > limit


@pytest.mark.parametrize("train_on", ["all", "last"])
def test_fewer_turns_are_trained_on_as_all_of_them_were(tokenizer, train_on):
    turns = []
    for i in range(4):
        answer = {"role": "assistant", "content": f"a cat {i}"}
        turns += [{"role": "user", "content": f"what {i}?"}, answer]
    row = Row({"messages": turns}, "row 1")
    whole = Dataset.build([row], tokenizer, CHATML, train_on=train_on)
    limit = int(whole.lengths[0]) - 1  # one turn must go
    cut = Dataset.build(
        [row], tokenizer, CHATML, max_length=limit, over_length="truncate_left", train_on=train_on
    )
    trained = [t for t, s in zip(cut[0].tokens, cut[0].supervised, strict=True) if s]
    text = tokenizer.decode(trained)
    expected = {"all": ["a cat 1", "a cat 2", "a cat 3"], "last": ["a cat 3"]}[train_on]
    assert [f"a cat {i}" for i in range(4) if f"a cat {i}" in text] == expected


def test_an_unknown_policy_is_refused():
    with pytest.raises(ConfigError, match="over_length is 'cut'; choose from drop, truncate_left"):
        policy_of("cut")


def test_strings_and_messages_do_not_mix_in_one_file(tokenizer):
    said = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    rows = [
        Row({"prompt": "a", "completion": "b"}, "a.jsonl:1", "a.jsonl"),
        Row({"prompt": said[0], "completion": said[1]}, "a.jsonl:2", "a.jsonl"),
    ]
    with pytest.raises(DataError, match="jsonl:2 is in the format 'prompt-completion of messages'"):
        Dataset.build(rows, tokenizer, CHATML)
