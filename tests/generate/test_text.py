"""Text out: pieces that join to the whole, stop strings of which nothing is shown, settings."""

import math
import random
from dataclasses import replace

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from ardor.errors import ConfigError
from ardor.generate import text as module
from ardor.generate.settings import Settings
from ardor.generate.text import Generation, Piece, chat_prompt, generate, resolve_settings, stream
from ardor.lm import LM
from ardor.load import Model, tokenizer_of
from ardor.text.chat import CHATML
from ardor.text.stops import StopSet
from ardor.text.tokenizer import Tokenizer


@pytest.fixture
def write(model, monkeypatch):
    """Streams what a model gives that writes exactly these ids."""

    def run(ids: list[int], **settings) -> tuple[list[Piece], Generation]:
        step = iter(ids)
        monkeypatch.setattr(
            module, "sampler", lambda **_: lambda logits: torch.tensor([next(step)] * len(logits))
        )
        settings = {"max_new_tokens": len(ids), **settings}
        pieces = list(stream(model, [1, 2, 3], Settings(**settings)))
        step = iter(ids)
        (whole,) = generate(model, [[1, 2, 3]], Settings(**settings))
        assert pieces[-1].done == whole  # one text, however it is asked for
        assert [piece.done for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert "".join(piece.text for piece in pieces) == whole.text
        return pieces, whole

    return run


def spelled(model: Model, text: str) -> list[int]:
    """The text in tokens of one byte each, so that everything straddles."""
    tokenizer = tokenizer_of(model)
    return [id for char in text for id in tokenizer.encode_content(char)]


def test_pieces_join_to_the_text(model, write):
    text = "the cat; naïve 你好 🙂 ends"
    pieces, whole = write(tokenizer_of(model).encode(text))
    assert whole.text == text and whole.stop_reason == "length"
    assert len(pieces) > 5
    assert not any("\ufffd" in piece.text for piece in pieces)


def test_half_a_character_at_the_end_is_shown_as_such(model, write):
    ids = tokenizer_of(model).encode("a🤖")
    assert len(ids) > 3
    _, whole = write(ids[:-1])
    assert whole.text == "a\ufffd"


@pytest.fixture
def spaced(model) -> Model:
    """The model with a tokenizer whose words begin with a space, which a text does not."""
    vocab = {word: id for id, word in enumerate(["▁once", "▁upon", "▁a", "▁time", "s", "▁END"])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="s"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return replace(model, tokenizer=Tokenizer(backend), stops=StopSet(frozenset()))


def test_a_continuation_joins_to_its_prompt_and_an_answer_begins_a_text(spaced, monkeypatch):
    def choices(**_):
        step = iter([2, 3, 4, 5, 1])  # " a", " time", "s", " END", ...
        return lambda logits: torch.tensor([next(step)])

    monkeypatch.setattr(module, "sampler", choices)
    lm = LM(spaced)
    settings = {"max_new_tokens": 5, "stop": "END"}
    assert lm.generate("once upon", **settings).text == " a times "
    pieces = list(lm.stream("once upon", **settings))
    assert "".join(piece.text for piece in pieces) == " a times "
    assert pieces[-1].done == lm.generate("once upon", **settings)
    assert lm.generate("END upon", **settings).text == " a times "  # not the prompt's END
    answer = generate(spaced, [[0, 1]], Settings(max_new_tokens=3))
    assert answer[0].text == "a times"


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("hello END world", "END", "hello "),
        ("hello END", "END", "hello "),
        ("END", "END", ""),
        ("EEEND", "END", "EE"),
        ("ENENEND!", "ENEND", "EN"),
        ("naïve 🙂🙂 x", "🙂🙂", "naïve "),
        ("a\n\nb", "\n\n", "a"),
    ],
)
def test_a_stop_string_across_tokens_ends_the_text_and_nothing_of_it_is_shown(
    model, write, text, stop, shown
):
    pieces, whole = write(spelled(model, text), stop=(stop,))
    assert (whole.text, whole.stop_reason, whole.stopped) == (shown, "stop_string", True)
    assert len(whole.tokens) == len(spelled(model, text[: text.index(stop) + len(stop)]))
    assert len(whole.tokens) == len(whole.logprobs)
    assert all(stop[0] not in piece.text or stop[0] in shown for piece in pieces)


def test_the_beginning_of_a_stop_string_is_shown_once_it_is_no_stop(model, write):
    pieces, whole = write(spelled(model, "an EN and an E"), stop=("END",))
    assert whole.text == "an EN and an E" and whole.stop_reason == "length"
    assert [piece.text for piece in pieces[:4]] == ["a", "n", " ", "EN "]


def test_of_several_stop_strings_the_first_in_the_text_ends_it(model, write):
    _, whole = write(spelled(model, "one; two. three"), stop=(".", "; t", ";"))
    assert whole.text == "one"


@pytest.mark.sweep
def test_stop_strings_and_streams_agree_on_random_texts(model, write):
    chosen = random.Random(0)
    for _ in range(25):
        text = "".join(chosen.choices("ab🙂", k=14))
        stops = tuple("".join(chosen.choices("ab🙂", k=chosen.randint(1, 4))) for _ in range(2))
        ends = [text.find(s) + len(s) for s in stops if s in text]
        first = min(ends, default=len(text))  # the first to be complete ends the text
        _, whole = write(spelled(model, text), stop=stops)
        found = [at for s in stops if (at := text[:first].find(s)) >= 0]
        assert whole.text == (text[: min(found)] if found else text)
        assert whole.stop_reason == ("stop_string" if found else "length")


