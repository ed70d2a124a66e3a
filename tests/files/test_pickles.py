"""Pickled weights are read only when asked for, and tensors are all that is ever read of them."""

import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from ardor.errors import CheckpointError
from ardor.files.weights import open_weights

SINGLE = "pytorch_model.bin"


def tensors() -> dict[str, torch.Tensor]:
    whole = torch.arange(12.0).view(3, 4)
    return {
        "whole": whole,
        "turned": whole.T,  # not contiguous, and of the same storage
        "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "brain": torch.full((2, 3), 0.1, dtype=torch.bfloat16),
        "steps": torch.tensor(7),
        "trained": nn.Parameter(torch.ones(2)),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_a_file_is_read_as_its_tensors(tmp_path, zipped):
    state = OrderedDict(tensors())
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined] (as state_dict has)
    torch.save(state, tmp_path / SINGLE, _use_new_zipfile_serialization=zipped)
    found = open_weights(tmp_path, use_safetensors=False)
    assert found.names() == tuple(tensors())
    for name, tensor in tensors().items():
        read = found.read(name)
        assert torch.equal(read, tensor) and not read.requires_grad
        assert found.shape(name) == tuple(tensor.shape) and found.dtype(name) == tensor.dtype
        assert found.file(name) == tmp_path / SINGLE


def test_a_file_is_mapped_and_not_read(tmp_path):
    """In a process that may hold less memory than the file has."""
    torch.save({"large": torch.zeros(1 << 26)}, tmp_path / SINGLE)  # 256 MiB
    script = (
        "import resource, sys, torch\n"
        "from ardor.files.weights import open_weights\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "found = open_weights(sys.argv[1], use_safetensors=False)\n"
        "assert found.read('large')[-1] == 0\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 50_000  # KiB


def test_shards_are_found_by_their_index(tmp_path):
    held = tensors()
    homes = {}
    for number, name in enumerate(held, 1):
        file = f"pytorch_model-{number:05}-of-{len(held):05}.bin"
        torch.save({name: held[name]}, tmp_path / file)
        homes[name] = file
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(f'{{"weight_map": {str(homes).replace(chr(39), chr(34))}}}')
    found = open_weights(tmp_path, use_safetensors=False)
    assert all(torch.equal(found.read(name), held[name]) for name in held)
    (tmp_path / homes["half"]).unlink()
    with pytest.raises(CheckpointError, match=f"lists {homes['half']}, not found"):
        open_weights(tmp_path, use_safetensors=False)


def test_it_is_refused_unless_asked_for(tmp_path):
    torch.save(tensors(), tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"read only when asked for: .*--no-use-safetensors"):
        open_weights(tmp_path)
    (tmp_path / SINGLE).rename(tmp_path / "consolidated.00.pth")
    for given in (True, False):
        with pytest.raises(CheckpointError, match=r"found consolidated\.00\.pth"):
            open_weights(tmp_path, use_safetensors=given)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"leave use_safetensors=False .* out"):
        open_weights(tmp_path, use_safetensors=False)


class Evil:
    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return (os.system, (f"touch {self.witness}",))


@pytest.mark.parametrize("form", ["zip", "before 1.6", "plain pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, form):
    witness, file = tmp_path / "ran", tmp_path / SINGLE
    state = {"weight": torch.zeros(2), "more": Evil(witness)}
    if form == "plain pickle":
        file.write_bytes(pickle.dumps({"more": Evil(witness)}, protocol=2))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=r"asks for posix\.system, .* not run: "):
        open_weights(tmp_path, use_safetensors=False)
    assert not witness.exists()
    loaded = torch.load(file, weights_only=False) if form != "plain pickle" else None
    assert loaded is None or witness.exists()  # it would have run


def test_damage_is_told(tmp_path):
    file = tmp_path / SINGLE
    torch.save(tensors(), file)
    whole = file.read_bytes()
    for broken in (whole[:300], whole[:-30], b"", b"not a pickle at all", whole[100:]):
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match=rf"damaged or cut short \({len(broken)} "):
            open_weights(tmp_path, use_safetensors=False)


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ([torch.zeros(2)], "holds a list, expected tensors by name"),
        ({"state_dict": {"a": torch.zeros(2)}}, "'state_dict' is a dict, expected a tensor"),
        ({"a": torch.zeros(2), "epoch": 3}, "'epoch' is a int, expected a tensor"),
        ({3: torch.zeros(2)}, "3 is a Tensor, expected a tensor"),
        ({"a": torch.eye(3).to_sparse()}, "stored as torch.sparse_coo"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, held, says):
    torch.save(held, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=says):
        open_weights(tmp_path, use_safetensors=False)


def test_an_unknown_dtype_is_named(tmp_path):
    torch.save({"a": torch.zeros(2, dtype=torch.complex64)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: a has dtype complex64"):
        open_weights(tmp_path, use_safetensors=False).dtype("a")
