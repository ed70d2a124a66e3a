"""The quickstart's input: real, large enough, and held out by package."""

import sys

import pytest

from ardor.data import stdlib
from ardor.data.stdlib import (
    Pair,
    first_sentence,
    package,
    split_by_module,
    stdlib_documents,
    stdlib_pairs,
)
from ardor.errors import DataError

pytestmark = pytest.mark.sweep


@pytest.fixture(scope="module")
def pairs():
    return stdlib_pairs()


def test_there_are_thousands_of_pairs_with_clean_answers(pairs):
    assert len(pairs) > 1000
    answers = [pair.answer for pair in pairs]
    assert len(set(answers)) == len(answers)
    for pair in pairs:
        assert 20 <= len(pair.answer) <= 160
        assert pair.answer.endswith(".") and pair.answer.isascii()
        assert pair.answer == " ".join(pair.answer.split())
        assert not any(part.startswith("_") for part in pair.module.split("."))
        assert not stdlib.SKIPPED & set(pair.module.split("."))
    openings = {pair.question.split()[0] for pair in pairs}
    assert len(openings) > 5
    roles = [message["role"] for message in pairs[0].messages]
    assert roles == ["user", "assistant"]


def test_a_known_function_is_among_them(pairs):
    (dedent,) = (pair for pair in pairs if "textwrap.dedent" in pair.question)
    assert dedent.answer == "Remove any common leading whitespace from every line in `text`."
    assert dedent.row.values == {"messages": list(dedent.messages)}


def test_parsing_again_gives_the_same_pairs_and_imports_nothing(pairs, monkeypatch):
    monkeypatch.delitem(sys.modules, "antigravity", raising=False)  # importing it opens a browser
    stdlib._modules.cache_clear()
    before = set(sys.modules)
    assert stdlib_pairs() == pairs
    list(stdlib_documents(100_000))
    assert set(sys.modules) == before


def test_documents_are_megabytes_and_start_with_prose():
    documents = list(stdlib_documents())
    assert sum(len(document.text.encode()) for document in documents) > 2_000_000
    assert len({document.module for document in documents}) > 100
    prose = next(d for d in documents if d.module == "textwrap").text
    assert prose.startswith("textwrap\n\nText wrapping and filling.\n\nclass textwrap.TextWrapper(")


def test_a_limit_in_bytes_is_kept_and_nearly_reached():
    limited = list(stdlib_documents(300_000))
    assert 250_000 < sum(len(document.text.encode()) for document in limited) <= 300_000
    assert len({document.module for document in limited}) > 20


@pytest.mark.parametrize("seed", range(5))
def test_no_package_is_on_both_sides_of_a_split(pairs, seed):
    train, heldout = split_by_module(pairs, 0.1, seed)
    assert len(train) + len(heldout) == len(pairs)
    assert not {package(p.module) for p in train} & {package(p.module) for p in heldout}
    assert 0.05 * len(pairs) < len(heldout) <= 0.1 * len(pairs)
    assert split_by_module(pairs, 0.1, seed) == (train, heldout)
    assert split_by_module(pairs, 0.1, seed + 1)[1] != heldout


def test_the_corpus_can_leave_out_what_is_held_out(pairs):
    _, heldout = split_by_module(pairs, 0.1, seed=0)
    names = {pair.module for pair in heldout}

    def share_found(documents):
        text = " ".join(" ".join(document.text.split()) for document in documents).lower()
        return sum(pair.answer[:-1].lower() in text for pair in heldout) / len(heldout)

    without = list(stdlib_documents(exclude_modules=names))
    assert not {package(d.module) for d in without} & {package(name) for name in names}
    assert share_found(without) < 0.02  # stock phrases that other modules share
    assert share_found(stdlib_documents()) > 0.9  # so the probe does find them


@pytest.mark.parametrize(
    ("doc", "answer"),
    [
        ("Return the sum of a and b.  Never fails.", "Return the sum of a and b."),
        (
            "Split a path, e.g. into\n    two parts. Then stop.",
            "Split a path, e.g. into two parts.",
        ),
        ("return a list of all names", "Return a list of all names."),
        ("Close it.", None),  # too short
        ("name(a, b) -> a long enough thing.", None),  # a signature
        ("Accepts the following options:", None),
        ("Return a naïve and long enough thing.", None),
        ("word " * 40, None),
    ],
)
def test_the_first_sentence_of_a_docstring(doc, answer):
    assert first_sentence(doc) == answer


def test_a_python_without_sources_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setattr(stdlib, "_root", lambda: tmp_path)
    stdlib._modules.cache_clear()
    try:
        with pytest.raises(DataError, match=r"no readable Python sources under .*pass your own"):
            stdlib_pairs()
    finally:
        stdlib._modules.cache_clear()


def test_a_split_needs_two_packages():
    with pytest.raises(DataError, match="1 package"):
        split_by_module([Pair("q", "a", "json"), Pair("q", "a", "json.decoder")], 0.5)
    with pytest.raises(DataError, match="between 0 and 1"):
        split_by_module([], 1.0)
