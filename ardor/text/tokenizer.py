"""Text to token ids and back, around the tokenizers library and its tokenizer.json.

What decides is what tokenizer.json does, found by encoding, never the flags beside it. Text comes
in two kinds: template text, in which a control token counts, and content, in which it is only text.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, get_args

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from ardor.errors import TextError
from ardor.files.atomic import write_atomic
from ardor.files.json import parse_json, read_text, write_json
from ardor.text.legacy import read_legacy
from ardor.text.padding import Padded, Side, pad
from ardor.text.sentencepiece import parse_model
from ardor.text.special import (
    KINDS,
    Place,
    SpecialTokens,
    is_control,
    is_tag,
    read_added,
    read_config,
    read_extra,
    read_names,
    without_control,
)

SENTENCEPIECE = "tokenizer.model"
CHAT_SPECIAL = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")

# A word with the one mark before it (marks and letters together, for scripts that compose them),
# one or two digits, a run of signs, line ends with the white space before them, other white space.
# Source: forms of this kind are compared in Dagan et al. 2024, arXiv:2402.01035.
_PIECES = (
    r"'(?i:s|t|d|m|ll|re|ve)"
    r"|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """A tokenizer whose special tokens are known and which never truncates or pads.

    `names` are the special tokens' texts as in tokenizer_config.json: {"eos_token": "</s>", ...}.

    Raises: TextError if `names` gives a BOS or EOS that the vocabulary lacks (an unknown or padding
    token that it lacks is left out: neither decides anything here).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        names: dict[str, str] | None = None,
        max_length: int | None = None,
        sentencepiece: bytes | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._plain: dict[str, tokenizers.Tokenizer] = {}
        self._split: dict[str, tuple[int | str, ...]] = {}
        self.max_length = max_length
        # The tokenizer.model that it came with, for tools that read no other file.
        self.sentencepiece = sentencepiece
        ids = {name: backend.token_to_id(text) for name, text in (names or {}).items()}
        for name in ("bos_token", "eos_token"):
            if name in ids and ids[name] is None:
                raise TextError(
                    f"{name} is {(names or {})[name]!r}, which is not in the vocabulary; "
                    "add it to added_tokens in tokenizer.json, or correct tokenizer_config.json"
                )
        self.special = SpecialTokens(**{kind: ids.get(f"{kind}_token") for kind in KINDS})
        self.names = {name: text for name, text in (names or {}).items() if ids[name] is not None}
        added = backend.get_added_tokens_decoder()
        self.added = {token.content: id for id, token in added.items()}
        self.control = frozenset(id for id, token in added.items() if is_control(token))
        # Longest first: the library, too, takes the longest token that starts at a place.
        longest_first = sorted(added.values(), key=lambda token: -len(token.content))
        spaces = [re.escape(token.content) for token in longest_first if not is_control(token)]
        tags = [re.escape(token.content) for token in longest_first if is_tag(token)]
        self._spaces = re.compile("|".join(spaces)) if spaces else None
        self._tags = re.compile("|".join(tags + spaces)) if tags + spaces else None
        self._skipped = frozenset(id for id, token in added.items() if token.special)
        self.tags = frozenset(id for id, token in added.items() if is_tag(token))

    @classmethod
    def from_directory(cls, directory: str | Path) -> "Tokenizer":
        """The tokenizer of a checkpoint directory: tokenizer.json and the names beside it.

        Where there is none, it is made of tokenizer.model (SentencePiece) or vocab.json and
        merges.txt, to give the same ids.

        Raises: TextError if all of these are missing, or one cannot be understood, or if the files
        disagree; CheckpointError if a JSON file beside it is damaged.
        """
        directory = Path(directory)
        backend, names = _read(directory)
        _add_declared(backend, directory)
        _add_named(backend, names, read_extra(directory))
        length = read_config(directory).get("model_max_length")
        try:
            # transformers writes 1e30 for "no limit"
            known = int(length) if length is not None and 0 < length < 1e9 else None
            path = directory / SENTENCEPIECE
            return cls(backend, names, known, path.read_bytes() if path.is_file() else None)
        except TextError as error:
            raise TextError(f"{directory}: {error}") from error

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int = 4096,
        special_tokens: Sequence[str] = CHAT_SPECIAL,
        progress: Callable[[int], None] | None = None,
    ) -> "Tokenizer":
        """A byte-level BPE of at most `vocab_size` ids; the same texts give the same tokenizer.

        Any text survives encode and decode unchanged. The special tokens take the last ids; the
        first of them ends a document (EOS), `<|pad|>`, if there, is the padding token, and there is
        no BOS. `progress` is called with the number of texts read so far.

        Raises: TextError if `vocab_size` has no room for 256 bytes and the special tokens, or if
        a special token is given twice.
        Source: Sennrich et al. 2016, arXiv:1508.07909; bytes: Radford et al. 2019, section 2.2.
        """
        room = vocab_size - len(special_tokens)
        if room < 256:
            raise TextError(
                f"vocab_size is {vocab_size}; a byte-level tokenizer with {len(special_tokens)} "
                f"special tokens needs at least {256 + len(special_tokens)}"
            )
        if len(set(special_tokens)) != len(special_tokens):
            raise TextError(f"special_tokens repeats a token: {', '.join(special_tokens)}")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PIECES), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=room,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(_counted(texts, progress), trainer)
        backend.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in special_tokens]
        )
        names = {"eos_token": special_tokens[0]} if special_tokens else {}
        if "<|pad|>" in special_tokens:
            names["pad_token"] = "<|pad|>"
        return cls(backend, names)

    def adding(self, tokens: Iterable[str | AddedToken]) -> "Tokenizer":
        """This tokenizer with `tokens` at the next free ids; those it has already stay as they are.

        A string becomes a token that decoding shows, and that stands where it is spelled: a word in
        any text, a tag such as `<tool>` in prompts and in answers, other signs in templates only.

        Raises: TextError for an empty token, or if the next id is not a free one.
        """
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        taken = set(backend.get_vocab(with_added_tokens=True).values())
        for token in tokens:
            token = AddedToken(token, normalized=False) if isinstance(token, str) else token
            if not token.content.strip():
                raise TextError(f"cannot add the token {token.content!r}: it has no visible sign")
            if backend.token_to_id(token.content) is not None:
                continue
            backend.add_tokens([token])
            id = backend.token_to_id(token.content)
            if id is None or id in taken:
                raise TextError(
                    f"cannot add the token {token.content!r}: its id would be {id}, which "
                    f"{self.token(id or 0)!r} has; the vocabulary's ids have gaps, so add it to "
                    "added_tokens in tokenizer.json with a free id"
                )
            taken.add(id)
        return Tokenizer(backend, self.names, self.max_length, self.sentencepiece)

    def naming(self, **names: str) -> "Tokenizer":
        """This tokenizer with other tokens in its parts: naming(eos_token="<|im_end|>").

        Raises: TextError for a token that the vocabulary lacks.
        """
        for name, text in names.items():
            if self.id(text) is None:
                raise TextError(
                    f"{name}={text!r} is not in the vocabulary; add it first (add_tokens)"
                )
        named = {**self.names, **names}
        return Tokenizer(self._backend, named, self.max_length, self.sentencepiece)

    @property
    def content(self) -> dict[str, Any]:
        """What `save` writes as tokenizer.json, whatever files this was read from."""
        return json.loads(self._backend.to_str())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides what a text becomes."""
        text = self._backend.to_str() + json.dumps(self.names, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def vocab_rows(self) -> int:
        """The largest id plus one: how many rows an embedding needs at least."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def base_rows(self) -> int:
        """The same without added tokens, which stand for one text each: what any text may need."""
        return max(self._backend.get_vocab(with_added_tokens=False).values(), default=-1) + 1

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """What the post-processor puts before a text: usually nothing or BOS."""
        found = self._backend.encode("a")
        marked = zip(found.ids, found.special_tokens_mask, strict=True)
        return tuple(id for id, _ in takewhile(lambda pair: pair[1], marked))

    @cached_property
    def normalizes_control(self) -> bool:
        """Is a control token looked for in normalized text, where several spellings give it?"""
        tokens = self._backend.get_added_tokens_decoder()
        return self._backend.normalizer is not None and any(
            token.normalized for id, token in tokens.items() if id in self.control
        )

    @property
    def adds_bos(self) -> bool:
        """Does plain encoding put anything before a text?"""
        return bool(self.prefix)

    @cached_property
    def byte_level(self) -> bool:
        """Does every token spell out bytes, one character for each?"""
        return isinstance(self._backend.decoder, decoders.ByteLevel)

    def id(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it, or None."""
        return self._backend.token_to_id(token)

    def agrees(self, other: "Tokenizer") -> bool:
        """Do both give the tokens that both have the same ids, and one all of the other's?"""
        ours, theirs = (t._backend.get_vocab(with_added_tokens=True) for t in (self, other))
        shared = ours.keys() & theirs.keys()
        same = all(ours[token] == theirs[token] for token in shared)
        return same and len(shared) == min(len(ours), len(theirs))

    def token(self, id: int) -> str | None:
        """The token as the vocabulary writes it, or None for an id that has none."""
        return self._backend.id_to_token(id)

    def encode(self, text: str, *, bos: bool | None = None) -> list[int]:
        """Ids of a prompt; control tokens in it count.

        `bos` None puts before it what the tokenizer's own post-processor would; True also puts the
        BOS there if the post-processor has none; False puts nothing. A text that already begins so
        gets no second one, and nothing is ever put at the end, where generation goes on.

        Raises: TextError if `bos` is True and there is no BOS token.
        """
        ids = self.encode_template(text)
        if bos is False:
            return ids
        prefix = self.prefix
        if bos and not prefix:
            if self.special.bos is None:
                raise TextError("bos=True, but this tokenizer has no BOS token; leave bos out")
            prefix = (self.special.bos,)
        return ids if tuple(ids[: len(prefix)]) == prefix else [*prefix, *ids]

    def encode_template(self, text: str) -> list[int]:
        """Ids of text in which control tokens count, with nothing put around it."""
        return _encode(self._backend, text).ids

    def encode_content(
        self, text: str, *, tags: bool = False, place: Place = "middle"
    ) -> list[int]:
        """Ids of text in which a spelled-out control token stays plain text; no BOS.

        With `tags`, for what a model wrote, tokens such as `<think>` are tokens after all. At the
        default `place` the text goes on from what was before it, so no space is put in front.
        """
        plain = self._without_control(place)
        kept = self._tags if tags else self._spaces
        if kept is None:
            return _encode(plain, text).ids
        ids, done = [], 0
        for match in kept.finditer(text):
            if match.start() > done:
                ids += _encode(plain, text[done : match.start()]).ids
            ids.append(self.added[match[0]])
            plain, done = self._without_control("segment"), match.end()
        return ids + _encode(plain, text[done:]).ids if done < len(text) else ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        prefix, found = list(self.prefix), _encode_many(self._backend, texts)
        return [ids if ids[: len(prefix)] == prefix else prefix + ids for ids in found]

    def encode_contents(
        self, texts: Sequence[str], *, tags: bool = False, place: Place = "middle"
    ) -> list[list[int]]:
        """`encode_content` of each text, on all cores."""
        kept = self._tags if tags else self._spaces
        plain = self._without_control(place)
        if kept is None or not any(map(kept.search, texts)):
            return _encode_many(plain, texts)
        starts: list[str] = []  # of the texts, up to the first kept token
        others: list[str] = []  # what comes after one
        frames: list[list[int]] = []  # the kept tokens of each text
        for text in texts:
            at = [match.span() for match in kept.finditer(text)]
            ends = [*(start for start, _ in at), len(text)]
            pieces = [text[i:j] for i, j in zip((0, *(end for _, end in at)), ends, strict=True)]
            starts.append(pieces[0])
            others += pieces[1:]
            frames.append([self.added[text[i:j]] for i, j in at])
        first = iter(_encode_many(plain, starts))
        rest = iter(_encode_many(self._without_control("segment"), others))
        joined = []
        for frame in frames:
            ids = list(next(first))
            for token in frame:
                ids += [token, *next(rest)]
            joined.append(ids)
        return joined

    def split(self, text: str) -> tuple[int | str, ...]:
        """Template text as its control tokens (ids) and the plain text between them (strings).

        White space that a control token swallows (its `lstrip` and `rstrip`) is gone.
        """
        if (known := self._split.get(text)) is not None:
            return known
        parts: list[int | str] = []
        done = 0
        found = _encode(self._backend, text)
        for id, (start, end) in zip(found.ids, found.offsets, strict=True):
            if id not in self.control:
                continue
            # The id of the unknown token also stands for other text.
            if id == self.special.unk and text[start:end].strip() != self.names["unk_token"]:
                continue
            parts += [text[done:start], id] if start > done else [id]
            done = end
        result = (*parts, text[done:]) if done < len(text) else tuple(parts)
        if len(self._split) > 4096:  # templates repeat a few literals; this is only a bound
            self._split.clear()
        self._split[text] = result
        return result

    def control_in(self, text: str, *, tags: bool = False) -> str | None:
        """The first control token that `text` spells, if any; with `tags`, tags are allowed."""
        allowed = self.tags if tags else frozenset()
        ids = (part for part in self.split(text) if isinstance(part, int))
        return next((self.token(id) for id in ids if id not in allowed), None)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    @property
    def filler(self) -> int:
        """What fills up a padded row: the padding token, else EOS, else id 0; masks decide."""
        known = (self.special.pad, self.special.eos, 0)
        return next(id for id in known if id is not None)

    def pad(
        self, rows: Sequence[Sequence[int]], side: Side = "left", *, multiple_of: int = 1
    ) -> Padded:
        """Rows of ids as a rectangle with its mask and positions, for other tools.

        "left" is for generation, "right" for training; a model gives the same logits for either.

        Raises: TextError as `padding.pad`.
        """
        return pad(rows, self.filler, side, multiple_of)

    @cached_property
    def reaches_unk(self) -> bool:
        """Can a text become the unknown token? Not where bytes stand for what no token covers."""
        if self.special.unk is None:
            return False
        spec = self.content
        model = spec["model"]
        known = set(self._backend.get_vocab(with_added_tokens=False))
        if model.get("byte_fallback"):
            return not known.issuperset(f"<0x{byte:02X}>" for byte in range(256))
        steps = spec["pre_tokenizer"] or {}
        steps = steps.get("pretokenizers", [steps])
        spelled = any(step.get("type") == "ByteLevel" for step in steps)
        return not (spelled and known.issuperset(pre_tokenizers.ByteLevel.alphabet()))

    def is_special(self, id: int) -> bool:
        """Does decoding with `skip_special` leave this id out?"""
        return id in self._skipped

    def save(self, directory: str | Path, chat_template: str | None = None) -> None:
        """Write files that transformers 4 and 5 read to the same ids and the same special tokens.

        tokenizer.json, tokenizer_config.json and special_tokens_map.json; the chat template goes to
        chat_template.jinja and, for transformers 4, into tokenizer_config.json. The tokenizer.model
        that it came with is written too; what it lacks goes into added_tokens.json, where its
        readers look.

        Raises: CheckpointError if a file cannot be written.
        """
        directory = Path(directory)
        # This class takes tokenizer.json as it is; the model-named ones rebuild parts of it.
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.names}
        config["clean_up_tokenization_spaces"] = False
        if self.max_length is not None:
            config["model_max_length"] = self.max_length
        if chat_template is not None:
            config["chat_template"] = chat_template
            write_atomic(directory / "chat_template.jinja", chat_template)
        others = [
            token
            for token, id in self.added.items()
            if id in self._skipped and token not in self.names.values()
        ]
        legacy = self.names | ({"additional_special_tokens": others} if others else {})
        write_atomic(directory / "tokenizer.json", self._backend.to_str(pretty=True))
        write_json(directory / "special_tokens_map.json", legacy)
        if self.sentencepiece is not None and (beyond := self._beyond_pieces) is not None:
            write_atomic(directory / SENTENCEPIECE, self.sentencepiece)
            if beyond:
                write_json(directory / "added_tokens.json", beyond)
        write_json(directory / "tokenizer_config.json", config)

    @cached_property
    def _beyond_pieces(self) -> dict[str, int] | None:
        """Added tokens that tokenizer.model lacks; None if it is none of SentencePiece's."""
        try:
            pieces = {piece.text for piece in parse_model(self.sentencepiece or b"").pieces}
        except TextError:  # other formats have gone by this name, tiktoken's for one
            return None
        return {token: id for token, id in self.added.items() if token not in pieces}

    def _without_control(self, place: Place) -> tokenizers.Tokenizer:
        if not self._plain:
            whole = self.content
            built: dict[str, tokenizers.Tokenizer] = {}
            for name in get_args(Place):
                spec = without_control(whole, self.control, self.special.unk, name)
                # Most tokenizers never put a space in front: then one serves all three places.
                spacing = json.dumps([spec["normalizer"], spec["pre_tokenizer"]])
                if spacing not in built:
                    built[spacing] = tokenizers.Tokenizer.from_str(json.dumps(spec))
                self._plain[name] = built[spacing]
        return self._plain[place]


