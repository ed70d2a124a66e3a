"""report.html shows the trainer's own first rows, token by token, and goes on showing them."""

import json
from dataclasses import replace

import pytest

from ardor.data.shown import Document
from ardor.errors import CheckpointError
from ardor.loss import IGNORE
from ardor.train.first_rows import CELLS, FILE, SHOWN, read_first_rows
from ardor.train.report import write_report
from ardor.train.run import Run

from ..tiny import sentences, write_rows
from .conftest import finish, prepare, train_config, tune_config

pytestmark = pytest.mark.sweep


def assert_the_trainers_own(run: Run) -> list[Document]:
    """What is in the folder is what the first micro-batches hold, ids and targets."""
    shown, plan = read_first_rows(run.folder), run.trainer.plan
    expected = []
    for members in plan.epoch(0):
        batch = plan.batch(members)
        tokens = batch.tokens[0].split(list(batch.lengths))
        targets = batch.targets[0].split(list(batch.lengths))
        expected += [
            (a.tolist(), [IGNORE, *b[:-1].tolist()]) for a, b in zip(tokens, targets, strict=True)
        ]
    assert 1 <= len(shown) == min(SHOWN, len(expected))
    for row, (ids, labels) in zip(shown, expected, strict=False):
        assert [id for cell in row.cells for id in cell.ids] == ids
        marks = [cell.trained for cell in row.cells for _ in cell.ids]
        assert marks == [label != IGNORE for label in labels]
        assert row.targets == sum(marks) and row.tokens == len(ids)
    return shown


def test_text_is_shown_as_it_is_trained_on_also_after_a_resumption(texts, tmp_path):
    config = train_config(texts, tmp_path / "run")
    run = prepare(config)
    shown = assert_the_trainers_own(run)
    number = int(shown[0].where.removeprefix(f"{texts.name}, row "))
    given = json.loads(texts.read_text().splitlines()[number - 1])["text"]
    assert "".join(c.text for c in shown[0].cells if c.kind == "text").strip() in given
    for event in run.events():
        if event["kind"] == "checkpoint":
            break
    before = (tmp_path / "run" / FILE).read_bytes()
    finish(prepare(replace(config, resume=True)))
    assert (tmp_path / "run" / FILE).read_bytes() == before
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<article>") == len(shown) and 'class="t on k end"' in page


def test_a_conversation_shows_which_answers_are_trained_on(base, tmp_path):
    turns = [{"role": r, "content": f"{r} says"} for r in ("user", "assistant") * 2]
    data = write_rows(tmp_path / "chat.jsonl", [{"messages": turns}] * 4)
    config = tune_config(base("llama"), data, tmp_path / "run", train_on="last", max_length=200)
    shown = assert_the_trainers_own(prepare(config))
    for row in shown:
        assert len(row.trained) == 1 and row.ends and 0 < row.targets < row.tokens


@pytest.mark.parametrize(
    ("objective", "parts"),
    [("orpo", {"chosen", "rejected"}), ("kto", {"a good answer", "a bad answer"})],
)
def test_of_preferences_both_answers_are_shown(base, tmp_path, objective, parts):
    columns = zip(sentences(6, 3), sentences(6, 4), sentences(6, 5), strict=True)
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in columns]
    data = write_rows(tmp_path / "judged.jsonl", rows)
    run = prepare(tune_config(base("llama"), data, tmp_path / "run", objective=objective))
    found = {row.part for row in assert_the_trainers_own(run)}
    assert found & parts and (objective == "kto" or found == parts)


def test_a_long_row_is_shown_by_its_beginning_and_its_end(texts, base, tmp_path):
    long = write_rows(tmp_path / "long.jsonl", [{"text": "the cat " * 5000 + "END"}])
    config = tune_config(base("llama"), long, tmp_path / "run", max_length=48)
    run = prepare(config)
    row = read_first_rows(run.folder)[0]
    whole = replace(row, cells=row.cells * 100)
    short = whole.shortened(CELLS)
    assert len(short.cells) == CELLS + 1 and short.tokens == row.tokens
    (gap,) = [cell for cell in short.cells if cell.kind == "gap"]
    assert gap.text == f" … {sum(len(c.ids) for c in whole.cells[200:-200]):,} tokens … "
    assert short.cells[-1] == whole.cells[-1] and short.cells[0] == whole.cells[0]


def test_a_run_that_kept_no_rows_has_a_report_and_a_damaged_file_is_told(texts, tmp_path):
    run = prepare(train_config(texts, tmp_path / "run", max_steps=1))
    finish(run)
    file = run.folder / FILE
    file.write_text('[{"where": "x"}]')
    with pytest.raises(
        CheckpointError, match=r"first_rows.json is not what a run writes: .*delete"
    ):
        write_report(run.folder)
    file.unlink()
    assert "<article>" not in write_report(run.folder).read_text()
