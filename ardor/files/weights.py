"""Weights in files: names, shapes and dtypes without reading, tensors by memory map.

They are written as safetensors, and read so unless pickles are asked for.
"""

import math
import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from ardor.errors import CheckpointError
from ardor.files import pickles
from ardor.files.atomic import explained
from ardor.files.convert import converted
from ardor.files.json import read_json, write_json
from ardor.files.stream import CODES, write_shard

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (pickles.SINGLE, pickles.INDEX)

_DTYPES = {code: dtype for dtype, code in CODES.items()}
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # values, not codes
METADATA = {"format": "pt"}
MAX_SHARD_BYTES = 50_000_000_000  # as transformers 5


class WeightFiles:
    """The tensors of one checkpoint, whichever files hold them. Only headers are read at first."""

    def __init__(self, directory: Path, homes: Mapping[str, Path], handles: Mapping[Path, Any]):
        self.directory = directory
        self._homes, self._handles = dict(homes), dict(handles)

    def names(self) -> tuple[str, ...]:
        return tuple(self._homes)

    def file(self, name: str) -> Path:
        """The file that holds `name`.

        Raises: CheckpointError if no file does.
        """
        if name not in self._homes:
            raise CheckpointError(f"{self.directory} holds no tensor {name!r}")
        return self._homes[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        code = self._slice(name).get_dtype()
        if code not in _DTYPES:
            raise CheckpointError(
                f"{self.file(name)}: {name} has dtype {code}; expected one of {', '.join(_DTYPES)}"
            )
        return _DTYPES[code]

    def size(self, name: str) -> int:
        """In bytes."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, in the dtype it is stored in; mapped from its file."""
        return self._from(self._handles[self.file(name)], name)

    def read_as(self, name: str, dtype: torch.dtype | None, device: torch.device) -> Tensor:
        """The tensor on `device`; if it is floating, in `dtype` (None: as it is stored).

        What is converted or moved is copied, and its pages of the file are given back at once:
        host memory holds one mapped tensor at a time beside what was read.
        """
        stored = self.dtype(name)
        to = dtype if dtype is not None and stored in FLOATING else stored
        if to == stored and device.type == "cpu":
            return self.read(name)
        path = self.file(name)
        # Pages of a mapping count as ours until it ends, so each tensor has a mapping to itself.
        own = _open(path) if path.suffix == ".safetensors" else self._handles[path]
        tensor = self._from(own, name)
        return converted(tensor, to) if device.type == "cpu" else tensor.to(device).to(to)

    def first_floating(self) -> torch.dtype | None:
        """The dtype of the first tensor that holds floating-point values; None if none does."""
        return next((d for d in map(self.dtype, self._homes) if d in FLOATING), None)

    def _from(self, handle: Any, name: str) -> Tensor:
        try:
            return handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.file(name)}: cannot read {name}: {error}") from error

    def _slice(self, name: str) -> Any:
        return self._handles[self.file(name)].get_slice(name)


def open_weights(directory: str | Path, *, use_safetensors: bool = True) -> WeightFiles:
    """Open `model.safetensors`, or the shards that `model.safetensors.index.json` lists.

    Without `use_safetensors` it is `pytorch_model.bin`, or its shards, that are opened.

    Raises: CheckpointError if there are none, one is damaged, a shard is missing, or the index
    names a tensor that its shard does not hold.
    """
    directory = Path(directory)
    names, opened = ((SINGLE, INDEX), _open) if use_safetensors else (PICKLED, _open_pickle)
    single, index = (directory / name for name in names)
    if single.exists():
        handles = {single: opened(single)}
        return WeightFiles(directory, dict.fromkeys(handles[single].keys(), single), handles)
    if not index.exists():
        raise CheckpointError(_nothing(directory, *names))
    homes = _weight_map(index)
    if missing := sorted({path.name for path in homes.values() if not path.exists()}):
        raise CheckpointError(
            f"{index} lists {', '.join(missing)}, not found in {directory}; "
            "copy or download the missing shards"
        )
    handles = {path: opened(path) for path in dict.fromkeys(homes.values())}
    held = {path: frozenset(handle.keys()) for path, handle in handles.items()}
    for name, path in homes.items():
        if name not in held[path]:
            raise CheckpointError(
                f"{index} says that {path.name} holds {name}, but it does not; "
                "download both again, from the same place"
            )
    # A tensor the index forgot is still in the checkpoint: whoever accounts for names must see it.
    forgotten = {name: path for path, names in held.items() for name in sorted(names - {*homes})}
    return WeightFiles(directory, homes | forgotten, handles)


def open_file(path: str | Path) -> WeightFiles:
    """Open one safetensors file, whatever its name.

    Raises: CheckpointError if it is missing or damaged.
    """
    path = Path(path)
    handle = _open(path)
    return WeightFiles(path.parent, dict.fromkeys(handle.keys(), path), {path: handle})


