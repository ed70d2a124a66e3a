"""What a preview shows is what the trainer is given: its own batches, token by token."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ardor.data.batches import BatchPlan
from ardor.data.dataset import Dataset
from ardor.data.sources import read_rows
from ardor.data.visible import visible, visible_parts
from ardor.errors import ArdorError, ConfigError
from ardor.files.runs import newest_checkpoint
from ardor.loss import IGNORE
from ardor.preview import Preview, Settings, preview
from ardor.preview.page import render
from ardor.text.chat import CHATML
from ardor.text.tokenizer import Tokenizer
from ardor.train import finetune
from ardor.train.config import Finetune

from ..test_vocabulary import made
from ..tiny import make_base, write_rows

TURNS = [
    {"role": "user", "content": "the cat?\n\t<|im_end|>"},
    {"role": "assistant", "content": "né 🙂"},
    {"role": "user", "content": "  and "},
    {"role": "assistant", "content": "<b>sat</b>"},
]
ROWS = [
    {"messages": TURNS},
    {"messages": TURNS[:2]},
    {"messages": [TURNS[0], {"role": "assistant", "content": " "}]},
    {"messages": [TURNS[2], TURNS[3]]},
]
LONG = Settings(max_length=2048)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A checkpoint with room for long rows; its weights are taken away: no preview reads them."""
    newest = newest_checkpoint(make_base(tmp_path_factory.mktemp("base")))
    assert newest is not None
    config = newest / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"max_position_embeddings": 2048}))
    (newest / "model.safetensors").rename(newest / "gone")
    return newest


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_directory(model)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "chat.jsonl", ROWS)


def flat(found: Preview) -> list[tuple[list[int], list[bool]]]:
    """(ids, trained) of each document that is shown."""
    return [
        (
            [id for cell in row.cells for id in cell.ids],
            [cell.trained for cell in row.cells for _ in cell.ids],
        )
        for batch in found.batches
        for row in batch.documents
    ]


@pytest.mark.parametrize("train_on", ["all", "last"])
@pytest.mark.parametrize("tokens_per_batch", [None, 300])
def test_it_shows_the_trainer_s_own_batches(model, data, tokenizer, train_on, tokens_per_batch):
    dataset = Dataset.build(read_rows(data), tokenizer, CHATML, max_length=1024, train_on=train_on)
    size = {"tokens_per_batch": tokens_per_batch} if tokens_per_batch else {"examples_per_batch": 8}
    plan = BatchPlan(dataset, **size, shuffle=False)
    expected = []
    for members in plan.epoch(0):
        batch = plan.batch(members)
        targets = [IGNORE, *batch.targets[0, :-1].tolist()]  # of the token itself
        start = 0
        for length in batch.lengths:
            span = slice(start, start + length)
            marks = [target != IGNORE for target in targets[span]]
            expected.append((batch.tokens[0, span].tolist(), marks))
            start += length
    settings = Settings(train_on=train_on, tokens_per_batch=tokens_per_batch)
    found = preview(model, data, 99, settings)
    assert flat(found) == expected
    assert len(found.batches) == found.micro_batches == len(plan.epoch(0))
    assert found.census == dataset.census
    assert sum(row.targets for b in found.batches for row in b.documents) == dataset.census.targets


def test_a_run_is_trained_on_what_was_shown(model, data, tmp_path):
    (model / "gone").rename(model / "model.safetensors")
    try:
        asked = Finetune(
            model=str(model), data=str(data), output=tmp_path / "run", dtype="float32", max_steps=1
        )
        run = finetune.prepare(asked)
    finally:
        (model / "model.safetensors").rename(model / "gone")
    plan = run.trainer.plan
    batch = plan.batch(plan.epoch(0)[0])
    found = preview(model, data, 99, Settings(shuffle=True))
    ids = [id for tokens, _ in flat(found) for id in tokens]
    assert ids == batch.tokens[0].tolist()
    assert sum(sum(marks) for _, marks in flat(found)) == int((batch.targets != IGNORE).sum())


def test_documents_say_where_they_are_from_and_where_they_are_trained(model, data, tokenizer):
    found = preview(model, data, 2, LONG)
    assert (found.examples, found.census.rows, found.census.empty) == (3, 4, 1)
    assert found.left_out == (f"{data}:3",)
    (batch,) = found.batches
    first, second = batch.documents
    assert (len(batch.documents), batch.of) == (2, 3)
    assert (first.where, second.where) == (f"{data}:1", f"{data}:2")
    assert first.part == "" and first.ends
    for begin, end in first.trained:
        ids = flat(found)[0][0][begin : end + 1]
        assert ids[-1] == tokenizer.added["<|im_end|>"]
        assert tokenizer.decode(ids[:-1]) in ("né 🙂", "<b>sat</b>")
    assert first.cells[0].position == 0
    assert second.cells[0].position == 0  # anew in each document


def test_a_token_is_marked_by_what_it_is_not_by_how_it_is_spelled(model, data, tokenizer):
    (batch,) = preview(model, data, 1, LONG).batches
    cells = batch.documents[0].cells
    ends = [cell for cell in cells if cell.text == "<|im_end|>"]
    assert [(cell.kind, cell.stop, cell.trained) for cell in ends] == [
        ("control", True, False),
        ("control", True, True),
    ] * 2
    assert "<|im_end|>" in "".join(cell.text for cell in cells if cell.kind == "text")
    smile = next(cell for cell in cells if "🙂" in cell.text)
    assert len(smile.ids) == 4  # bytes: one character, which is not cut


