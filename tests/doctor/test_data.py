"""Each rule about rows finds what it is for, with its place, and leaves what only looks alike."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import ardor
from ardor.doctor.rules.data import RULES

from ..tiny import write_rows
from .cases_text import named, unigram
from .damage import Change, edit, look, said

Rows = list[dict[str, Any]]


def chats(count: int, answer: str = "It is {i}.") -> Rows:
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {i}?"},
                {"role": "assistant", "content": answer.format(i=i)},
            ]
        }
        for i in range(count)
    ]


def ids(ids: list[int], labels: list[int] | None = None, **more: Any) -> Rows:
    return [{"input_ids": ids, "labels": ids if labels is None else labels, **more}]


def pairs(*pairs: tuple[str, str]) -> Rows:
    return [{"prompt": p, "completion": c} for p, c in pairs]


def segments(*texts: str) -> Rows:
    return [{"segments": [{"text": t, "label": i > 0} for i, t in enumerate(texts)]}]


GOOD = chats(12)
CUT = pairs(*((f"Tell me {i}", f"{'x' * 130}{i}") for i in range(4)), ("And", "Short."))


class Case(NamedTuple):
    rows: Rows
    level: str
    says: tuple[str, ...]
    change: Change = lambda model: None  # of the model
    heldout: Rows | None = None


def nothing(model: Path) -> None:
    """The model stays as it is."""


CASES: Mapping[str, list[Case]] = {
    "data-rows": [
        Case([*GOOD, {"messages": "x"}], "E", ("1 row", "rows.jsonl:13", "expected a list")),
        Case([*GOOD, {"text": "x"}], "E", ("rows.jsonl:13", "keep one format per file")),
        Case([{"messages": [{"role": "user", "content": None}]}], "E", ("rows.jsonl:1",)),
        Case(ids([1, 2], [1]), "E", ("2 input_ids, 1 labels",)),
        Case([{"input_ids": "x"}], "E", ("no lists of ids",)),
    ],
    "row-ids": [Case(ids([5, 400, 276]), "E", ("id 400", "320 ids"))],
    "row-targets": [
        Case([*GOOD, *chats(1, " ")], "W", ("1 row of 13 (7.7%)", "rows.jsonl:13")),
        Case(ids([5, 6], [5, -100]), "E", ("1 row of 1", "labels beyond the first token")),
    ],
    "row-stops": [
        Case(ids([5, 6, 7]), "E", ("no end is learnt", "rows.jsonl:1")),
        Case(ids([5, 6, 276], [5, 6, -100]), "E", ("is masked in labels",)),
        Case(segments("Hi", "Hello"), "W", ("of segments", "rows.jsonl:1")),
    ],
    "labels-shifted": [Case(ids([5, 6, 7, 276], [6, 7, 276, -100]), "E", ("shifted already",))],
    "row-length": [Case(chats(2, "word " * 60 + "{i}."), "W", ("48 tokens", "the longest has"))],
    "pad-in-data": [Case(ids([5, 277, 6, 276]), "E", ("padding token inside",))],
    "control-in-content": [
        Case(pairs(("Hi", "Hello<|im_end|>")), "W", ("rows.jsonl:1: <|im_end|>", "mere text"))
    ],
    "unknown-characters": [Case(pairs(("h\u65e5", "a")), "W", ("does not know", "%"), unigram)],
    "broken-characters": [Case(pairs(("Hi \ufffd", "Hello")), "W", ("U+FFFD",))],
    "prompt-space": [Case(pairs(("Answer: ", "yes")), "W", ("ends in a space",))],
    "boundary": [Case(pairs(("the c", "at sat")), "I", ("100.0% of prompts",))],
    "answers-cut": [Case(CUT, "W", ("4 answers of the same", "rows.jsonl:1"))],
    "duplicates": [
        Case([*GOOD, *GOOD[:2]], "W", ("2 rows of 14", "rows.jsonl:13 is", "rows.jsonl:1")),
        Case([*chats(200), *chats(1)], "I", ("1 row of 201 (0.5%)",)),
    ],
    "held-out-leak": [
        Case(GOOD, "W", ("1 held-out row that", "held.jsonl:1 is"), heldout=GOOD[3:4]),
        Case(GOOD, "W", ("with a prompt that",), heldout=chats(1, "Other.")),
    ],
    "supervised-share": [Case(ids([5, 6] * 20 + [276]), "W", ("97.6% of all tokens",))],
}

WELL: Mapping[str, Case] = {
    "data-rows": Case([*GOOD, *[row | {"extra": 1} for row in chats(1)]], "", ()),
    "row-ids": Case(ids([5, 319, 276]), "", ()),
    "row-targets": Case(ids([5, 6], [-100, 6]), "", ()),
    "row-stops": Case(ids([5, 6, 279, 5], [-100, 6, 279, -100]), "", ()),
    # The same id over and over is its own neighbour.
    "labels-shifted": Case(ids([5, 5, 5, 276]), "", ()),
    "row-length": Case([{"text": "word " * 90}], "", ()),  # cut into pieces
    "pad-in-data": Case(ids([5, 276, 277], [5, 276, -100], attention_mask=[1, 1, 0]), "", ()),
    "control-in-content": Case(pairs(("Hi", "<|im_en|>")), "", ()),
    "unknown-characters": Case(pairs(("h\u00e9 \U0001f600", "a")), "", ()),  # bytes know all
    "broken-characters": Case(pairs(("Hi ?", "Hello")), "", ()),
    "prompt-space": Case(pairs(("Answer:", " yes")), "", ()),
    "boundary": Case(pairs(("the", " cat")), "", ()),
    "answers-cut": Case(
        [row | {"completion": row["completion"][:-1] + "."} for row in CUT], "", ()
    ),
    "duplicates": Case(GOOD, "", ()),
    "held-out-leak": Case(GOOD, "", (), heldout=chats(14)[12:]),
    "supervised-share": Case([{"text": "the cat"}], "", ()),  # all of a text is a target
}


def examined(chat: Path, case: Case) -> list[Any]:
    case.change(chat)
    data = write_rows(chat.parent / "rows.jsonl", case.rows)
    held = None if case.heldout is None else write_rows(chat.parent / "held.jsonl", case.heldout)
    return [look(chat, data=str(data), eval_data=None if held is None else str(held))]


@pytest.mark.parametrize(("rule", "case"), [(r, c) for r, cases in CASES.items() for c in cases])
def test_a_rule_finds_what_it_is_for(chat, rule, case):
    (report,) = examined(chat, case)
    ((level, text),) = said(report, rule)
    assert level == case.level and all(part in text for part in case.says), text


@pytest.mark.parametrize("rule", WELL)
def test_a_rule_leaves_what_only_looks_alike(chat, rule):
    (report,) = examined(chat, WELL[rule])
    assert not said(report, rule), report.findings


def test_every_rule_has_both():
    assert {*CASES} == {*WELL} == {*RULES}


def test_good_rows_are_counted_and_nothing_is_said(chat):
    (report,) = examined(chat, Case(GOOD, "", ()))
    data = report.data
    assert report.findings == () and data is not None
    assert (data.rows, data.more, data.formats["messages"], len(data.lengths)) == (
        12,
        False,
        12,
        12,
    )
    assert sum(count for _, count in data.histogram()) == 12
    assert 0 < data.targets < data.tokens == sum(data.lengths)


def test_only_the_first_rows_are_looked_at_if_asked(chat):
    data = write_rows(chat.parent / "rows.jsonl", [*GOOD, {"messages": "x"}])
    report = look(chat, data=str(data), rows=12)
    assert report.findings == () and report.data is not None and report.data.more


def test_pad_that_is_an_end_may_stand_in_data(chat):
    """The classic pad = eos: each row's own end is no padding."""
    named(pad_token="<|im_end|>")(chat)
    (report,) = examined(chat, Case(GOOD, "", ()))
    assert not said(report, "pad-in-data") and said(report, "pad-in-stops")