def _encode(backend: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    try:
        return backend.encode(text, add_special_tokens=False)
    except TypeError as error:  # what the library says when it cannot take a str
        at = next((i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff"), None)
        raise TextError(
            f"character {at} of the text is half of a surrogate pair ({text[at : at + 1]!r}); "
            "the text was cut or decoded wrongly; remove it or read the source as UTF-8"
            if at is not None
            else f"cannot encode the text: {error}"
        ) from error


def _read(directory: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    path = directory / "tokenizer.json"
    if not path.is_file():
        if (found := read_legacy(directory)) is None:
            raise TextError(_missing(directory))
        return found
    text = read_text(path)
    try:
        return tokenizers.Tokenizer.from_str(text), read_names(directory)
    except Exception as error:  # the library raises nothing more precise
        parse_json(text, path)
        raise TextError(
            f"{path} is JSON but not a tokenizer: {error}; "
            "fetch the file again, or update the tokenizers package"
        ) from error


def _encode_many(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    try:
        found = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    except TypeError:  # one of them is no text: tell which character
        return [_encode(backend, text).ids for text in texts]
    return [one.ids for one in found]


def _counted(texts: Iterable[str], progress: Callable[[int], None] | None) -> Iterator[str]:
    for count, text in enumerate(texts, 1):
        if progress is not None:
            progress(count)
        yield text


def _add_declared(backend: tokenizers.Tokenizer, directory: Path) -> None:
    """Add the tokens that only the files beside tokenizer.json declare, at the ids they declare."""
    for id, token in sorted(read_added(directory).items()):
        if backend.token_to_id(token.content) is not None:
            continue
        backend.add_tokens([token])
        if (got := backend.token_to_id(token.content)) != id:
            raise TextError(
                f"{directory}: the token {token.content!r} is declared with id {id}, but "
                f"tokenizer.json lacks it and the next free id is {got}; "
                "add it to added_tokens in tokenizer.json"
            )


def _add_named(
    backend: tokenizers.Tokenizer, names: Mapping[str, str], extra: Iterable[str]
) -> None:
    """Make tokens that have a part in the files control tokens, as transformers does."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for text in dict.fromkeys([*names.values(), *extra]):
        # A named token that the vocabulary lacks would get an id that no row was trained for.
        if text not in known and (text in extra or backend.token_to_id(text) is not None):
            backend.add_special_tokens([AddedToken(text, normalized=False, special=True)])


def _missing(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory} is not a directory; give the directory that holds tokenizer.json"
    others = ("vocab.json", "merges.txt", "vocab.txt")
    present = [name for name in others if (directory / name).is_file()]
    if not present:
        return (
            f"looked for tokenizer.json in {directory}; it is not there, nor any other tokenizer "
            "file; copy the tokenizer of the model's base checkpoint into the directory"
        )
    return (
        f"looked for tokenizer.json in {directory} and found only {', '.join(present)}; convert "
        f"with transformers: AutoTokenizer.from_pretrained({str(directory)!r})"
        f".save_pretrained({str(directory)!r})"
    )


def lacks_rows(tokenizer: Tokenizer, rows: int) -> str | None:
    """Why an embedding of so many rows is too small for a tokenizer; None if it is not.

    It must hold what any text can become and what begins or ends one. A further added token may
    lie beyond it, as the image token of Gemma 3's text models does: it is refused where it occurs.
    """
    remedy = (
        "take the tokenizer that belongs to these weights, or let transformers' "
        "resize_token_embeddings make room and save the model again"
    )
    if tokenizer.base_rows > rows:
        return (
            f"its vocabulary has {tokenizer.base_rows} ids, but the embedding only {rows} rows; "
            + remedy
        )
    special = {"BOS": tokenizer.special.bos, "EOS": tokenizer.special.eos}
    special |= {f"the start {id!r}": id for id in tokenizer.prefix}
    for name, id in special.items():
        if id is not None and id >= rows:
            return f"{name} is token {id}, but the embedding has only {rows} rows; {remedy}"
    return None
