"""Tokenizers of checkpoints without a tokenizer.json: SentencePiece's file, or vocab and merges."""

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ardor.errors import TextError
from ardor.files.json import read_object, read_text
from ardor.text import sentencepiece
from ardor.text.special import read_config, read_names

PIECES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
VOCAB, MERGES = "vocab.json", "merges.txt"

# Source: Qwen's tokenization_qwen2.py, in transformers 5.24.
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_LEVEL = ("", "PreTrainedTokenizer", "GPT2Tokenizer", "CodeGenTokenizer", "Qwen2Tokenizer")


def has_tokenizer(directory: Path) -> bool:
    """Are there files that a tokenizer can be read from?"""
    files = ("tokenizer.json", *PIECES)
    both = all((directory / name).is_file() for name in (VOCAB, MERGES))
    return both or any((directory / name).is_file() for name in files)


def read_legacy(directory: Path) -> tuple[Tokenizer, dict[str, str]] | None:
    """The tokenizer and the names of its special tokens; None if no file holds one.

    Raises: TextError for files that cannot be read, or of a tokenizer that is not implemented.
    """
    config, names = read_config(directory), read_names(directory)
    for name in PIECES:
        if (path := directory / name).is_file():
            return sentencepiece.convert(path, config), sentencepiece.names_of(path) | names
    if all((directory / name).is_file() for name in (VOCAB, MERGES)):
        return _byte_level(directory, config, names), names
    return None


def _byte_level(directory: Path, config: dict[str, Any], names: dict[str, str]) -> Tokenizer:
    """vocab.json and merges.txt, as GPT-2 and Qwen 2 have them."""
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if kind not in _BYTE_LEVEL:
        raise TextError(
            f"{directory} holds {VOCAB} and {MERGES} of a {kind}, of which only transformers knows "
            f"how it cuts text; convert with AutoTokenizer.from_pretrained({str(directory)!r})"
            f".save_pretrained({str(directory)!r})"
        )
    vocab = read_object(directory / VOCAB)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=_merges(directory / MERGES, vocab)))
    space = bool(config.get("add_prefix_space"))
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=space)
    if kind == "Qwen2Tokenizer":
        backend.normalizer = normalizers.NFC()
        last = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False)
        pieces = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_QWEN), "isolated"), last])
    backend.pre_tokenizer = pieces
    backend.decoder = decoders.ByteLevel()
    bos = names.get("bos_token")
    if config.get("add_bos_token") and bos is not None:
        if bos not in vocab:
            raise TextError(f"{directory}: bos_token is {bos!r}, which {VOCAB} lacks; add it there")
        backend.post_processor = processors.TemplateProcessing(
            f"{bos} $A", None, [(bos, vocab[bos])]
        )
    return backend


def _merges(path: Path, vocab: dict[str, Any]) -> list[tuple[str, str]]:
    """Raises: TextError naming the line that is no pair of entries of the vocabulary."""
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise TextError(
                f"{path}, line {number}: {line!r} is no pair of entries of {VOCAB} whose join is "
                "one too; take both files from the same checkpoint"
            )
        found.append((pair[0], pair[1]))
    return found
