"""The formats that weights are quantized to, by name."""

import difflib
import re
from collections.abc import Callable
from functools import partial

from torch import Tensor

from ardor.errors import ConfigError
from ardor.quant.bnb4 import quantize_4bit
from ardor.quant.bnb8 import quantize_rows
from ardor.quant.groupwise import quantize_groups
from ardor.quant.packed import PackedWeight

# "-g64": every 64 inputs of an output share a scale and a zero.
FORMATS: dict[str, Callable[[Tensor], PackedWeight]] = {
    "nf4": partial(quantize_4bit, kind="nf4"),
    "nf4-dq": partial(quantize_4bit, kind="nf4", double=True),
    "fp4": partial(quantize_4bit, kind="fp4"),
    "fp4-dq": partial(quantize_4bit, kind="fp4", double=True),
    "llm-int8": quantize_rows,
    "int8-g128": partial(quantize_groups, bits=8, group=128),
    "int8-g64": partial(quantize_groups, bits=8, group=64),
    "int8-g32": partial(quantize_groups, bits=8, group=32),
    "int4-g128": partial(quantize_groups, bits=4, group=128),
    "int4-g64": partial(quantize_groups, bits=4, group=64),
    "int4-g32": partial(quantize_groups, bits=4, group=32),
}
# What else people type. "int8" is what it is in bitsandbytes; groups say so in their name.
ALIASES = {
    "int8": "llm-int8",
    "llm.int8": "llm-int8",
    "8bit": "llm-int8",
    "4bit": "nf4",
    "int4": "int4-g128",
}
GROUPED = re.compile(r"int(?P<bits>[48])-g(?P<group>\d+)")


def format_name(name: str) -> str:
    """The format of that name or alias, whatever its case and with _ for -.

    Raises: ConfigError if there is none.
    """
    plain = name.lower().replace("_", "-")
    found = ALIASES.get(plain, plain)
    if found not in FORMATS:
        known = (*FORMATS, *ALIASES)
        near = difflib.get_close_matches(plain, known, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"quantization={name!r} is not known; choose one of {', '.join(known)}{hint}"
        )
    return found
