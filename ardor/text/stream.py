"""Ids to text while they are being generated."""

import codecs
import re

from ardor.text.tokenizer import Tokenizer

# SentencePiece's way of writing a byte that no token covers.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class StreamDecoder:
    """Gives text as soon as it is certain; everything given, joined, is `decode` of all the ids.

    Half a character is held back until its other bytes come. Each id is looked at a bounded number
    of times, however long the text. With `skip_special`, special tokens give no text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._window = _Window(tokenizer)

    def push(self, id: int) -> str:
        """Take the next id; the text that has become certain, perhaps ""."""
        token = self._tokenizer.token(id)
        if token is None or (self._skip_special and self._tokenizer.is_special(id)):
            return ""
        if self._tokenizer.byte_level:
            return self._utf8.decode(_bytes(token))
        return self._window.push(id, token)

    def flush(self) -> str:
        """What is still held back; half a character becomes U+FFFD. Ready for a new text then."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"", final=True)
        return self._window.flush()


class _Window:
    """For decoders whose tokens do not spell bytes, such as SentencePiece's.

    Such a token alone does not say whether a space precedes it, so new ids are decoded together
    with those of the text given last.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._ids: list[int] = []  # those of the text given last, then those held back
        self._known = 0  # how many of them the given text covers
        self._given = ""  # the text of those

    def push(self, id: int, token: str) -> str:
        self._ids.append(id)
        if _BYTE.fullmatch(token):
            # One bad byte spoils the whole run of byte tokens, so a run waits until it is over.
            return ""
        text = self._decode(self._ids)
        new = text[len(self._given) :]
        if not new or new.endswith("\ufffd") or not text.startswith(self._given):
            return ""
        self._ids = self._ids[self._known :]
        self._known = len(self._ids)
        self._given = self._decode(self._ids)
        return new

    def flush(self) -> str:
        text = self._decode(self._ids)[len(self._given) :] if self._ids else ""
        self._ids, self._known, self._given = [], 0, ""
        return text


def _alphabet() -> dict[str, int]:
    """The characters that byte-level tokens are spelled in, and the bytes they stand for.

    Printable Latin-1 stands for itself; the other 68 bytes, in order, are U+0100 and up.
    Source: Radford et al. 2019 (GPT-2), the released encoder.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + i): byte for i, byte in enumerate(hidden)
    }


_ALPHABET = _alphabet()


def _bytes(token: str) -> bytes:
    try:
        return bytes(_ALPHABET[char] for char in token)
    except KeyError:  # an added token that is not spelled in the alphabet is its own text
        return token.encode()
