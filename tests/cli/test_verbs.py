"""Each verb from its command line: what it leaves, what it says, and how it ends."""

import json
import math
import re
import shlex
import shutil
import sys

import pytest
import torch

import ardor
from ardor import quickstart
from ardor.cli.console import program
from ardor.data.stdlib import Document, Pair
from ardor.generate.text import Generation, Piece
from ardor.text.chat import prompt_ids

from ..tiny import sentences, write_rows
from .conftest import STEPS, TRAIN, TUNE, Said, newest


def hints(said: Said) -> list[list[str]]:
    """The commands that the output proposes, without `ardor`."""
    lines = said.err.splitlines() + said.out.splitlines()
    shown = rf"(?:^|: |  ){re.escape(program())} (\w+ .*)$"
    found = [re.search(shown, line) for line in lines]
    return [shlex.split(match[1]) for match in found if match]


# --- train ---


def test_train_leaves_a_run_that_its_hint_generates_from(world, say, tmp_path):
    run = tmp_path / "a run"
    said = say("train", world.texts, "-o", run, *TRAIN, "--max-steps", 4, "--eval-fraction", 0.1)
    assert (said.code, said.out) == (0, "")
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "report.html", "checkpoint-4"} <= names
    assert "25 rows (text): 25 examples" in said.err and "held out 2 examples" in said.err
    assert re.search(r"training  4/4  loss \d\.\d+  [\d,]+ tokens/s", said.err)
    assert re.search(r"step 4: held-out loss \d\.\d+ nats, perplexity [\d.]+", said.err)
    (hint,) = hints(said)
    assert hint[:2] == ["generate", str(run)]
    done = say(*hint, "-n", 5)
    assert done.code == 0 and done.out.endswith("\n")
    assert "weights in float32, computing in float32 (as stored), on cpu" in done.err


def test_train_in_json_prints_the_lines_of_metrics(world, say, tmp_path):
    said = say("train", world.texts, "-o", tmp_path / "r", *TRAIN, "--max-steps", 2, "--json")
    assert said.code == 0
    rows = [json.loads(line) for line in said.out.splitlines()]
    kept = [
        json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row for row in rows if row["kind"] != "checkpoint"] == kept
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]