def test_pieces_of_a_row_are_counted(model, tmp_path):
    text = write_rows(tmp_path / "text.jsonl", [{"text": "the cat sat on a mat " * 9}])
    found = preview(model, text, 9, Settings(max_length=40))
    parts = [row.part for batch in found.batches for row in batch.documents]
    assert (
        parts == [f"example {i} of {len(parts)}" for i in range(1, len(parts) + 1)]
        and len(parts) > 2
    )
    assert [row.ends for batch in found.batches for row in batch.documents][-2:] == [False, True]
    assert found.template is None and found.census.cut == 1


def test_mistakes_are_told_with_their_row(model, tmp_path):
    with pytest.raises(ConfigError, match="rows=0; at least 1"):
        preview(model, ROWS, 0)
    broken = tmp_path / "broken.jinja"
    broken.write_text("fine\n{% if %}\n")
    with pytest.raises(ArdorError, match=r"broken\.jinja, line 2: "):
        preview(model, ROWS, 1, Settings(chat_template=str(broken)))
    strict = tmp_path / "strict.jinja"
    strict.write_text("\n{{ raise_exception('roles must alternate') }}")
    data = write_rows(tmp_path / "rows.jsonl", ROWS[:1])
    with pytest.raises(
        ArdorError, match=r"rows\.jsonl:1 \(messages\): .*strict\.jinja, line 2: roles must"
    ):
        preview(model, data, 1, Settings(chat_template=str(strict)))
    for messages, reason in [
        ([], "an empty list, expected a list of messages"),
        ([{"role": "user", "content": None}], "message 1 of 1: 'content' is null"),
        ([TURNS[0], {"role": "assistant", "content": "x", "train": 3}], "'train' is 3"),
    ]:
        data = write_rows(tmp_path / "rows.jsonl", [ROWS[1], {"messages": messages}])
        with pytest.raises(ArdorError, match=rf"rows\.jsonl:2 \(messages\): .*{reason}"):
            preview(model, data, 1)


def test_it_shows_the_tokens_and_the_template_that_a_run_would_add(tmp_path, data):
    base = made(tmp_path / "m")
    config = base / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 2048})
    )
    settings = {"setup_chat_format": True, "add_tokens": ("<b>",), "pad_strategy": "new"}
    asked = {"max_length": 2048, "eval_fraction": 0.0, **settings}
    run = finetune.prepare(
        Finetune(model=str(base), data=str(data), output=tmp_path / "run", max_steps=1, **asked)
    )
    tokens = run.model.tokenizer
    (base / "model.safetensors").unlink()
    found = preview(base, data, 99, Settings(shuffle=True, **asked))
    plan = run.trainer.plan
    batch = plan.batch(plan.epoch(0)[0])
    assert [id for ids, _ in flat(found) for id in ids] == batch.tokens[0].tolist()
    assert {tokens.added["<|im_end|>"], tokens.added["<b>"]} <= {*batch.tokens[0].tolist()}
    assert found.template == "ChatML"
    assert [id for id, _, _ in found.stops] == sorted(run.model.stops.ids)
    added, pad = found.notes
    assert added == "added tokens: <b> (269), <|im_start|> (270), <|im_end|> (271)"
    assert pad.startswith("padding token: '<|pad|>', id 272 (") and pad in run.notes
    cells = [cell for document in found.batches[0].documents for cell in document.cells]
    assert {c.kind for c in cells if c.ids == (tokens.added["<|im_end|>"],)} == {"control"}


# The page


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.spans: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self._in: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "span" and "data-id" in dict(attrs):
            self._in.append(str(dict(attrs)["class"]))
            self.spans.append((self._in[-1], ""))

    def handle_endtag(self, tag):
        if tag == "span" and self._in:
            self._in.pop()

    def handle_data(self, data):
        if self._in:
            self.spans[-1] = (self.spans[-1][0], self.spans[-1][1] + data)


def test_the_page_holds_every_token_and_needs_nothing_else(model, data):
    found = preview(model, data, 99, LONG)
    page = render(found)
    reader = _Reader()
    reader.feed(page)
    shown = [pair for batch in found.batches for row in batch.documents for pair in row.shown]
    assert [text for _, text in reader.spans] == [text for _, text in shown]
    for (classes, _), (cell, _) in zip(reader.spans, shown, strict=True):
        assert ("on" in classes.split()) == cell.trained
        assert ("k" in classes.split()) == (cell.kind == "control")
        assert ("end" in classes.split()) == (cell.trained and cell.stop)
    assert not {"script", "link", "img", "b>"} & set(reader.tags)
    assert "http" not in page and "url(" not in page
    assert "<b>sat" not in page


# What is not seen


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a b", "a b"),
        (" a  b ", "·a··b·"),
        ("a \n b", "a·↵\n·b"),
        ("\ta\r\n", "⇥\ta␍↵\n"),
        ("\0\x1b\x7f", "␀␛␡"),
        ("a\u00a0b\u200bc\ufeff", "a⍽b[ZWSP]c[BOM]"),
        ("\u202e\u2028\ue000", "[U+202E][U+2028][U+E000]"),
        ("né 你好 🙂", "né 你好 🙂"),
    ],
)
def test_what_nobody_sees_has_a_sign(text, seen):
    assert visible(text) == seen


def test_a_word_s_own_space_is_none_that_is_overlooked():
    assert visible_parts(["the", " cat", " ", " sat", " "]) == ["the", " cat", "·", "·sat", "·"]
