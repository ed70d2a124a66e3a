"""A real tokenizer small enough to train in a test."""

import pytest

from ardor.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat; what is a cat? " * 4], vocab_size=290)
