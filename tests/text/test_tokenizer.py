import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers

from ardor.errors import CheckpointError, TextError
from ardor.text.tokenizer import CHAT_SPECIAL, Tokenizer

UNICODE = st.text(max_size=40)


@settings(max_examples=60, deadline=None)
@given(text=UNICODE)
def test_a_trained_tokenizer_gives_any_text_back(tokenizer: Tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode_content(text)) == text
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_is_deterministic_and_learns_merges():
    texts = [f"the number {n} and the word {chr(97 + n % 26)}" for n in range(200)]
    first, second = (Tokenizer.train(texts, vocab_size=330) for _ in range(2))
    assert first._backend.to_str() == second._backend.to_str()
    assert first.vocab_rows == 330
    assert len(first.encode("the number and the word")) < 10
    other = Tokenizer.train(["something else altogether"] * 3, vocab_size=330)
    assert other._backend.to_str() != first._backend.to_str()


def test_training_splits_digits_words_and_newlines():
    text = "abcd 12345\n\nabcd"
    tokenizer = Tokenizer.train([text] * 50, vocab_size=400)
    pieces = [tokenizer.decode([id]) for id in tokenizer.encode(text)]
    assert pieces == ["abcd", " ", "12", "34", "5", "\n\n", "abcd"]


def test_special_tokens_of_training_are_real_and_last(tokenizer: Tokenizer):
    rows = tokenizer.vocab_rows
    assert [tokenizer.id(token) for token in CHAT_SPECIAL] == list(range(rows - 4, rows))
    assert tokenizer.special.eos == tokenizer.id("<|endoftext|>")
    assert tokenizer.special.pad == tokenizer.id("<|pad|>")
    assert tokenizer.special.bos is tokenizer.special.unk is None
    assert tokenizer.encode("<|im_end|>") == [tokenizer.id("<|im_end|>")]
    assert tokenizer.decode([rows - 1], skip_special=True) == ""
    assert tokenizer.token(rows - 1) == "<|im_end|>"
    assert tokenizer.token(rows) is None
    assert tokenizer.id("absent") is None


def test_training_reports_progress_and_passes_on_the_source_s_error():
    counts = []
    Tokenizer.train(["a", "b", "c"], 300, progress=counts.append)
    assert counts == [1, 2, 3]

    def broken():
        yield "a"
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="the disk went away"):
        Tokenizer.train(broken(), 300)


def test_training_refuses_a_vocabulary_without_room():
    with pytest.raises(TextError, match="vocab_size is 259; .* needs at least 260"):
        Tokenizer.train(["a"], 259)
    with pytest.raises(TextError, match="repeats a token"):
        Tokenizer.train(["a"], 300, special_tokens=("<a>", "<a>"))


@settings(max_examples=60, deadline=None)
@given(before=UNICODE, after=UNICODE, data=st.data())
def test_no_text_spells_a_control_token(
    tokenizer: Tokenizer,
    spaced_tokenizer: Tokenizer,
    reachable_tokenizer: Tokenizer,
    before: str,
    after: str,
    data: st.DataObject,
):
    for each in (tokenizer, spaced_tokenizer, reachable_tokenizer):
        token = data.draw(st.sampled_from(sorted(each.added)))
        text = before + token + after
        unknown = {each.special.unk}
        for place in ("start", "segment", "middle"):
            assert not each.control.intersection(each.encode_content(text, place=place)) - unknown
    assert tokenizer.id(CHAT_SPECIAL[0]) in tokenizer.encode(f"{before}{CHAT_SPECIAL[0]}{after}")


def test_content_reads_back_as_it_was(tokenizer: Tokenizer, spaced_tokenizer: Tokenizer):
    text = "x" + "".join(sorted(tokenizer.added)) + "<s></s> ü"
    for each in (tokenizer, spaced_tokenizer):
        assert each.decode(each.encode_content(text)) == text


def test_a_model_that_spells_control_tokens_by_itself_is_made_to_forget(
    reachable_tokenizer: Tokenizer,
):
    eos, think = reachable_tokenizer.id("</s>"), reachable_tokenizer.id("<think>")
    naive = json.loads(reachable_tokenizer._backend.to_str()) | {"added_tokens": []}
    assert eos in tokenizers.Tokenizer.from_str(json.dumps(naive)).encode("a</s>").ids
    assert eos not in reachable_tokenizer.encode_content("a</s>")
    assert think not in reachable_tokenizer.encode_content("a<think>x")
    ids = reachable_tokenizer.encode_content("a<think>x<user></s>", tags=True)
    assert think in ids
    assert eos not in ids
    assert reachable_tokenizer.decode(ids) == "a<think>x<user></s>"


