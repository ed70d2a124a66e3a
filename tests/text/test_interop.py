"""What we save, transformers reads to the same ids, special tokens and prompts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ardor.text.chat import CHATML, ChatTemplate, prompt_ids
from ardor.text.tokenizer import Tokenizer

TEXTS = [
    "",
    "hello the cat",
    " two  spaces\n\n",
    "über 你好 🙂",
    "<|im_start|>user\nhi<|im_end|>\n",
]


@pytest.fixture(scope="module", params=["tokenizer", "bos_tokenizer", "spaced_tokenizer"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Path]:
    ours = request.getfixturevalue(request.param)
    directory = tmp_path_factory.mktemp("saved")
    ours.save(directory, CHATML.source)
    return ours, directory


@pytest.mark.parametrize("theirs_class", [AutoTokenizer, PreTrainedTokenizerFast])
def test_transformers_reads_the_same_tokenizer(pair: tuple[Tokenizer, Path], theirs_class: type):
    ours, directory = pair
    theirs = theirs_class.from_pretrained(directory)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.eos_token_id == ours.special.eos
    assert theirs.pad_token_id == ours.special.pad
    assert theirs.bos_token_id == ours.special.bos
    assert max(theirs.get_vocab().values()) + 1 == ours.vocab_rows
    assert theirs.chat_template == CHATML.source
    ids = ours.encode("hello<|im_end|> the end", bos=False)
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_special=True)


def test_transformers_4_finds_the_template_and_the_names_where_it_looks(
    tokenizer: Tokenizer, tmp_path: Path
):
    tokenizer.save(tmp_path, CHATML.source)
    (tmp_path / "chat_template.jinja").unlink()
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs.chat_template == CHATML.source
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_directory(tmp_path).special == tokenizer.special  # from the legacy map


# What transformers' template would see is what ours sees, so contents without control tokens.
PLAIN = st.one_of(
    st.text(max_size=12).map(lambda text: text.replace("<", "")),
    st.sampled_from(["hello the end", " the cat", "über 1984\n\nx"]),
)


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(PLAIN, min_size=1, max_size=3), name=st.sampled_from(["chatml", "trims"]))
def test_prompts_are_those_of_apply_chat_template(
    pair: tuple[Tokenizer, Path],
    template: Callable[[str], ChatTemplate],
    contents: list[str],
    name: str,
):
    ours, directory = pair
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    # Every other answer starts with a letter: one that starts with a line end would be merged
    # with the prompt before it, which no model that generates can do.
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": ("x" if i % 2 else "") + content}
        for i, content in enumerate(contents)
    ]
    found = theirs.apply_chat_template(
        messages,
        chat_template=template(name).source,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    assert prompt_ids(ours, template(name), messages) == found


def test_a_checkpoint_of_transformers_is_read_by_us(tokenizer: Tokenizer, tmp_path: Path):
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>", model_max_length=512
    )
    theirs.chat_template = CHATML.source
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.from_directory(tmp_path)
    assert ours.special.eos == theirs.eos_token_id
    assert ours.special.pad == theirs.pad_token_id
    assert ours.max_length == 512
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]
    found = ChatTemplate.from_directory(tmp_path)
    assert found is not None
    assert found.source == CHATML.source
