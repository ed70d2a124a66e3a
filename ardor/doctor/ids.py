"""Questions about token ids that several rules ask."""

from collections.abc import Mapping, Sequence
from typing import Any

from ardor.errors import TextError
from ardor.text.chat import ChatTemplate
from ardor.text.tokenizer import Tokenizer

PROBE = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "x"})


def ids_of(value: Any) -> list[int]:
    """The ids in what a config file holds: a number, a list of them, or null."""
    found = value if isinstance(value, list) else [value]
    return [id for id in found if type(id) is int]


def rendered(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    prompts: bool,
) -> str:
    """What the template writes with the tokenizer's special tokens; `prompts`: for an answer.

    Raises: TextError if it refuses the messages.
    """
    names: dict[str, Any] = dict(tokenizer.names)
    return template.render(messages, prompts, **names)


def written_by_template(tokenizer: Tokenizer, template: ChatTemplate | None) -> frozenset[int]:
    """The control tokens that a template writes around a question and its answer."""
    if template is None:
        return frozenset()
    found: set[int] = set()
    for prompts in (False, True):
        try:
            text = rendered(template, tokenizer, PROBE[: 2 - prompts], prompts=prompts)
        except TextError:
            continue
        found |= {part for part in tokenizer.split(text) if isinstance(part, int)}
    return frozenset(found)