def write_weights(
    directory: str | Path,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    layout: Iterable[tuple[str, Tensor]] | None = None,
) -> tuple[Path, ...]:
    """Write tensors bit for bit, as one file or as shards with an index; returns the files.

    `layout` has names, shapes and dtypes in the order of `tensors`, without the contents (on the
    meta device): with it each tensor is written as it comes, and only one is held. A tensor above
    the limit has a shard to itself. Files appear under their names after all are written, and those
    of an earlier checkpoint go last. To replace a checkpoint in one step, write into an
    `atomic_directory`.

    Raises: CheckpointError if the disk is full or the place cannot be written.
    """
    directory = Path(directory)
    pairs = cast(
        "Iterable[tuple[str, Tensor]]",
        tensors.items() if isinstance(tensors, Mapping) else tensors,
    )
    if layout is None:
        layout = pairs = list(pairs)
    shards, coming = list(_shards(layout, max_shard_bytes)), iter(pairs)
    count = len(shards)
    files = [directory / f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    if count == 1:
        files = [directory / SINGLE]
    partials = [directory / f".shard-{i + 1}.partial-{os.getpid()}" for i in range(count)]
    with explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            for partial, shard in zip(partials, shards, strict=True):
                write_shard(partial, shard, coming)
            for partial, file in zip(partials, files, strict=True):
                os.replace(partial, file)
        finally:
            for partial in partials:
                partial.unlink(missing_ok=True)
    if count > 1:
        homes = {name: f.name for f, held in zip(files, shards, strict=True) for name in held}
        all_held = [tensor for shard in shards for tensor in shard.values()]
        metadata = {
            "total_parameters": sum(tensor.numel() for tensor in all_held),
            "total_size": sum(tensor.nbytes for tensor in all_held),
        }
        files.append(directory / INDEX)
        write_json(files[-1], {"metadata": metadata, "weight_map": homes})
    for stale in {
        directory / INDEX,
        directory / SINGLE,
        *directory.glob("model-*-of-*.safetensors"),
    }:
        if stale not in files:
            stale.unlink(missing_ok=True)
    return tuple(files)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file, in place: it is whole only once this returns.

    Raises: CheckpointError if the disk is full or the place cannot be written.
    """
    _save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, Path(path))


def packed(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of one safetensors file."""
    return save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, METADATA)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of one safetensors file.

    Raises: CheckpointError if it is missing or damaged.
    """
    path = Path(path)
    with _explained_read(path):
        return load_file(path)


def _shards(layout: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    seen: set[str] = set()
    for name, tensor in layout:
        assert name not in seen, f"{name} was given twice"
        seen.add(name)
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard or not seen:
        yield shard


def _save(shard: dict[str, Tensor], path: Path) -> None:
    storages: set[int] = set()
    for name, tensor in shard.items():
        # safetensors refuses tensors that share memory, which a reader could not tell anyway.
        if (pointer := tensor.untyped_storage().data_ptr()) in storages:
            shard[name] = tensor.clone()
        storages.add(pointer)
    with _explained_save(path):
        path.touch()
        mode = path.stat().st_mode  # safetensors writes through a temporary file of mode 0600
        save_file(shard, path, metadata=METADATA)
        path.chmod(mode)


@contextmanager
def _explained_save(path: Path) -> Generator[None, None, None]:
    with explained(path.parent):
        try:
            yield
        except SafetensorError as error:
            # The library gives the system's error number in words only: "(os error 28)".
            number = str(error).partition("(os error ")[2].partition(")")[0]
            if not number.isdecimal():
                raise CheckpointError(f"cannot write weights to {path.parent}: {error}") from error
            raise OSError(int(number), os.strerror(int(number))) from error


def _open(path: Path) -> Any:
    with _explained_read(path):
        return safe_open(path, framework="pt")


def _open_pickle(path: Path) -> Any:
    return pickles.open_pickle(path, CODES)


@contextmanager
def _explained_read(path: Path) -> Generator[None, None, None]:
    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged or was cut short ({path.stat().st_size} bytes): {error}; "
            "download or write it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _weight_map(index: Path) -> dict[str, Path]:
    value = read_json(index)
    homes = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(homes, dict) or not homes:
        raise CheckpointError(f"{index} has no weight_map; download or write it again")
    for name, file in homes.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(
                f"{index}: {name} is said to be in {file!r}, not a file beside it"
            )
    return {name: index.parent / file for name, file in homes.items()}


def _nothing(directory: Path, single: str, index: str) -> str:
    if not directory.is_dir():
        return f"{directory} is not a directory"
    found = sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
    text = f"no {single} or {index} in {directory}; found {', '.join(found) or 'nothing'}"
    if single == pickles.SINGLE:
        there = {SINGLE, INDEX} & {*found}
        return f"{text}; leave use_safetensors=False (--no-use-safetensors) out" if there else text
    if {*PICKLED} & {*found}:
        return (
            f"{text}; pickle files can run code, and are read only when asked for: give "
            "use_safetensors=False (--no-use-safetensors), which reads tensors and refuses the rest"
        )
    if any(name.endswith((".bin", ".pt", ".pth")) for name in found):
        text += (
            f"; of pickle files only {' and '.join(PICKLED)} are known: convert to safetensors "
            "(transformers' from_pretrained and save_pretrained do)"
        )
    return text