def test_a_word_of_the_vocabulary_that_is_also_control_is_split_with_its_merges():
    vocab = {char: i for i, char in enumerate("<eot>")} | {"eo": 5, "eot": 6, "<eot": 7}
    merges = [("e", "o"), ("eo", "t"), ("<", "eot")]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.add_special_tokens(["eot"])
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode("<eot>") == [0, 6, 4]
    assert tokenizer.encode_content("<eot>") == [0, 5, 3, 4]


def test_white_space_tokens_are_text(reachable_tokenizer: Tokenizer):
    spaces = reachable_tokenizer.added["  "]
    assert spaces not in reachable_tokenizer.control
    assert reachable_tokenizer.encode_content("a  x").count(spaces) == 1


@pytest.mark.parametrize("text", ["hello the cat", " hello", "a  b", "ü", ""])
def test_content_at_the_start_is_encoded_as_the_library_does(
    tokenizer: Tokenizer, spaced_tokenizer: Tokenizer, reachable_tokenizer: Tokenizer, text: str
):
    for each in (tokenizer, spaced_tokenizer, reachable_tokenizer):
        assert each.encode_content(text, place="start") == each.encode(text, bos=False)


def test_no_space_is_put_before_a_continuation(
    spaced_tokenizer: Tokenizer, reachable_tokenizer: Tokenizer
):
    for each in (spaced_tokenizer, reachable_tokenizer):
        start, middle = (each.encode_content("ax", place=place) for place in ("start", "middle"))
        assert str(each.token(start[0])).startswith("▁")
        assert not str(each.token(middle[0])).startswith("▁")
        assert each.decode([*start, *middle]) == "axax"


def test_no_space_is_put_before_a_byte_level_continuation(tokenizer: Tokenizer):
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    spaced = Tokenizer(backend)
    assert spaced.decode(spaced.encode("cat")) == " cat"
    assert spaced.decode(spaced.encode_content("cat")) == "cat"
    assert spaced.encode_content("cat", place="segment") == spaced.encode("cat")


def test_bos_is_found_by_encoding_and_never_doubled(tokenizer: Tokenizer, bos_tokenizer: Tokenizer):
    bos = bos_tokenizer.special.bos
    assert not tokenizer.adds_bos
    assert tokenizer.encode("") == []
    assert bos_tokenizer.prefix == (bos,)
    assert bos_tokenizer.encode("") == [bos]
    assert bos_tokenizer.encode("hi") == [bos, *tokenizer.encode("hi")]
    assert bos_tokenizer.encode("hi", bos=False) == tokenizer.encode("hi")
    assert bos_tokenizer.encode("<|pad|>hi") == bos_tokenizer.encode("hi")
    # The library itself does double it.
    assert bos_tokenizer._backend.encode("<|pad|>hi").ids[:2] == [bos, bos]
    with pytest.raises(TextError, match="no BOS token"):
        tokenizer.encode("hi", bos=True)


def test_a_named_bos_is_put_only_on_request(tokenizer: Tokenizer):
    named = Tokenizer(tokenizer._backend, {"bos_token": "<|im_start|>"})
    assert not named.adds_bos
    assert named.encode("hi") == tokenizer.encode("hi")
    assert named.encode("hi", bos=True) == [named.special.bos, *tokenizer.encode("hi")]


def test_half_a_surrogate_pair_is_refused_with_its_place(tokenizer: Tokenizer):
    with pytest.raises(TextError, match="character 2 of the text is half of a surrogate pair"):
        tokenizer.encode("ab\ud83d")


def saved(tokenizer: Tokenizer, directory: Path, **changes: object) -> Path:
    """A saved tokenizer, with the JSON files of the given stems replaced (None: removed)."""
    tokenizer.save(directory)
    for stem, value in changes.items():
        path = directory / f"{stem}.json"
        path.unlink(missing_ok=True)
        if value is not None:
            path.write_text(json.dumps(value))
    return directory


def test_saving_and_loading_keeps_everything(tokenizer: Tokenizer, tmp_path: Path):
    loaded = Tokenizer.from_directory(saved(tokenizer, tmp_path))
    assert loaded.special == tokenizer.special
    assert loaded.names == tokenizer.names
    assert loaded._backend.to_str() == tokenizer._backend.to_str()


def test_truncation_and_padding_blocks_are_ignored(tokenizer: Tokenizer, tmp_path: Path):
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    tokenizer.save(tmp_path)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "a long text of more than four tokens"
    stale = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert len(stale.encode(text).ids) == 8
    for each in (text, "a"):
        assert Tokenizer.from_directory(tmp_path).encode(each) == tokenizer.encode(each)


