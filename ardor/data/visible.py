"""White space, control and invisible characters, made visible."""

import re
import unicodedata
from collections.abc import Sequence

LINE_END = "↵"
TAB = "⇥"
SPACE = "·"

# A space that is easily overlooked: one of several, or at an end of a line or of the text.
_SPACES = re.compile(r"  +|^ | $|(?<=\n) | (?=\n)")
_NAMED = {"\u00a0": "⍽", "\u00ad": "‧", "\u200b": "[ZWSP]", "\u200d": "[ZWJ]", "\ufeff": "[BOM]"}
_HIDDEN = ("Cf", "Cc", "Co", "Cs", "Cn", "Zl", "Zp", "Zs")


def visible(text: str) -> str:
    """The text with a sign for each character that nobody sees; a line still ends after its sign.

    ↵ line end, ⇥ tab, · a space that is easily overlooked, ␀ to ␡ control characters, ⍽ a space
    that does not break; anything else that is not seen is written as [U+200E].
    """
    return "".join(visible_parts([text]))


def visible_parts(texts: Sequence[str]) -> list[str]:
    """`visible` of a text that is given in parts, part by part."""
    whole = "".join(texts)
    signed = _SPACES.sub(lambda found: "\0" * len(found[0]), whole)
    parts, at = [], 0
    for text in texts:
        spaces = signed[at : at + len(text)]
        at += len(text)
        pairs = zip(text, spaces, strict=True)
        parts.append("".join(SPACE if a == " " and b == "\0" else _sign(a) for a, b in pairs))
    return parts


def _sign(char: str) -> str:
    if char == "\n":
        return LINE_END + "\n"
    if char == "\t":
        return TAB + "\t"
    if char == " ":
        return char
    if char in _NAMED:
        return _NAMED[char]
    if char < " ":
        return chr(0x2400 + ord(char))
    if char == "\x7f":
        return "␡"
    if unicodedata.category(char) in _HIDDEN:
        return f"[U+{ord(char):04X}]"
    return char
