"""Tokenizers without a tokenizer.json give the ids that those who made them give."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer, GPT2Tokenizer, Qwen2Tokenizer

from ardor.errors import CheckpointError, TextError
from ardor.text.legacy import has_tokenizer
from ardor.text.stream import StreamDecoder
from ardor.text.tokenizer import Tokenizer

from .conftest import TEXTS

KINDS: dict[str, dict[str, Any]] = {
    "llama": {  # Llama 1 and 2, Mistral
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
    },
    "gemma": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "user_defined_symbols": ["<start_of_turn>", "<end_of_turn>"],
    },
    "t5": {"model_type": "unigram", "bos_id": -1},  # normalises, merges spaces, has no bytes
    "unigram bytes": {
        "model_type": "unigram",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Ours and sentencepiece's own, of one file."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3),
        model_writer=written,
        vocab_size=420 if KINDS[request.param].get("byte_fallback") else 120,
        hard_vocab_limit=False,
        minloglevel=3,
        **KINDS[request.param],
    )
    directory = tmp_path_factory.mktemp("spm")
    (directory / "tokenizer.model").write_bytes(written.getvalue())
    theirs = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    return Tokenizer.from_directory(directory), theirs, request.param


# Their own normaliser of charsmap kinds replaces what is not there; a "▁" that is typed is a space.
ANY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0▁"), max_size=30)


def encodes_alike(pair: Any, text: str) -> None:
    ours, theirs, _ = pair
    # Between control tokens of its own, sentencepiece has no such thing: both see plain text.
    assert ours.encode_template(text) == theirs.encode(text), text


@pytest.mark.parametrize(
    "text",
    [*TEXTS[:6], "", " ", "  a  b ", "\n\nx", "1984", "naïve 你好 🙂", "ﬁ ½ ①", "a\tb", "é́"],
)
def test_ids_are_sentencepiece_ids(pair: Any, text: str):
    encodes_alike(pair, text)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ANY)
def test_ids_of_any_text_are_sentencepiece_ids(pair: Any, text: str):
    encodes_alike(pair, text)


@settings(max_examples=100, deadline=None)
@given(ANY)
def test_text_that_is_not_normalised_comes_back(pair: Any, text: str):
    ours, theirs, kind = pair
    if kind == "t5":
        return
    assert ours.decode(ours.encode(text, bos=False)) == text
    assert theirs.decode(theirs.encode(text)) == text


def test_special_tokens_are_those_of_the_file(pair: Any):
    ours, theirs, kind = pair
    special = ours.special
    held = {"bos": theirs.bos_id(), "eos": theirs.eos_id(), "unk": theirs.unk_id()}
    for name, id in held.items():
        assert getattr(special, name) == (id if id >= 0 else None)
    assert ours.prefix == ((theirs.bos_id(),) if theirs.bos_id() >= 0 else ())
    assert ours.vocab_rows == theirs.vocab_size()
    assert ours.reaches_unk == (kind == "t5")
    # A control token that is spelled in a content stays text.
    assert special.eos not in ours.encode_content("</s>", place="start")
    # Content goes on from what was before it: no space of SentencePiece is put in front.
    if kind != "t5":
        assert ours.decode(ours.encode("the") + ours.encode_content("cat")).endswith("thecat")


def test_what_is_saved_reads_the_same(pair: Any, tmp_path: Path):
    ours, _, _ = pair
    ours.save(tmp_path)
    again = Tokenizer.from_directory(tmp_path)
    for text in TEXTS[:4]:
        assert again.encode(text) == ours.encode(text)
    assert again.special == ours.special


def test_a_damaged_model_is_told_with_its_file(tmp_path: Path):
    path = tmp_path / "tokenizer.model"
    for data in (b"", b"\xff" * 40, b"not a model", b"\x0a\xff\x01abc"):
        path.write_bytes(data)
        with pytest.raises(TextError, match=r"tokenizer.model is no SentencePiece model"):
            Tokenizer.from_directory(tmp_path)
    assert has_tokenizer(tmp_path)


def byte_level(folder: Path, tokenizer: Tokenizer, kind: str, **config: Any) -> Path:
    tokenizer.save(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "special_tokens_map.json").unlink()
    vocab = model["vocab"] | {"<|endoftext|>": len(model["vocab"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    names = {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    names["bos_token"] = "<|endoftext|>"
    settings = {"tokenizer_class": kind, **names, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("theirs_class", [GPT2Tokenizer, Qwen2Tokenizer])
def test_vocab_and_merges_are_read_as_transformers_does(
    tokenizer: Tokenizer, tmp_path: Path, theirs_class: type
):
    folder = byte_level(tmp_path, tokenizer, theirs_class.__name__)
    theirs, ours = theirs_class.from_pretrained(folder), Tokenizer.from_directory(folder)

    @settings(max_examples=120, deadline=None)
    @given(st.one_of(ANY, st.sampled_from(TEXTS)))
    def alike(text: str) -> None:
        assert ours.encode(text) == theirs(text)["input_ids"]

    alike()
    assert ours.encode("a<|endoftext|>")[-1] == ours.special.eos == theirs.eos_token_id
    assert ours.special.eos not in ours.encode_content("a<|endoftext|>")
    assert ours.encode("I'LL e\u0301 1984") == theirs("I'LL e\u0301 1984")["input_ids"]


def test_merges_that_do_not_fit_are_told_with_their_line(tokenizer: Tokenizer, tmp_path: Path):
    folder = byte_level(tmp_path, tokenizer, "GPT2Tokenizer")
    lines = (folder / "merges.txt").read_text().split("\n")
    (folder / "merges.txt").write_text("\n".join([*lines[:4], "q zzzz", *lines[4:]]))
    with pytest.raises(TextError, match=r"merges.txt, line 5: 'q zzzz' is no pair"):
        Tokenizer.from_directory(folder)
    (folder / "vocab.json").write_text('{"a": 1,')
    with pytest.raises(CheckpointError, match="vocab.json"):
        Tokenizer.from_directory(folder)
    byte_level(folder, tokenizer, "RobertaTokenizer")
    with pytest.raises(TextError, match="of a RobertaTokenizer, of which only transformers knows"):
        Tokenizer.from_directory(folder)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 100_000), max_size=20))
def test_any_ids_stream_as_they_decode(pair: Any, numbers: list[int]):
    ours, _, _ = pair
    ids = [number % ours.vocab_rows for number in numbers]
    decoder = StreamDecoder(ours)
    given_out = "".join(map(decoder.push, ids)) + decoder.flush()
    assert given_out == ours.decode(ids)


def test_a_gigantic_text_is_encoded_in_time_that_grows_with_it(pair: Any):
    ours, theirs, _ = pair
    text = " ".join(TEXTS[:6]) * 1000
    assert len(text) > 150_000
    assert ours.encode_template(text) == theirs.encode(text)


def test_a_tokenizer_model_is_carried_along_with_the_names_of_added_tokens(
    pair: Any, tmp_path: Path
):
    """For tools that read nothing else, such as llama.cpp's converter for Llama and Gemma."""
    ours, _, _ = pair
    named = ours.naming(pad_token=ours.token(ours.special.eos) or "")
    grown = ours.adding(["<tool>", AddedToken("<|im_end|>", special=True, normalized=False)])
    for kept in (ours, ours.adding(["the"]), named, grown):  # "the" is a piece, or made of pieces
        folder = tmp_path / str(id(kept))
        kept.save(folder)
        again = Tokenizer.from_directory(folder)
        assert again.sentencepiece == ours.sentencepiece
        assert again.vocab_rows == kept.vocab_rows
        beside = folder / "added_tokens.json"
        added = json.loads(beside.read_text()) if beside.exists() else {}
        assert added == {kept.token(id): id for id in range(ours.vocab_rows, kept.vocab_rows)}
    assert len(added) == 2


def test_tokens_that_a_tokenizer_model_lacked_from_the_start_are_named_beside_it(
    pair: Any, tmp_path: Path
):
    """As Gemma 3 has its image token, and transformers' ids are ours."""
    ours, _, _ = pair
    ours.adding([AddedToken("<image>", special=True, normalized=False)]).save(tmp_path / "json")
    (tmp_path / "json" / "tokenizer.model").write_bytes(ours.sentencepiece)
    first = Tokenizer.from_directory(tmp_path / "json")
    first.save(tmp_path / "again")
    held = json.loads((tmp_path / "again" / "added_tokens.json").read_text())
    assert held == {"<image>": ours.vocab_rows}
    again = Tokenizer.from_directory(tmp_path / "again")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "again")
    for text in (*TEXTS[:3], "a<image>b"):
        assert again.encode(text) == first.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == first.encode_template(text)
    assert again.fingerprint == first.fingerprint


def test_a_file_of_that_name_in_another_format_stays_behind(pair: Any, tmp_path: Path):
    ours, _, _ = pair
    ours.save(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's
    Tokenizer.from_directory(tmp_path / "m").save(tmp_path / "n")
    assert not (tmp_path / "n" / "tokenizer.model").exists()