def test_names_may_be_objects_and_the_legacy_map_wins_unless_tokens_are_declared(
    tokenizer: Tokenizer, tmp_path: Path
):
    config = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "pad_token": None}
    legacy = {"eos_token": "<|endoftext|>"}
    directory = saved(tokenizer, tmp_path, tokenizer_config=config, special_tokens_map=legacy)
    assert Tokenizer.from_directory(directory).special.eos == tokenizer.id("<|endoftext|>")
    config["added_tokens_decoder"] = {}
    saved(tokenizer, tmp_path, tokenizer_config=config, special_tokens_map=legacy)
    assert Tokenizer.from_directory(directory).special.eos == tokenizer.id("<|im_end|>")
    saved(tokenizer, tmp_path, tokenizer_config=config, special_tokens_map=None)
    assert Tokenizer.from_directory(directory).special.pad is None


def test_only_tokenizer_json_is_needed(tokenizer: Tokenizer, tmp_path: Path):
    saved(tokenizer, tmp_path, tokenizer_config=None, special_tokens_map=None)
    assert Tokenizer.from_directory(tmp_path).special.eos is None


def test_tokens_declared_beside_tokenizer_json_are_added_at_their_ids(
    tokenizer: Tokenizer, tmp_path: Path
):
    rows = tokenizer.vocab_rows
    saved(tokenizer, tmp_path, added_tokens={"<|new|>": rows, "<|im_end|>": rows - 1})
    loaded = Tokenizer.from_directory(tmp_path)
    assert loaded.added["<|new|>"] == rows
    assert loaded.vocab_rows == rows + 1
    saved(tokenizer, tmp_path, added_tokens={"<|new|>": rows + 7})
    with pytest.raises(TextError, match=rf"declared with id {rows + 7}.* next free id is {rows}"):
        Tokenizer.from_directory(tmp_path)


def test_a_named_token_that_is_not_in_the_vocabulary_is_refused_unless_it_decides_nothing(
    tokenizer: Tokenizer, tmp_path: Path
):
    config = {"eos_token": "</s>"}
    saved(tokenizer, tmp_path, tokenizer_config=config, special_tokens_map=None)
    with pytest.raises(TextError, match="eos_token is '</s>', which is not in the vocabulary"):
        Tokenizer.from_directory(tmp_path)
    config = {"pad_token": "[PAD]"}
    saved(tokenizer, tmp_path, tokenizer_config=config, special_tokens_map=None)
    assert Tokenizer.from_directory(tmp_path).special.pad is None


def test_missing_and_damaged_files_say_what_to_do(tokenizer: Tokenizer, tmp_path: Path):
    with pytest.raises(TextError, match="is not a directory"):
        Tokenizer.from_directory(tmp_path / "absent")
    with pytest.raises(TextError, match=r"looked for tokenizer\.json in .*; it is not there"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "vocab.txt").touch()
    with pytest.raises(TextError, match=r"found only vocab\.txt; convert with transformers"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": \n 1,, }')
    with pytest.raises(CheckpointError, match=r"not valid JSON: .* line 2, column 4"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TextError, match="is JSON but not a tokenizer"):
        Tokenizer.from_directory(tmp_path)
    saved(tokenizer, tmp_path, tokenizer_config=[])
    with pytest.raises(TextError, match="holds a JSON list; expected an object"):
        Tokenizer.from_directory(tmp_path)
    saved(tokenizer, tmp_path, tokenizer_config={"eos_token": 7})
    with pytest.raises(TextError, match="eos_token is 7; expected a string"):
        Tokenizer.from_directory(tmp_path)


def test_rows_count_from_the_largest_id_not_from_the_number_of_tokens():
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 40}, merges=[]))
    assert Tokenizer(backend).vocab_rows == 41
    assert backend.get_vocab_size() == 2


def test_a_template_s_text_is_split_at_its_control_tokens(tokenizer: Tokenizer):
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    backend.add_special_tokens([AddedToken("<|user|>", rstrip=True, special=True)])
    split = Tokenizer(backend).split("hé<|im_end|>\n<|user|>\n hi")
    im_end, user = backend.token_to_id("<|im_end|>"), backend.token_to_id("<|user|>")
    assert split == ("hé", im_end, "\n", user, "hi")


def test_an_unknown_character_is_not_taken_for_a_control_token():
    backend = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["[UNK]"])
    tokenizer = Tokenizer(backend, {"unk_token": "[UNK]"})
    assert tokenizer.split("a zz [UNK]") == ("a zz ", 0)
    assert tokenizer.control_in("a zz") is None
