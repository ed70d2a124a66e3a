import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from ardor.text.stream import StreamDecoder
from ardor.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def odd_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """Byte-level, with added tokens that are and are not spelled in the byte alphabet."""
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    backend.add_tokens(["<é>", "你 好", "Ġ"])
    return Tokenizer(backend)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_given_joins_to_what_decoding_all_gives(
    tokenizer: Tokenizer,
    odd_tokenizer: Tokenizer,
    spaced_tokenizer: Tokenizer,
    reachable_tokenizer: Tokenizer,
    data: st.DataObject,
):
    for each in (tokenizer, odd_tokenizer, spaced_tokenizer, reachable_tokenizer):
        ids = data.draw(st.lists(st.integers(0, each.vocab_rows + 1), max_size=30))
        for skip_special in (False, True):
            stream = StreamDecoder(each, skip_special=skip_special)
            parts = [stream.push(id) for id in ids] + [stream.flush()]
            assert "".join(parts) == each.decode(ids, skip_special)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=20))
def test_half_a_character_is_never_given(
    tokenizer: Tokenizer, spaced_tokenizer: Tokenizer, text: str
):
    text = text.replace("\ufffd", "") + "🙂é"
    for each in (tokenizer, spaced_tokenizer):
        ids = each.encode_content(text)
        stream = StreamDecoder(each)
        parts = [stream.push(id) for id in ids]
        assert not any("\ufffd" in part for part in parts)
        assert "".join(parts) + stream.flush() == each.decode(ids)
        alone = [each.decode([id]) for id in ids]
        assert any("\ufffd" in part for part in alone)  # what decoding each alone would give


def test_spaces_survive_where_tokens_alone_do_not_show_them(spaced_tokenizer: Tokenizer):
    text = "the cat sat on the mat"
    ids = spaced_tokenizer.encode(text, bos=False)
    stream = StreamDecoder(spaced_tokenizer)
    assert "".join([*map(stream.push, ids), stream.flush()]) == text
    assert "".join(spaced_tokenizer.decode([id]) for id in ids) != text


def test_text_is_given_at_once_when_it_is_certain(
    tokenizer: Tokenizer, spaced_tokenizer: Tokenizer
):
    for each in (tokenizer, spaced_tokenizer):
        stream = StreamDecoder(each)
        for id in each.encode("the cat", bos=False):
            assert stream.push(id)
        assert stream.flush() == ""


def test_flush_gives_the_broken_rest_and_starts_anew(
    tokenizer: Tokenizer, spaced_tokenizer: Tokenizer
):
    for each in (tokenizer, spaced_tokenizer):
        half = each.encode_content("🙂")[:2]
        stream = StreamDecoder(each)
        assert [stream.push(id) for id in half] == ["", ""]
        assert stream.flush() == each.decode(half) != ""
        assert "".join(map(stream.push, each.encode("hi", bos=False))) == "hi"


@pytest.mark.parametrize("text", ["the cat ", "\ufffd", "🙂"])
def test_the_work_per_token_does_not_grow(
    spaced_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, text: str
):
    seen: list[int] = []
    decode = Tokenizer.decode

    def counting(self: Tokenizer, ids: list[int], skip_special: bool = False) -> str:
        seen.append(len(ids))
        return decode(self, ids, skip_special)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    ids = spaced_tokenizer.encode_content(text * 400)
    stream = StreamDecoder(spaced_tokenizer)
    for id in ids:
        stream.push(id)
    stream.flush()
    assert sum(seen) < 6 * len(ids) + 10
