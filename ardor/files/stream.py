"""A safetensors file written as its tensors come, one in memory at a time.

The library's own writer wants all of them at once. Format: an 8-byte length, so many bytes of JSON
(name -> dtype, shape, offsets), and the tensors, without gaps.
Source: github.com/huggingface/safetensors, README, "Format".
"""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_shard(
    path: Path, layout: Mapping[str, Tensor], tensors: Iterator[tuple[str, Tensor]]
) -> None:
    """Write the next tensors of `tensors`: those that `layout` names, in its order.

    Raises: OSError; the file is whole only once this returns.
    """
    # Wide values first, as the library has them: each then starts at a multiple of its size.
    order = sorted(layout, key=lambda name: (-layout[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # older readers ask for it
    starts, end = {}, 0
    for name in order:
        tensor, starts[name] = layout[name], end
        end += tensor.nbytes
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for wanted, held in layout.items():
            name, tensor = next(tensors)
            agrees = (name, tensor.shape, tensor.dtype) == (wanted, held.shape, held.dtype)
            assert agrees, f"{name} is not laid out as {wanted}"
            file.seek(8 + len(text) + starts[name])
            file.write(_bytes(tensor))
        file.truncate(8 + len(text) + end)  # the last may be empty


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
