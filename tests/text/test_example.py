import pytest

from ardor.errors import TextError
from ardor.text.example import Example, completion, document
from ardor.text.tokenizer import Tokenizer


def test_an_example_has_one_flag_for_each_token():
    assert Example((1, 2, 3), (True, False, True)).targets == 1
    with pytest.raises(TextError, match="2 tokens but 1 supervised flags"):
        Example((1, 2), (True,))


def test_a_document_is_all_trained_on_up_to_and_with_its_end(
    tokenizer: Tokenizer, bos_tokenizer: Tokenizer
):
    eos = tokenizer.special.eos
    found = document(tokenizer, "the cat")
    assert found.tokens == (*tokenizer.encode("the cat"), eos)
    assert all(found.supervised)
    assert document(bos_tokenizer, "the cat").tokens == (*bos_tokenizer.encode("the cat"), eos)


def test_a_document_that_spells_the_end_token_has_only_its_own_end(tokenizer: Tokenizer):
    text = "a<|endoftext|>b"
    assert document(tokenizer, text).tokens.count(tokenizer.special.eos) == 1
    assert tokenizer.decode(document(tokenizer, text).tokens[:-1]) == text


def test_the_ids_of_a_completion_follow_those_of_the_prompt(bos_tokenizer: Tokenizer):
    # Together "hello th" and "e" would be other tokens than apart.
    prompt = bos_tokenizer.encode("hello th")
    joint = bos_tokenizer.encode("hello the")
    assert joint[: len(prompt)] != prompt
    found = completion(bos_tokenizer, "hello th", "e end")
    assert found.tokens[: len(prompt)] == tuple(prompt)
    assert found.supervised == (False,) * len(prompt) + (True,) * (len(found.tokens) - len(prompt))
    answer = [id for id, on in zip(found.tokens, found.supervised, strict=True) if on]
    assert bos_tokenizer.decode(answer) == "e end<|endoftext|>"


def test_a_completion_adds_no_space_of_its_own(spaced_tokenizer: Tokenizer):
    found = completion(spaced_tokenizer, "the cat", "sat")
    assert spaced_tokenizer.decode(found.tokens, skip_special=True) == "the catsat"


def test_without_an_end_token_there_is_no_example(tokenizer: Tokenizer):
    endless = Tokenizer(tokenizer._backend)
    with pytest.raises(TextError, match="no EOS token"):
        document(endless, "text")
    assert document(endless, "text", stop_id=3).tokens[-1] == 3
    assert completion(endless, "a", "b", stop_id=3).tokens[-1] == 3
