"""`ardor preview` from its command line: a terminal, a pipe, 40 columns, JSON and a page."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from ardor.cli import console
from ardor.cli.main import main
from ardor.files.runs import newest_checkpoint
from ardor.text.tokenizer import Tokenizer

from ..test_vocabulary import made
from ..tiny import make_base, sentences, write_rows

TURNS = [
    {"role": "user", "content": "hi <|im_end|>"},
    {"role": "assistant", "content": "the  cat"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def data(tmp_path) -> Path:
    return write_rows(tmp_path / "c.jsonl", [{"messages": TURNS}] * 3)


def test_a_pipe_gets_signs_instead_of_colours(model, data, capsys):
    assert main(["preview", str(model), str(data), "--rows", "1"]) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out and said.err == ""
    assert "⟦the··cat◇<|im_end|>■⟧" in said.out
    assert "hi <|im_end|>◇<|im_end|>↵" in said.out.replace("hi <|im_end|>\n", "hi <|im_end|>")
    assert "1 of 3 examples" in said.out and "micro-batch 1 of 1: 1 of 3 documents" in said.out
    assert f"{data}:1: " in said.out and "targets (" in said.out
    assert "chat template: ChatML" in said.out and "<|im_end|> (279)" in said.out
    assert "dropped, too long" in said.out


@pytest.mark.parametrize("no_color", [False, True])
def test_a_narrow_terminal(model, data, capsys, monkeypatch, no_color):
    def terminal(*, stderr: bool):
        return console._Console(
            stderr=stderr,
            force_terminal=True,
            width=40,
            no_color=no_color,
            color_system="standard",
            markup=False,
            emoji=False,
            highlight=False,
        )

    monkeypatch.setattr(console, "_console", terminal)
    assert main(["preview", str(model), str(data)]) == 0
    out = capsys.readouterr().out
    plain = [_without_styles(line) for line in out.splitlines()]
    assert max(map(len, plain)) <= 40
    assert ("⟦" in out) == no_color
    assert ("\x1b[32m" in out) != no_color  # green: trained on


def _without_styles(line: str) -> str:
    while "\x1b[" in line:
        before, _, after = line.partition("\x1b[")
        line = before + after.partition("m")[2]
    return line


def test_json_and_a_page(model, data, tmp_path, capsys):
    page = tmp_path / "p.html"
    assert main(["preview", str(model), str(data), "--json", "-o", str(page)]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    (batch,) = found["batches"]
    assert len(batch["documents"]) == 3 and found["census"]["examples"] == 3
    row = batch["documents"][0]
    ((first, last),) = row["trained"]
    assert row["targets"] == last - first + 1 and row["ends"]
    text = "".join(cell["text"] for cell in row["cells"] if cell["trained"])
    assert text == "the  cat<|im_end|>"
    assert said.err.strip() == f"wrote {page}"
    assert page.read_text().startswith("<!doctype html>")


def test_a_template_by_name_and_one_that_is_unknown(model, data, capsys):
    assert main(["preview", str(model), str(data), "--chat-template", "headings"]) == 0
    assert "### Assistant:↵" in capsys.readouterr().out
    for name, reason in [
        ("chatlm", "did you mean chatml? Known are headings, chatml, llama2"),
        ("llama3", "chat_template=llama3 needs the tokens bos_token, <|start_header_id|>"),
    ]:
        assert main(["preview", str(model), str(data), "--chat-template", name]) == 2
        said = capsys.readouterr()
        assert reason in said.err and said.out == ""


def test_it_knows_a_run_and_its_adapter(model, data, tmp_path, capsys):
    assert newest_checkpoint(model) is not None
    run = tmp_path / "run"
    flags = ["--max-steps", "1", "--lora-r", "2", "--dtype", "float32", "--train-on", "last"]
    assert main(["finetune", str(model), str(data), "-o", str(run), *flags]) == 0
    assert "the last answer of a conversation is trained on" in capsys.readouterr().err
    assert "train_on: last" in (run / "config.yaml").read_text()
    assert main(["preview", str(run), str(data)]) == 0
    assert "chat_template.jinja" in capsys.readouterr().out
    # Of a run the checkpoint that stands for it has the template, as for every other verb.
    args = ["--clone-chat-template", str(run), "--rows", "1"]
    assert main(["preview", str(model), str(data), *args]) == 0
    assert f"the chat template of {run}" in capsys.readouterr().out


def test_documents_of_a_folder_are_pieces_with_ends_at_their_borders_only(tmp_path, capsys):
    """Continued pre-training: each token is predicted once, but for a document's first."""
    base = made(tmp_path / "m", bos_token="<s>")
    file = base / "tokenizer.json"
    backend = Backend.from_file(str(file))
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", bos)])
    backend.save(str(file))
    config = json.loads((base / "config.json").read_text()) | {"max_position_embeddings": 512}
    (base / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_directory(base)
    texts = {"a.txt": " ".join(sentences(60, 1)), "b.txt": "short", "c/d.txt": "the <s> cat"}
    for name, text in texts.items():
        (tmp_path / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "docs" / name).write_text(text)
    flags = ["--max-length", "256", "--rows", "99", "--json"]
    assert main(["preview", str(base), str(tmp_path / "docs"), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    documents = [row for batch in found["batches"] for row in batch["documents"]]
    read: dict[str, list[int]] = {}
    for row in documents:
        ids = [id for cell in row["cells"] for id in cell["ids"]]
        trained = [cell["trained"] for cell in row["cells"] for _ in cell["ids"]]
        assert len(ids) <= 256 and trained == [False] + [True] * (len(ids) - 1)
        whole = read.setdefault(Path(row["where"]).name, [])
        assert not whole or whole[-1] == ids[0]
        whole += ids[1:] if whole else ids
    assert len(documents) > len(texts)
    for name, text in texts.items():
        body = tokenizer.encode_content(text, place="start")
        assert bos not in body
        expected = [bos, *body, tokenizer.special.eos]
        assert read[Path(name).name] == expected
