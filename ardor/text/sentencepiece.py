"""SentencePiece's tokenizer.model as a tokenizers.Tokenizer that encodes to the same ids.

The file is a protocol buffer, of which four messages are needed; they are read here, so that
neither the sentencepiece package nor protobuf has to be installed.

Source: google/sentencepiece, src/sentencepiece_model.proto; how its settings become steps of a
Tokenizer is as in transformers 5.24, convert_slow_tokenizer.py, SpmConverter.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from ardor.errors import TextError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2
_KINDS = {3: "word", 4: "char"}


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Model:
    """What a tokenizer.model says; defaults are those of its schema."""

    pieces: tuple[Piece, ...]
    kind: int  # of segmentation
    byte_fallback: bool
    unk_id: int
    bos_id: int
    eos_id: int
    pad_id: int
    charsmap: bytes  # how characters are normalised
    dummy_prefix: bool
    removes_spaces: bool
    escapes_spaces: bool


def read_model(path: Path) -> Model:
    """Raises: TextError as `parse_model`."""
    return parse_model(path.read_bytes(), str(path))


def parse_model(data: bytes, path: str = "tokenizer.model") -> Model:
    """Raises: TextError if `data` is not a SentencePiece model, is cut off, or has a kind of
    segmentation other than BPE and unigram."""
    try:
        listed = [*_fields(data)]
        pieces = tuple(_piece(value) for number, value in listed if number == 1)
        fields = dict(listed)
        trainer, normal = (dict(_fields(fields.get(number, b""))) for number in (2, 3))
        kind, byte_fallback = trainer.get(3, UNIGRAM), bool(trainer.get(35, 0))
    except (IndexError, ValueError, struct.error, TypeError) as error:
        raise TextError(
            f"{path} is no SentencePiece model, or is cut off ({error}); fetch the file again"
        ) from error
    if not pieces:
        raise TextError(f"{path} is no SentencePiece model: it holds no pieces; fetch it again")
    if kind not in (UNIGRAM, BPE):
        raise TextError(
            f"{path} is a SentencePiece model of kind {_KINDS.get(kind, kind)!r}, not bpe or "
            "unigram; no causal language model has one"
        )
    unk, bos, eos, pad = (_signed(trainer.get(40 + i, i if i < 3 else -1)) for i in range(4))
    prefix, removes, escapes = (bool(normal.get(number, 1)) for number in (3, 4, 5))
    charsmap = normal.get(2, b"")
    return Model(
        pieces, kind, byte_fallback, unk, bos, eos, pad, charsmap, prefix, removes, escapes
    )


def convert(path: Path, config: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a tokenizer.model; `config` is the tokenizer_config.json beside it.

    Encodes as SentencePiece does, between control tokens too: `legacy` false in `config` puts the
    dummy space at the start of a text only, and `add_bos_token`, `add_eos_token` decide what is put
    around it (BOS alone where they are silent).

    Raises: TextError for a file that cannot be read.
    """
    model = read_model(path)
    names = [piece.text for piece in model.pieces]
    backend = Tokenizer(_unigram(model) if model.kind == UNIGRAM else _bpe(model))
    first = config.get("legacy") is False
    prefix = model.dummy_prefix and config.get("add_prefix_space") is not False
    backend.normalizer = _normalizer(model, every=prefix and not first)
    backend.pre_tokenizer = _pre_tokenizer(model, prefix, "first" if first else "always")
    backend.decoder = _decoder(model, prefix)
    backend.add_tokens(
        [
            AddedToken(piece.text, normalized=False, special=piece.kind != USER_DEFINED)
            for piece in model.pieces
            if piece.kind in (CONTROL, UNKNOWN, USER_DEFINED)
        ]
    )
    around = [
        (names[id], id) if known and config.get(f"add_{name}_token", default) else None
        for name, id, default in (("bos", model.bos_id, True), ("eos", model.eos_id, False))
        for known in [0 <= id < len(names)]
    ]
    begin, end = around
    if begin or end:
        parts = [begin and begin[0], "$A", end and end[0]]
        single = " ".join(part for part in parts if part)
        backend.post_processor = processors.TemplateProcessing(
            single, None, [pair for pair in around if pair]
        )
    return backend


def names_of(path: Path) -> dict[str, str]:
    """The special tokens that the file itself names."""
    model = read_model(path)
    ids = {"bos": model.bos_id, "eos": model.eos_id, "unk": model.unk_id, "pad": model.pad_id}
    return {
        f"{kind}_token": model.pieces[id].text
        for kind, id in ids.items()
        if 0 <= id < len(model.pieces)
    }


def _unigram(model: Model) -> models.Model:
    vocab = [(piece.text, piece.score) for piece in model.pieces]
    return models.Unigram(vocab, unk_id=model.unk_id, byte_fallback=model.byte_fallback)


def _bpe(model: Model) -> models.Model:
    """Merges are not in the file: any two pieces that make a third may merge, best score first."""
    normal = {p.text: (p.score, id) for id, p in enumerate(model.pieces) if p.kind == NORMAL}
    ranked = sorted(
        (-score, id, text[:at], text[at:])
        for text, (score, id) in normal.items()
        for at in range(1, len(text))
        if text[:at] in normal and text[at:] in normal
    )
    return models.BPE(
        vocab={piece.text: id for id, piece in enumerate(model.pieces)},
        merges=[(left, right) for _, _, left, right in ranked],
        unk_token=model.pieces[model.unk_id].text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        ignore_merges=any(piece.kind == USER_DEFINED for piece in model.pieces),
    )


def _normalizer(model: Model, *, every: bool) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.removes_spaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if model.escapes_spaces:
        steps.append(normalizers.Replace(" ", "▁"))
    if every:
        # Metaspace puts nothing before what begins with "▁" already, SentencePiece does.
        steps.append(normalizers.Replace(Regex(r"\A▁"), "▁▁"))
    return normalizers.Sequence(steps)


def _pre_tokenizer(model: Model, prefix: bool, scheme: str) -> Any:
    steps: list[pre_tokenizers.PreTokenizer] = []
    if prefix:
        steps.append(pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False))
    own = [piece.text for piece in model.pieces if piece.kind == USER_DEFINED]
    if own:
        longest = sorted(own, key=len, reverse=True)
        steps.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, longest))), "isolated"))
    return pre_tokenizers.Sequence(steps) if steps else None


def _decoder(model: Model, prefix: bool) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " ")]
    if model.byte_fallback:
        steps.append(decoders.ByteFallback())
    if prefix:
        # Strip works on each token; joined, only the start of the text is stripped.
        steps += [decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    elif model.byte_fallback:
        steps.append(decoders.Fuse())
    return decoders.Sequence(steps)


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return Piece(fields.get(1, b"").decode(), score, fields.get(3, NORMAL))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message: an int, or the bytes of anything longer.

    Source: protobuf.dev, "Encoding".
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        match key & 7:
            case 0:
                value, at = _varint(data, at)
                yield key >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, at = _varint(data, at)
            case 5:
                size = 4
            case kind:
                raise ValueError(f"wire type {kind} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"it ends within a field at byte {at}")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError(f"a number that is too long at byte {at}")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
