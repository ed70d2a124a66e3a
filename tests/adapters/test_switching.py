"""Adapters of every kind on one loaded base: each answers as if it were loaded alone."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ardor
from ardor.cli.main import main
from ardor.errors import ConfigError
from ardor.files.runs import newest_checkpoint
from ardor.text.chat import CHATML, prompt_ids
from ardor.train import finetune
from ardor.train.config import Finetune

from ..tiny import make_base, sentences, write_rows

PROMPTS = ["the cat", "a mat", "and then it saw"]
ASKED = [{"role": "user", "content": "the cat"}]
SHORT = {"max_new_tokens": 4, "temperature": 0.0}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "other": {"lora_r": 4, "target_modules": ("q_proj", "up_proj")},
    "dora": {"use_dora": True},
    "whole": {"modules_to_save": ("embed_tokens",)},
    "tokens": {"add_tokens": ("<tool>",)},
    "chat": {"chat_template": "chatml"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder of a base `b`, and of a run of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    base = make_base(folder)
    pairs = zip(sentences(22, 1), sentences(22, 2), strict=True)
    data = write_rows(folder / "p.jsonl", [{"prompt": p, "completion": c} for p, c in pairs])
    for name, settings in KINDS.items():
        given = {"max_steps": 3, "learning_rate": 3e-2, "lora_r": 2, "dtype": "float32", **settings}
        config = Finetune(model=str(base), data=str(data), output=folder / name, **given)
        list(finetune.prepare(config).events())
    return folder


@pytest.fixture(scope="module")
def alone(runs) -> dict[str, ardor.LM]:
    return {name: ardor.load(runs / name, dtype="float32") for name in KINDS}


@pytest.fixture
def lm(runs) -> ardor.LM:
    loaded = ardor.load(runs / "b", dtype="float32")
    for name in KINDS:
        loaded.load_adapter(runs / name, name)
    return loaded


def test_each_request_has_the_adapter_that_it_names(lm, alone):
    text = "the cat sat on that <tool> hill"
    nats = {lm.score(text, adapter=name).nats for name in (None, *KINDS)}
    assert len(nats) == len(KINDS) + 1  # the probe tells each of them apart
    for name, own in alone.items():
        assert lm.score(text, adapter=name) == own.score(text)
        pairs = zip(
            lm.generate(PROMPTS, adapter=name, **SHORT), own.generate(PROMPTS, **SHORT), strict=True
        )
        for mine, theirs in pairs:
            assert replace(mine, logprobs=()) == replace(theirs, logprobs=())
            # Tables lie at other addresses, and how a product is rounded depends on those.
            assert mine.logprobs == pytest.approx(theirs.logprobs, abs=2e-6)
    base = lm.generate(PROMPTS, **SHORT)
    mixed = lm.generate(PROMPTS, adapter=["dora", None, "whole"], **SHORT)
    assert mixed[1].tokens == base[1].tokens
    for place, name in ((0, "dora"), (2, "whole")):
        assert mixed[place].tokens == alone[name].generate(PROMPTS[place], **SHORT).tokens


def test_an_adapter_brings_its_template_its_ends_and_its_tokens(lm, alone):
    with pytest.raises(ConfigError, match="has no chat template"):
        lm.chat(ASKED, **SHORT)
    own = alone["chat"]
    assert lm.chat(ASKED, adapter="chat", **SHORT) == own.chat(ASKED, **SHORT)
    pieces = [*lm.stream_chat(ASKED, adapter="chat", **SHORT)]
    assert "".join(piece.text for piece in pieces) == own.chat(ASKED, **SHORT).text
    assert lm.model.template is None  # for a request only
    lm.use_adapter("chat")
    assert lm.model.stops == own.model.stops
    assert len(prompt_ids(lm.tokenizer, CHATML, ASKED)) == lm.chat(ASKED, **SHORT).prompt_tokens
    lm.use_adapter("tokens")
    assert lm.model.template is None and lm.tokenizer.id("<tool>") is not None
    assert lm.model.decoder.tokens_known == alone["tokens"].model.decoder.tokens_known
    lm.use_adapter(None)
    assert lm.tokenizer.id("<tool>") is None


def test_sums_of_adapters_and_what_has_none(lm):
    lm.combine_adapters("sum", {"plain": 0.5, "other": -1.0})
    assert lm.score("the cat", adapter="sum").nats != lm.score("the cat", adapter="plain").nats
    kinds = {"dora": "DoRA", "whole": "all of its weights", "tokens": "rows of single tokens"}
    for name, kind in kinds.items():
        with pytest.raises(ConfigError, match=rf"more than a product of A and B \({kind}\)"):
            lm.combine_adapters("bad", {"plain": 1.0, name: 1.0})
    assert "bad" not in [*lm.adapters]


def test_wrong_names_and_folders(lm, runs, tmp_path):
    with pytest.raises(ConfigError, match="there is no adapter 'plan'; did you mean 'plain'?"):
        lm.generate("x", adapter="plan", **SHORT)
    with pytest.raises(ConfigError, match="found 1 adapters for 3 prompts"):
        lm.generate(PROMPTS, adapter=["plain"], **SHORT)
    with pytest.raises(ConfigError, match="there is an adapter 'plain' already"):
        lm.load_adapter(runs / "dora", "plain")
    assert lm.score("the cat", adapter="plain").targets == 2  # and nothing changed


def test_an_adapter_with_more_tokens_than_rows_is_told(runs, tmp_path):
    newest = newest_checkpoint(runs / "plain")
    assert newest is not None
    lm = ardor.load(runs / "b", dtype="float32")
    many = lm.tokenizer.adding([f"<t{i}>" for i in range(64)])
    shutil.copytree(newest, tmp_path / "many")
    many.save(tmp_path / "many")
    with pytest.raises(ConfigError, match="adds tokens up to id .* load that adapter as the model"):
        lm.load_adapter(tmp_path / "many", "many")
    assert "many" not in [*lm.adapters]


def said(capsys, *command: Any) -> Any:
    assert main([*map(str, command), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_several_from_the_command_line(runs, alone, capsys, monkeypatch):
    def put(*adapters: Any) -> list[str]:
        each = [part for one in adapters for part in ("--adapter", str(one))]
        return [*each, "--dtype", "float32"]

    base, text, short = runs / "b", "the cat sat", ["-n", 4, "-t", 0]
    first = said(capsys, "score", base, text, "--text", *put(runs / "dora", f"p={runs / 'plain'}"))
    assert first["logprobs"] == list(alone["dora"].score(text).logprobs)
    given = [*put(f"a={runs / 'plain'}", runs / "other"), "--adapter-weights", "0.5", "-1"]
    summed = said(capsys, "generate", base, text, *short, *given)
    lm = ardor.load(base, dtype="float32", adapter=runs / "plain")
    lm.load_adapter(runs / "other", "o")
    lm.combine_adapters("s", {"default": 0.5, "o": -1.0})
    assert summed["logprobs"] == list(lm.generate(text, adapter="s", **SHORT).logprobs)
    ties = ["--adapter-combination", "ties_svd", "--adapter-density", "0.5"]
    ties += ["--adapter-majority-sign", "frequency"]
    summed = said(capsys, "generate", base, text, *short, *given, *ties)
    weights = {"default": 0.5, "o": -1.0}
    lm.combine_adapters("t", weights, how="ties_svd", density=0.5, majority_sign_method="frequency")
    assert summed["logprobs"] == list(lm.generate(text, adapter="t", **SHORT).logprobs)
    dare = ["--adapter-combination", "dare_linear_svd", "--adapter-density", "0.5"]
    dare += ["--adapter-rank", "2", "--adapter-seed", "3"]
    summed = said(capsys, "generate", base, text, *short, *given, *dare)
    lm.combine_adapters("d", weights, how="dare_linear_svd", density=0.5, rank=2, seed=3)
    assert summed["logprobs"] == list(lm.generate(text, adapter="d", **SHORT).logprobs)
    lines = "the cat\n/new\n/adapter dora\n/adapter c\nthe cat\n/adapter nope\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    two = put(f"c={runs / 'chat'}", f"again={runs / 'chat'}")
    assert main(["chat", str(base), *map(str, short), *two, "--json"]) == 0
    heard = capsys.readouterr()
    one, other = (json.loads(line)["tokens"] for line in heard.out.splitlines())
    assert one == other == list(alone["chat"].chat(ASKED, **SHORT).tokens)
    assert "there is no adapter 'dora'" in heard.err and "there is no adapter 'nope'" in heard.err


def test_the_model_may_come_after_its_adapter(runs, alone, capsys):
    short = ["-n", "4", "-t", "0", "--dtype", "float32"]
    found = said(capsys, "generate", "--adapter", runs / "plain", runs / "b", "the cat", *short)
    assert found["tokens"] == list(alone["plain"].generate("the cat", **SHORT).tokens)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["--adapter", "x/a", "--adapter", "y/a"],
            "--adapter: 'a' is the name of two; write NAME=y/a",
        ),
        (["--adapter", "x", "--adapter-weights", "1", "2"], "found 2 adapter_weights for 1"),
        (["--adapter-weights", "1"], "found 1 adapter_weights for 0 adapters"),
        (["--adapter", "x", "--adapter-density", "0.5"], "adapter_density says how adapters are"),
        # Before the folder, which is not there, is looked for.
        (
            ["--adapter", "x", "--adapter-weights", "1", "--adapter-combination", "ties"],
            "how='ties' keeps a share of each adapter: give a density (--adapter-density)",
        ),
    ],
)
def test_mistakes_of_the_command_line(runs, capsys, flags, told):
    assert main(["generate", str(runs / "b"), "x", *flags]) == 2
    assert told in capsys.readouterr().err
