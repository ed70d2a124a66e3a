"""One training document: its tokens, and which of them are trained on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ardor.errors import TextError
from ardor.text.padding import IGNORED, Padded, Side, filled
from ardor.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Example:
    """Tokens in order; `supervised[i]` says that token i is a target. Nothing is shifted here.

    Raises: TextError if the two differ in length.
    """

    tokens: tuple[int, ...]
    supervised: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.supervised):
            raise TextError(
                f"an example has {len(self.tokens)} tokens but {len(self.supervised)} supervised "
                "flags; give one flag for each token"
            )

    @property
    def targets(self) -> int:
        """How many tokens count in the loss: the first of a document never does."""
        return sum(self.supervised[1:])

    def then(self, tokens: list[int], *, supervised: bool) -> "Example":
        """This example with `tokens` after it."""
        flags = (supervised,) * len(tokens)
        return Example((*self.tokens, *tokens), self.supervised + flags)


EMPTY = Example((), ())


def document(tokenizer: Tokenizer, text: str, *, stop_id: int | None = None) -> Example:
    """Plain text, all of it trained on, ended by `stop_id` (default: the tokenizer's EOS).

    Begins as the tokenizer begins a text (BOS or nothing). A control token that the text spells
    stays text.

    Raises: TextError if there is no token to end it with.
    """
    content = tokenizer.encode_content(text, place="start")
    tokens = [*tokenizer.prefix, *content, _stop(tokenizer, stop_id)]
    return EMPTY.then(tokens, supervised=True)


def completion(
    tokenizer: Tokenizer, prompt: str, completion: str, *, stop_id: int | None = None
) -> Example:
    """A prompt as generation would be given it, then the completion and `stop_id`, trained on.

    The two are encoded apart and their ids joined, so the boundary is where it is at inference:
    a space between them belongs to the completion.

    Raises: TextError if there is no token to end it with.
    """
    answer = tokenizer.encode_content(completion, tags=True)
    return EMPTY.then(tokenizer.encode(prompt), supervised=False).then(
        [*answer, _stop(tokenizer, stop_id)], supervised=True
    )


def pad_examples(
    tokenizer: Tokenizer, examples: Sequence[Example], side: Side = "right", *, multiple_of: int = 1
) -> Padded:
    """Training examples as a rectangle for other tools, with the labels of what is trained on.

    A trained token is a label whatever its id is, be it the one that pads, too.

    Raises: TextError as `padding.pad`.
    """
    found = tokenizer.pad([row.tokens for row in examples], side, multiple_of=multiple_of)
    labels = [
        [id if trained else IGNORED for id, trained in zip(row.tokens, row.supervised, strict=True)]
        for row in examples
    ]
    length = len(found.input_ids[0])
    return found._replace(labels=[filled(row, IGNORED, length, side) for row in labels])


def segments(tokenizer: Tokenizer, parts: Iterable[tuple[str, bool]]) -> Example:
    """Runs of text as (text, whether it is trained on), encoded apart and joined.

    Begins as the tokenizer begins a text; control tokens count; nothing is put at the end, so a
    stop token is learnt only where a text spells it.
    """
    example = EMPTY
    for text, supervised in parts:
        if not example.tokens:
            ids = tokenizer.encode(text)
        else:
            ids, place = [], "middle"
            for part in tokenizer.split(text):
                if isinstance(part, int):
                    ids.append(part)
                    place = "segment"
                else:
                    ids += tokenizer.encode_content(part, place=place)
                    place = "middle"
        example = example.then(ids, supervised=supervised)
    return example


def _stop(tokenizer: Tokenizer, stop_id: int | None) -> int:
    stop = tokenizer.special.eos if stop_id is None else stop_id
    if stop is None:
        raise TextError(
            "this tokenizer has no EOS token, so a model could not learn where to stop; "
            "set eos_token in tokenizer_config.json, or give a stop token"
        )
    return stop
