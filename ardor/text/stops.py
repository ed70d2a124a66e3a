"""Where generation stops: every token and string that any of a model's files calls an end."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ardor.text.chat import ChatTemplate, terminator
from ardor.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class StopSet:
    """Token ids and strings that end a generation.

    `sources` says, for each id, which files or settings name it: where they disagree, the set is
    their union, since every one of them is right about what it was written for.
    """

    ids: frozenset[int]
    strings: tuple[str, ...] = ()
    sources: Mapping[int, tuple[str, ...]] = field(default_factory=dict, hash=False)

    @classmethod
    def gather(
        cls,
        tokenizer: Tokenizer,
        *,
        template: ChatTemplate | None = None,
        generation_config: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> "StopSet":
        """The union over the template's terminator, the tokenizer's EOS and both config files."""
        config, generation = config or {}, generation_config or {}
        named: list[tuple[str, Any]] = [
            ("the chat template's terminator", template and terminator(tokenizer, template)),
            ("the tokenizer's eos_token", tokenizer.special.eos),
            ("generation_config.json", generation.get("eos_token_id")),
            ("config.json", config.get("eos_token_id")),
            ("text_config of config.json", (config.get("text_config") or {}).get("eos_token_id")),
        ]
        sources: dict[int, tuple[str, ...]] = {}
        for source, value in named:
            for id in _ids(value):
                sources[id] = (*sources.get(id, ()), source)
        strings = generation.get("stop_strings") or ()
        strings = (strings,) if isinstance(strings, str) else tuple(strings)
        return cls(frozenset(sources), strings, sources)

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """The ids as config files hold them: the first source's first, the others ascending."""
        first = list(self.sources)[:1]
        ordered = first + sorted(self.ids.difference(first))
        return ordered if len(ordered) > 1 else next(iter(ordered), None)


def _ids(value: Any) -> Iterable[int]:
    # A negative id, which old configs use for "none", names no token.
    found = value if isinstance(value, (list, tuple)) else [value]
    return [id for id in found if isinstance(id, int) and id >= 0]
