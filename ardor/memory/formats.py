"""Bytes of a weight in the dtype, or the quantized format, that it is held in."""

import math
import re

from ardor.memory.shapes import Shape

WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a number
NF4_BLOCK, NESTED_BLOCK = 64, 256
GROUPED = re.compile(r"int(?P<bits>[48])-g(?P<group>\d+)")


def counted(format: str) -> bool:
    """Whether `weight_bytes` knows a format of weights."""
    plain = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "llm-int8", "int4", "gptq", "awq")
    return format in plain or GROUPED.fullmatch(format) is not None


def weight_bytes(shape: Shape, dtype: str, quantization: str | None = None) -> int:
    """Bytes of one weight: exact, for nf4 and fp4 with a float32 scale for each block of 64.

    "-dq" holds these scales in 8 bits, with a float32 for 256 of them and one for all. GPTQ and AWQ
    count as 4 bits in groups of 128. Of stacked experts each is quantized by itself.
    """
    n, outputs = math.prod(shape), math.prod(shape[:-1])
    if quantization is None:
        return n * WIDTHS[dtype]
    if len(shape) > 2:
        return shape[0] * weight_bytes(shape[1:], dtype, quantization)
    if quantization in ("int8", "llm-int8"):
        return n + 4 * outputs
    if quantization in ("int4", "gptq", "awq"):
        quantization = "int4-g128"
    if grouped := GROUPED.fullmatch(quantization):
        groups = -(-shape[-1] // int(grouped["group"]))
        return n * int(grouped["bits"]) // 8 + 5 * groups * outputs
    blocks = -(-n // NF4_BLOCK)
    assert counted(quantization), quantization
    if quantization.endswith("-dq"):
        return (n + 1) // 2 + blocks + 4 * -(-blocks // NESTED_BLOCK) + 4
    return (n + 1) // 2 + 4 * blocks