def test_train_takes_plain_text_a_folder_and_another_tokenizer(world, say, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(" ".join(sentences(5, seed=number)))
    said = say("train", folder, "-o", tmp_path / "a", *TRAIN, "--max-steps", 1)
    assert said.code == 0 and "12 rows (text)" in said.err and " cut" in said.err
    one = folder / "0.txt"
    args = ["--tokenizer", world.base, "--sample-prompts", "the cat", "--family", "gpt2"]
    said = say("train", one, "-o", tmp_path / "b", *TRAIN, "--max-steps", 2, *args)
    assert said.code == 0, said
    assert "step 2: sample: the cat" in said.err
    assert (newest(tmp_path / "b") / "tokenizer.json").read_bytes() == (
        newest(world.base) / "tokenizer.json"
    ).read_bytes()
    assert json.loads((newest(tmp_path / "b") / "config.json").read_text())["model_type"] == "gpt2"


def test_without_a_folder_the_next_free_one_is_taken(world, say, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        said = say("train", world.texts, *TRAIN, "--max-steps", 1)
        assert said.code == 0 and f"run: runs/train-{number}" in said.err


# --- finetune ---


FORMATS = {
    "messages": lambda q, a: {
        "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    },
    "prompt and completion": lambda q, a: {"prompt": q, "completion": a},
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "text": lambda q, a: {"text": f"{q} {a}"},
}


@pytest.mark.parametrize(
    ("method", "format"),
    [
        ("lora", "messages"),
        ("lora", "prompt and completion"),
        ("lora", "alpaca"),
        ("lora", "text"),
        ("full", "messages"),
        ("full", "text"),
        ("qlora", "messages"),
        ("qlora", "alpaca"),
    ],
)
@pytest.mark.sweep
def test_finetune_learns_each_format_with_each_method(world, say, tmp_path, method, format):
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    pairs = zip(sentences(22, 1), sentences(22, 2), strict=True)
    write_rows(data, [FORMATS[format](q, a) for q, a in pairs])
    args = ["--method", method, "--stop-rate-samples", 1, "--eval-fraction", 0.1]
    said = say(
        "finetune", world.base, data, "-o", run, *(STEPS if method == "full" else TUNE), *args
    )
    assert (said.code, said.out) == (0, ""), said
    assert "22 rows" in said.err and f"model: {method}, " in said.err
    assert ("base in nf4" in said.err) == (method == "qlora")
    before, after = (
        float(re.search(rf"{when}: +held-out loss (\d+\.\d+) nats", said.err)[1])  # type: ignore[index]
        for when in ("before", "after")
    )
    assert after < before
    assert re.search(r"stop rate \d+%", said.err)
    (hint,) = hints(said)
    chats = format in ("messages", "alpaca")
    assert hint[:2] == ["chat" if chats else "generate", str(run)]
    done = say(*hint, "-n", 4, stdin="the cat\n")
    assert done.code == 0 and done.out.endswith("\n")
    held = {"full": "", "lora": "adapter on", "qlora": "nf4"}[method]
    assert held in done.err


def test_finetune_says_what_it_did_with_rows_that_are_too_long(world, say, refused, tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": q, "completion": " a cat"} for q in sentences(12, 1)]
    rows[4]["prompt"] = " ".join(sentences(8))
    rows[7]["completion"] = " ".join(sentences(8))
    write_rows(data, rows)
    start = ["finetune", world.base, data, *TUNE]
    said = say(*start, "-o", tmp_path / "a")
    assert "12 rows" in said.err and "11 examples" in said.err
    assert "1 dropped, 1 truncated, each at most 48 tokens" in said.err
    said = say(*start, "-o", tmp_path / "b", "--over-length", "drop")
    assert "10 examples" in said.err and "2 dropped" in said.err
    message = refused(*start, "-o", tmp_path / "c", "--over-length", "error")
    assert (
        message.startswith(f"{data}:5 makes an example of ")
        and "longer than max_length=48" in message
    )
    assert not (tmp_path / "c").exists()


def test_an_adapter_is_not_fine_tuned_again(world, refused, tmp_path):
    message = refused("finetune", world.lora, world.pairs, "-o", tmp_path / "x", *TUNE)
    assert "is an adapter on" in message and "--resume" in message
    assert not (tmp_path / "x").exists()


# --- generate, chat, score ---


def test_generate_prints_the_text_or_all_of_it_as_json(world, say, refused):
    said = say("generate", world.base, "the cat", "-n", 6, "-t", 0)
    assert said.code == 0
    whole = json.loads(say("generate", world.base, "the cat", "-n", 6, "-t", 0, "--json").out)
    assert said.out == whole["text"] + "\n"
    assert len(whole["tokens"]) == len(whole["logprobs"]) <= 6
    assert whole["stop_reason"] in ("length", "stop_token")
    assert say("generate", world.base, "-", "-n", 6, "-t", 0, stdin="the cat").out == said.out
    assert refused("generate", world.base, "").startswith("the prompt is empty")
    assert "context holds 48" in refused("generate", world.base, "the cat " * 99)
    assert refused("generate", world.base, "x", "--top-p", 2).startswith("top_p=2.0 must be")


def test_generate_takes_a_config_file(world, say, refused, tmp_path):
    settings = tmp_path / "g.yaml"
    settings.write_text(
        f"model: {world.base}\nprompt: the cat\nmax_new_tokens: 6\ntemperature: 0\n"
    )
    wanted = say("generate", world.base, "the cat", "-n", 6, "-t", 0).out
    assert say("generate", "--config", settings).out == wanted
    settings.write_text("max_new_token: 6\n")
    message = refused("generate", world.base, "x", "--config", settings)
    assert message.startswith(
        f"{settings}, line 1: unknown key 'max_new_token'; did you mean 'max_new_tokens'?"
    )


def test_chat_answers_line_by_line_from_a_pipe(world, say, refused):
    lines = "a\n\n/new\nb\n/exit\nnot read\n"
    # A sampled token: the likeliest of a model this small is a control token, long as text.
    short = ("-n", 1, "--temperature", 9, "--seed", 4)
    said = say("chat", world.lora, *short, stdin=lines)
    assert said.code == 0
    answers = say("chat", world.lora, *short, "--json", stdin=lines)
    rows = [json.loads(line) for line in answers.out.splitlines()]
    assert len(rows) == 2
    assert said.out == "".join(f"{row['text']}\n" for row in rows)
    # A conversation: the second message is read after the first and its answer.
    heard = say("chat", world.lora, *short, "--json", stdin="a\nb\n")
    both = heard.out.splitlines()
    assert json.loads(both[0]) == rows[0]
    assert json.loads(both[1])["prompt_tokens"] > rows[1]["prompt_tokens"]
    message = refused("chat", world.base, stdin="hi\n")
    assert "has no chat template" in message and "`generate`" in message


def test_chat_shows_calls_and_takes_what_they_return(world, say, refused, tmp_path, monkeypatch):
    """The model's words are set; prompts are made and checked by its template, as ever."""
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([{"name": "weather", "parameters": {"type": "object"}}]))
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    asked, answers = [], [call + call, "warm", "bye"]

    def scripted(self, messages, *, tools, **settings):
        asked.append([dict(message) for message in messages])
        prompt_ids(self.tokenizer, self.model.template, messages, tools=tools)
        text = answers[len(asked) - 1]
        return iter([Piece(text, Generation(text, (), (), "stop_token", 0))])

    monkeypatch.setattr(ardor.LM, "stream_chat", scripted)
    flags = ("--tools", tools, "--chat-template", "qwen2.5")
    said = say("chat", world.base, *flags, stdin="hi\n/tool 21 C\n/tool\n/tool 7 C\nbye\n/new\n")
    assert said.code == 0 and said.out == f"{call}{call}\nwarm\nbye\n"
    assert "[a call of weather, and 1 more; give its result: /tool RESULT]" in said.err
    assert "/tool needs a RESULT after it" in said.err
    assert [len(messages) for messages in asked] == [1, 4, 6]
    first, second = asked[1][2:]
    assert first["content"] == "21 C" and second["content"] == "7 C"
    calls = asked[1][1]["tool_calls"]
    assert [c["id"] for c in calls] == [m["tool_call_id"] for m in (first, second)]
    assert calls[0]["function"]["arguments"] == {"city": "Paris"}
    asked.clear()
    assert "/tool is for --tools FILE" in say("chat", world.lora, stdin="/tool x\n").err
    tools.write_text("{}")
    assert "expected a list of functions" in refused("chat", world.base, "--tools", tools)
    tools.write_text('[{"name": "f"}]')
    assert "has no place for tools" in refused("chat", world.lora, "--tools", tools, stdin="a\n")


def test_calls_are_in_the_lines_of_json(world, say, tmp_path):
    tools = tmp_path / "tools.json"
    tools.write_text('[{"name": "f"}]')
    template = tmp_path / "short.jinja"
    template.write_text(
        "{% for t in tools %}{{ t.function.name }}{% endfor %}{{ messages[-1].content }}<|im_end|>"
    )
    flags = ("--tools", tools, "--chat-template", template, "-n", 2, "--json")
    line = json.loads(say("chat", world.base, *flags, stdin="hi\n").out)
    assert line["tool_calls"] == [] and len(line["tokens"]) <= 2


def test_score_of_a_text_and_of_a_file_are_those_of_the_library(world, say):
    text = "the cat sat on that hill"
    score = ardor.load(world.base).score(text)
    found = json.loads(say("score", world.base, text, "--text", "--json").out)
    assert found["perplexity"] == pytest.approx(score.perplexity)
    assert found["bits_per_byte"] == pytest.approx(score.bits_per_byte)
    assert found["logprobs"] == pytest.approx(list(score.logprobs))
    assert json.loads(say("score", world.base, "-", "--json", stdin=text).out) == found
    shown = say("score", world.base, text, "--text", "--tokens")
    assert f"{score.perplexity:,.3f}" in shown.out and "'the'" not in shown.out.splitlines()[-1]
    assert len(shown.out.splitlines()) == score.targets + 4

    whole = json.loads(say("score", world.base, world.texts, "--json").out)
    assert whole["perplexity"] == pytest.approx(math.exp(whole["loss"]))
    table = say("score", world.base, world.texts)
    assert table.code == 0 and f"loss           {whole['loss']:.4f} nats per token" in table.out
    tuned = say("score", world.lora, world.pairs)
    assert tuned.code == 0 and "22 rows" in tuned.out


def test_a_model_goes_where_it_is_told(world, say, refused, monkeypatch):
    assert " on cpu" in say("generate", world.base, "the", "-n", 1, "--device-map", "cpu").err
    message = refused("generate", world.base, "the", "--device-map", "cuda:99")
    assert "device_map='cuda:99' is not a device of this machine" in message
    module = sys.modules["ardor.load"]  # as an attribute of the package it is the function
    monkeypatch.setattr(module, "default_device", lambda: torch.device("cuda:98"))
    assert "device_map='cuda:98'" in refused("score", world.base, "the cat", "--text")


def test_quickstart_refuses_before_it_writes(refused, tmp_path):
    folder = tmp_path / "q"
    assert "steps=0 must be at least 1" in refused("quickstart", "-o", folder, "--steps", 0)
    assert not folder.exists()
    folder.write_text("")
    assert refused("quickstart", "-o", folder) == f"{folder} is a file; choose a folder with -o"


@pytest.mark.sweep
def test_quickstart_in_json_is_json_alone(say, tmp_path, monkeypatch):
    pairs = [Pair(f"What is {text}?", text, "words") for text in sentences(12)]
    texts = [Document(" ".join(sentences(9, seed)), "words") for seed in range(20)]
    monkeypatch.setattr(quickstart, "stdlib_pairs", lambda: pairs)
    monkeypatch.setattr(quickstart, "stdlib_documents", lambda exclude_modules: texts)
    monkeypatch.setattr(quickstart, "split_by_module", lambda *_: (pairs[2:], pairs[:2]))
    said = say("quickstart", "-o", tmp_path / "q", "--steps", 1, "--epochs", 0.01, "--json")
    assert said.code == 0, said.err
    kinds = [json.loads(line)["kind"] for line in said.out.splitlines()]
    assert set(kinds) == {"train", "eval", "sample", "checkpoint", "memory", "answer"}
    assert "4/4  chat" in said.err and said.err.count("held-out loss") == 5


def test_score_takes_a_limit_of_tokens_at_its_word(world, say, refused):
    whole, cut = (
        json.loads(say("score", world.base, world.texts, "--json", *limit).out)
        for limit in ((), ("--max-length", 4))
    )
    assert whole["targets"] == cut["targets"] and whole["loss"] != cut["loss"]
    assert "max_length is 0" in refused("score", world.base, world.texts, "--max-length", 0)


def test_score_points_to_its_flag_for_texts(world, refused):
    assert "add --text" in refused("score", world.base, "no such file of words")
    assert "give --text" in refused("score", world.base, world.texts, "--tokens")
    # An empty name is not the folder one is in.
    assert "data has an empty name; give a file" in refused("score", world.base, "")


def test_what_is_no_adapter_is_told_with_its_flag(world, refused, tmp_path):
    for given, what in ((world.base, "is a whole model"), (tmp_path / "none", "has none")):
        message = refused("generate", world.base, "the cat", "--adapter", given)
        assert f"holds adapter_config.json, and {given} {what}; give one that PEFT" in message
    message = refused("generate", world.base, "the cat", "--quantization", "none.yaml")
    assert "no such file: none.yaml; give a YAML file that is there" in message
    assert "--config" not in message


def test_an_embedding_is_adapted_as_a_whole_or_row_by_row(world, say, refused, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", [FORMATS["messages"]("the cat", "a dog")] * 12)
    args = ["finetune", world.base, data, *TUNE, "--target-modules", "q_proj", "embed_tokens"]
    message = refused(*args, "-o", tmp_path / "a")
    assert "but 2 rows of it were never trained" in message
    assert "--modules-to-save embed_tokens" in message and "--train-control-tokens no" in message
    assert say(*args, "-o", tmp_path / "b", "--train-control-tokens", "no").code == 0


# --- going on ---


def test_the_saved_settings_of_a_run_take_it_up_again(world, say, refused, tmp_path):
    run = tmp_path / "run"
    say("train", world.texts, "-o", run, *TRAIN, "--max-steps", 4, "--save-steps", 2, "--json")
    shutil.rmtree(run / "checkpoint-4")
    settings = run / "config.yaml"
    before = settings.read_text()
    said = say("train", "--config", settings, "--resume")  # without --json: that changes nothing
    assert said.code == 0 and "resumed at step 2 of 4" in said.err and "training  4/4" in said.err
    assert settings.read_text() == before and "\njson:" not in before
    said = say("train", "--config", settings, "--resume")
    assert said.code == 0 and "nothing left to do: the run is at step 4 of 4" in said.err
    for hint in hints(said):
        assert say(*hint, "-n", 3).code == 0
    message = refused("train", "--config", settings, "--resume", "--learning-rate", 0.5)
    assert "learning_rate: 0.002, now 0.5" in message
    message = refused("train", "--config", settings)
    assert message == (
        f"{run} already holds a run; add --resume to go on with it, "
        "or choose another folder with -o"
    )


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.sweep
def test_a_tuning_is_taken_up_again_from_its_saved_settings(world, say, tmp_path, method):
    settings = STEPS if method == "full" else [*TUNE, "--lora-dropout", 0.2]
    args = ["finetune", world.base, world.pairs, *settings, "--method", method]
    args += ["--save-steps", 2]
    say(*args, "-o", tmp_path / "whole")
    run = tmp_path / "run"
    say(*args, "-o", run)
    shutil.rmtree(run / "checkpoint-3")
    said = say("finetune", "--config", run / "config.yaml", "--resume")
    assert said.code == 0 and "resumed at step 2 of 3" in said.err
    assert "\nbefore:" not in said.err  # the model as it was before was not seen this time
    for file in newest(run).glob("*.safetensors"):
        assert file.read_bytes() == (newest(tmp_path / "whole") / file.name).read_bytes()


def test_a_run_of_the_library_is_taken_up_by_the_command(world, say, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(world.base, run)
    said = say("train", "--config", run / "config.yaml", "-o", run, "--resume")
    assert said.code == 0 and "nothing left to do" in said.err


def test_there_must_be_a_run_to_resume(world, refused, tmp_path):
    args = ["train", world.texts, *TRAIN, "--resume"]
    assert refused(*args).startswith("resume needs the folder of the run to go on with: -o RUN")
    message = refused(*args, "-o", tmp_path / "none")
    assert message.startswith(f"{tmp_path / 'none'} holds no run to resume")
    (tmp_path / "file").write_text("")
    message = refused("train", world.texts, *TRAIN, "-o", tmp_path / "file")
    assert message == f"{tmp_path / 'file'} is a file; give a folder with -o"


def test_a_run_is_not_put_into_a_model_or_beside_checkpoints_of_others(world, refused, tmp_path):
    train, tune = ["train", world.texts, *TRAIN], ["finetune", world.base, world.pairs, *TUNE]
    commands = {"config.json": train, "adapter_config.json": tune, "checkpoint-500": tune}
    for name, args in commands.items():
        folder = tmp_path / name
        (folder / name).mkdir(parents=True)
        message = refused(*args, "-o", folder)
        assert message.startswith(f"{folder} holds {name}, but no config.yaml of a run; choose")
        assert [path.name for path in folder.iterdir()] == [name]


def test_an_interrupted_run_names_the_command_that_takes_it_up(world, say, tmp_path, monkeypatch):
    import signal

    from ardor.train.trainer import Trainer

    step = Trainer._step

    def interrupted(self, *args):
        if self.progress.step == 1:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    run = tmp_path / "a run"
    said = say("train", world.texts, "-o", run, *TRAIN, "--max-steps", 5)
    monkeypatch.undo()
    assert said.code == 130 and "stopping after this step" in said.err
    assert "interrupted\nstopped at step 2 of 5; go on from there with" in said.err
    (hint,) = hints(said)
    done = say(*hint)
    assert done.code == 0 and "resumed at step 2 of 5" in done.err
