"""A chat template from the command line and from Python to the model's prompt, and to its files."""

import io
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import ardor
from ardor.cli.main import main
from ardor.errors import ConfigError, TextError
from ardor.files.runs import newest_checkpoint
from ardor.text.chat import CHATML, prompt_ids

from .tiny import make_base, write_rows

ASKED = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def lm(base) -> ardor.LM:
    return ardor.load(base, chat_template="chatml")


def test_a_name_or_a_file_is_taken_at_loading_and_decides_where_an_answer_ends(base, tmp_path, lm):
    with pytest.raises(ConfigError, match="has no chat template.* say which .*: chat_template"):
        ardor.load(base).chat(ASKED)
    end = lm.tokenizer.added["<|im_end|>"]
    assert lm.model.stops.sources[end] == ("the chat template's terminator",)
    assert end not in ardor.load(base).model.stops.ids
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML.source)
    again = ardor.load(base, chat_template=file)
    assert again.chat(ASKED, max_new_tokens=4) == lm.chat(ASKED, max_new_tokens=4)
    with pytest.raises(TextError, match="chat_template='chatlm' .*did you mean chatml"):
        ardor.load(base, chat_template="chatlm")


def test_chat_hands_everything_to_the_template(base, tmp_path):
    file = tmp_path / "tools.jinja"
    file.write_text(
        "{% for t in tools %}{{ t.function.name }} {% endfor %}{% for d in documents %}{{ d.text }}"
        "{% endfor %}{{ mood }}{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>"
    )
    lm = ardor.load(base, chat_template=file)

    def sat(where: str) -> None:
        """Sits.

        Args:
            where: On what.
        """

    found = lm.chat(
        ASKED,
        tools=[sat],
        documents=[{"text": "a mat"}],
        chat_template_kwargs={"mood": "!"},
        max_new_tokens=1,
    )
    expected = lm.tokenizer.encode_template("sat a mat!the cat<|im_end|>")
    assert found.prompt_tokens == len(expected)
    assert prompt_ids(
        lm.tokenizer, lm.model.template, ASKED, tools=[sat], documents=[{"text": "a mat"}], mood="!"
    ) == expected  # fmt: skip


def test_an_answer_is_gone_on_with(lm):
    begun = [*ASKED, {"role": "assistant", "content": "sat on"}]
    found = lm.chat(begun, continue_final_message=True, max_new_tokens=2)
    header = prompt_ids(lm.tokenizer, CHATML, ASKED)
    assert found.prompt_tokens == len(header) + len(lm.tokenizer.encode_content("sat on"))
    pieces = list(lm.stream_chat(begun, continue_final_message=True, max_new_tokens=2))
    assert "".join(piece.text for piece in pieces) == found.text


def test_every_template_of_a_model_is_saved_and_read_by_transformers(base, tmp_path):
    newest = newest_checkpoint(base)
    assert newest is not None
    lm = ardor.load(base, chat_template="chatml")
    assert lm.model.template is not None
    lm.save(tmp_path / "one")
    config = tmp_path / "one" / "tokenizer_config.json"
    named = [
        {"name": "default", "template": CHATML.source},
        {"name": "tool_use", "template": "{{ tools | length }} tools"},
    ]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": named}))
    (tmp_path / "one" / "chat_template.jinja").unlink()
    first = ardor.load(tmp_path / "one")
    first.save(tmp_path / "two")
    again = ardor.load(tmp_path / "two")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "two")
    for tools in (None, [{"name": "f"}]):
        texts = {
            theirs.apply_chat_template(ASKED, tools=tools, tokenize=False),
            *(each.model.template.render(ASKED, tools=tools) for each in (first, again)),
        }
        assert len(texts) == 1
    assert set(theirs.chat_template) == {"default", "tool_use"}


def test_from_the_command_line(base, tmp_path, capsys, monkeypatch):
    flags = ["--chat-template", "chatml", "-n", "3", "--json"]
    assert main(["generate", str(base), "the cat", *flags]) == 0
    asked = json.loads(capsys.readouterr().out)
    lm = ardor.load(base, chat_template="chatml")
    assert asked["prompt_tokens"] == len(prompt_ids(lm.tokenizer, CHATML, ASKED))
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n"))
    assert main(["chat", str(base), *flags]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == asked["tokens"]


def test_a_row_that_cannot_be_rendered_is_named_before_anything_is_written(base, tmp_path, capsys):
    turns = [{"role": "system", "content": "S"}, {"role": "tool", "content": "x"}]
    rows = [
        {"messages": [*ASKED, {"role": "assistant", "content": "sat"}]},
        {"messages": [*turns, {"role": "assistant", "content": "sat"}]},
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    strict = tmp_path / "strict.jinja"
    strict.write_text(
        "{% for m in messages %}\n{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}"
        "{% endif %}\n{{ m.content }}<|im_end|>{% endfor %}"
    )
    run = tmp_path / "run"
    asked = ["finetune", str(base), str(data), "-o", str(run), "--chat-template", str(strict)]
    assert main(asked) == 2
    said = capsys.readouterr().err
    assert f"{data}:2 (messages): {strict}, line 2: no tools here; the line is" in said
    assert not run.exists()