def test_data_without_a_tokenizer_says_so(chat):
    (chat / "tokenizer.json").unlink()
    data = write_rows(chat.parent / "rows.jsonl", GOOD)
    with pytest.raises(ardor.ConfigError, match="has no tokenizer.json"):
        look(chat, data=str(data))


def test_data_that_is_not_there_says_so(chat):
    with pytest.raises(ardor.DataError, match="does not exist"):
        look(chat, data=str(chat / "nowhere.jsonl"))


def test_a_broken_line_is_a_finding_with_its_place(chat):
    file = write_rows(chat.parent / "rows.jsonl", GOOD)
    file.write_text(file.read_text() + "{oops\n")
    ((level, text),) = said(look(chat, data=str(file)), "data-rows")
    assert level == "E" and "rows.jsonl:13" in text and "not valid JSON" in text


def test_a_template_s_own_pad_token_in_every_row_is_told(chat):
    """Rows that we encode ourselves: the template writes it."""
    source = (chat / "chat_template.jinja").read_text()
    (chat / "chat_template.jinja").write_text(
        source.replace("<|im_start|>'", "<|pad|><|im_start|>'")
    )
    edit("tokenizer_config.json", chat_template=None)(chat)
    (report,) = examined(chat, Case(GOOD, "", ()))
    ((level, text),) = said(report, "pad-in-data")
    assert level == "E" and "12 rows of 12" in text
    assert json.loads(json.dumps(dict(report.facts)))["padding"]
