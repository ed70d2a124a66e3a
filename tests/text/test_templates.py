"""The template of a model that comes without one: what is trained is what is asked, and it ends."""

import pytest
import tokenizers

from ardor.errors import TextError
from ardor.text.chat import CHATML, ChatTemplate, prompt_ids, supervise, terminator
from ardor.text.stops import StopSet
from ardor.text.templates import HEADINGS_SOURCE, default_template
from ardor.text.tokenizer import Tokenizer

from .conftest import TEXTS

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hello, the cat?"},
    {"role": "assistant", "content": "  on the mat\n"},
    {"role": "user", "content": "### User:\nagain"},
    {"role": "assistant", "content": "again <|endoftext|>"},
]


@pytest.fixture(scope="module")
def plain_tokenizer() -> Tokenizer:
    """As GPT-2's: one special token, which ends a document."""
    return Tokenizer.train(TEXTS, vocab_size=300, special_tokens=("<|endoftext|>",))


def test_chatml_is_taken_where_its_control_tokens_are(tokenizer, plain_tokenizer):
    assert default_template(tokenizer) is CHATML
    assert default_template(plain_tokenizer).source == HEADINGS_SOURCE


def test_without_an_eos_no_answer_could_end_and_it_says_so(plain_tokenizer):
    backend = tokenizers.Tokenizer.from_str(plain_tokenizer._backend.to_str())
    with pytest.raises(TextError, match="no EOS token, .* set eos_token in tokenizer_config.json"):
        default_template(Tokenizer(backend))


def test_headings_are_plain_text_and_every_answer_ends_with_eos(plain_tokenizer):
    template = default_template(plain_tokenizer)
    text = template.render(TURNS[:3], add_generation_prompt=False)
    assert text == (
        "### System:\nBe brief.\n\n### User:\nhello, the cat?\n\n"
        "### Assistant:\n  on the mat\n<|endoftext|>\n\n"
    )
    eos = plain_tokenizer.special.eos
    assert terminator(plain_tokenizer, template) == eos
    assert StopSet.gather(plain_tokenizer, template=template).ids == {eos}


def test_an_answer_is_trained_after_exactly_what_the_model_is_asked(plain_tokenizer):
    template = default_template(plain_tokenizer)
    (example,) = supervise(plain_tokenizer, template, TURNS)
    eos = plain_tokenizer.special.eos
    done = 0
    for turn in (2, 4):
        prompt = prompt_ids(plain_tokenizer, template, TURNS[:turn])
        assert list(example.tokens[: len(prompt)]) == prompt
        assert not any(example.supervised[done : len(prompt)])
        answer = plain_tokenizer.encode_content(TURNS[turn]["content"])
        done = len(prompt) + len(answer) + 1
        assert list(example.tokens[len(prompt) : done]) == [*answer, eos]
        assert all(example.supervised[len(prompt) : done])
    # An EOS that somebody spelled ends nothing.
    assert example.tokens.count(eos) == 2


def test_saved_headings_are_the_same_template(plain_tokenizer, tmp_path):
    template = default_template(plain_tokenizer)
    plain_tokenizer.save(tmp_path, template.source)
    found = ChatTemplate.from_directory(tmp_path)
    assert found is not None and found.source == template.source
    again = Tokenizer.from_directory(tmp_path)
    assert prompt_ids(again, found, TURNS[:2]) == prompt_ids(plain_tokenizer, template, TURNS[:2])