def test_a_stop_token_ends_the_text_and_is_not_in_it(model, write):
    eos = tokenizer_of(model).special.eos
    assert eos is not None and eos in model.stops.ids
    _, whole = write([*spelled(model, "ab E"), eos, *spelled(model, "cd")], stop=("END",))
    assert (whole.text, whole.stop_reason, whole.stopped) == ("ab E", "stop_token", True)
    assert whole.tokens[-1] == eos
    assert whole.prompt_tokens == 3


def test_every_stop_token_of_the_model_ends_the_text(model, write):
    one, other = spelled(model, "xy")
    both = replace(model.stops, ids=frozenset({one, other}))
    before, model.stops = model.stops, both
    try:
        assert write(spelled(model, "abxcd"))[1].text == "ab"
        assert write(spelled(model, "ayxcd"))[1].text == "a"
    finally:
        model.stops = before


def test_stop_strings_of_generation_config_count_too(model, write):
    before, model.stops = model.stops, replace(model.stops, strings=("##",))
    try:
        assert write(spelled(model, "ab## c"))[1].text == "ab"
        assert write(spelled(model, "ab; ## c"), stop=(";",))[1].text == "ab"
    finally:
        model.stops = before


def test_a_lone_stop_string_is_one_and_an_empty_one_is_refused(model):
    found = LM(model).generate("the cat", stop="no such text", max_new_tokens=5, temperature=0.0)
    assert len(found.tokens) == 5
    with pytest.raises(ConfigError, match="a stop string is empty"):
        LM(model).generate("the cat", stop=("", "x"))


def test_the_vocabulary_ends_with_the_tokenizer(model, monkeypatch):
    known = tokenizer_of(model).vocab_rows
    assert known < model.decoder.spec.vocab
    for answer in generate(
        model, [[1], [2, 3]] * 8, Settings(max_new_tokens=30, temperature=5.0, seed=1)
    ):
        assert max(answer.tokens) < known
    # Without the limit the same draws do go beyond.
    monkeypatch.setattr(model.decoder, "tokens_known", None)
    tokens = [
        token.id
        for token in module.decode(
            model.decoder,
            [[1], [2, 3]] * 8,
            module.Request(
                max_new_tokens=30,
                choose=module.sampler(temperature=5.0, generator=torch.Generator().manual_seed(1)),
            ),
        )
    ]
    assert max(tokens) >= known


@pytest.mark.sweep
def test_a_seed_repeats_and_greedy_needs_none(model):
    lm = LM(model)
    assert lm.generate("the", temperature=1.0, seed=3) == lm.generate(
        "the", temperature=1.0, seed=3
    )
    assert lm.generate("the", temperature=1.0, seed=3) != lm.generate(
        "the", temperature=1.0, seed=4
    )
    assert lm.generate("the") == lm.generate("the", seed=5)
    both = lm.generate(["the", "a cat"], max_new_tokens=7)
    assert [answer.tokens for answer in both] == [
        lm.generate(prompt, max_new_tokens=7).tokens for prompt in ("the", "a cat")
    ]
    assert lm.generate([]) == []


SAMPLED = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}


@pytest.mark.parametrize(
    ("given", "config", "wanted"),
    [
        ({}, {}, {"temperature": 0.0}),
        ({}, {"temperature": 0.6}, {"temperature": 0.0}),  # without do_sample: greedy
        ({}, SAMPLED, {"temperature": 0.6, "top_k": 20, "top_p": 0.9}),
        ({}, {"do_sample": True}, {"temperature": 1.0, "top_k": None}),
        ({}, {"do_sample": True, "top_k": 0}, {"temperature": 1.0, "top_k": None}),
        ({"temperature": 0.0}, SAMPLED, {"temperature": 0.0}),
        ({"temperature": 0.3}, SAMPLED, {"temperature": 0.3, "top_k": 20, "top_p": 0.9}),
        ({"top_k": 5}, SAMPLED, {"temperature": 0.6, "top_k": 5, "top_p": 0.9}),
        ({"top_p": 0.5}, {}, {"temperature": 1.0, "top_p": 0.5}),  # a filter asks for samples
        ({"temperature": 0.0, "top_p": 0.5}, {}, {"temperature": 0.0}),
        ({}, {"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"repetition_penalty": 1.0}, {"repetition_penalty": 1.2}, {"repetition_penalty": 1.0}),
    ],
)
def test_what_is_left_open_comes_from_generation_config(given, config, wanted):
    found = resolve_settings(Settings(**given), config)
    assert {key: getattr(found, key) for key in wanted} == wanted


@pytest.mark.parametrize("key", ["temperature", "top_k", "repetition_penalty"])
def test_what_generation_config_says_must_be_a_number(key):
    with pytest.raises(ConfigError, match=f"generation_config.json: {key}='hot' is not a number"):
        resolve_settings(Settings(), {key: "hot"})


def test_a_model_without_a_template_does_not_chat(model):
    assert model.template is None
    with pytest.raises(ConfigError, match="has no chat template, .*use `generate`"):
        LM(model).chat([{"role": "user", "content": "hi"}])
    with_template = replace(model, template=CHATML)
    ids = chat_prompt(with_template, [{"role": "user", "content": "hi"}])
    shown = tokenizer_of(model).decode(ids)
    assert shown == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_logprobs_are_of_the_tokens_in_nats(model):
    found = LM(model).generate("the cat sat", max_new_tokens=6, temperature=0.8, seed=1)
    prompt = tokenizer_of(model).encode("the cat sat")
    ids = torch.tensor([[*prompt, *found.tokens]])
    logprobs = model.decoder.token_logits(model.decoder.hidden(ids)).log_softmax(-1)[0]
    wanted = [float(logprobs[len(prompt) - 1 + i, id]) for i, id in enumerate(found.tokens)]
    assert found.logprobs == pytest.approx(wanted, abs=1e-4)
    assert all(value <= 0 for value in found.logprobs) and not any(map(math.isnan, found.logprobs))
