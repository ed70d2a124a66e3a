"""Weights come back bit for bit, and damaged checkpoints are refused by name."""

import errno
import json
import os
import stat

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ardor.errors import CheckpointError
from ardor.files import stream, weights
from ardor.files.weights import open_weights, read_tensors, write_tensors, write_weights


def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    base = torch.randn(6, 4, generator=g)
    return {
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "half": base.to(torch.bfloat16),
        "turned": base.T,  # not contiguous
        "top": base[:3],  # the two share memory
        "bottom": base[3:],
        "same": base[3:],
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 5),
        "bytes": torch.arange(7, dtype=torch.uint8),
    }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("limit", [10**9, 100, 1])
def test_what_is_written_is_read_bit_for_bit(tmp_path, limit):
    files = write_weights(tmp_path, tensors(), max_shard_bytes=limit)
    assert sorted(files) == sorted(tmp_path.iterdir())  # no leftovers
    assert (len(files) == 1) == (limit == 10**9)
    found = open_weights(tmp_path)
    assert set(found.names()) == set(tensors())
    for name, tensor in tensors().items():
        assert found.shape(name) == tuple(tensor.shape)
        assert found.dtype(name) == tensor.dtype
        assert bits(found.read(name)) == bits(tensor)


def test_shards_keep_to_the_limit_and_the_index_counts_them(tmp_path):
    write_weights(tmp_path, tensors(), max_shard_bytes=100)
    for path in tmp_path.glob("*.safetensors"):
        held = load_file(path)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 100
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {
        "total_parameters": sum(t.numel() for t in tensors().values()),
        "total_size": sum(t.nbytes for t in tensors().values()),
    }


@pytest.mark.parametrize("limit", [10**9, 800])
def test_only_one_tensor_is_alive_at_a_time(tmp_path, limit):
    alive: set[int] = set()
    most = 0

    class Watched(torch.Tensor):
        def __del__(self):
            alive.discard(id(self))

    def stream():
        nonlocal most
        for i in range(12):
            tensor = torch.full((100,), float(i)).as_subclass(Watched)
            alive.add(id(tensor))
            most = max(most, len(alive))
            yield str(i), tensor
            del tensor

    layout = [(str(i), torch.empty(100, device="meta")) for i in range(12)]
    write_weights(tmp_path, stream(), limit, layout=layout)
    found = open_weights(tmp_path)
    assert all(torch.equal(found.read(str(i)), torch.full((100,), float(i))) for i in range(12))
    assert 0 < most <= 3  # one is written while the next is made, and views of it


def test_the_file_is_what_the_library_itself_writes(tmp_path):
    (path,) = write_weights(tmp_path, tensors())
    held = {name: tensor.clone().contiguous() for name, tensor in tensors().items()}
    save_file(held, tmp_path / "theirs", metadata={"format": "pt"})
    ours, theirs = path.read_bytes(), (tmp_path / "theirs").read_bytes()
    assert len(ours) == len(theirs)
    for name, tensor in load_file(path).items():
        assert bits(tensor) == bits(held[name])
        assert tensor.data_ptr() % tensor.itemsize == 0


def test_a_new_checkpoint_leaves_no_file_of_the_old(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not ours")
    for limit in (100, 10**9, 100):
        files = write_weights(tmp_path, tensors(), max_shard_bytes=limit)
        held = {path.name for path in tmp_path.iterdir()}
        assert held == {path.name for path in files} | {"adapter_model.safetensors"}


def test_files_are_readable_by_others_and_marked_for_old_readers(tmp_path):
    (path,) = write_weights(tmp_path, tensors())
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    with weights.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    write_weights(tmp_path, {"old": torch.zeros(2)})
    written = 0

    def write_bytes(tensor):
        nonlocal written
        written += 1
        if written == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return bytes(tensor.nbytes)

    monkeypatch.setattr(stream, "_bytes", write_bytes)
    with pytest.raises(CheckpointError, match="no space left"):
        write_weights(tmp_path, tensors(), max_shard_bytes=20)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert open_weights(tmp_path).names() == ("old",)


def test_nothing_to_load_says_what_is_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"no model\.safetensors .* found nothing"):
        open_weights(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found config\.json, pytorch_model\.bin; pickle"):
        open_weights(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        open_weights(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_file_cut_short_is_named(tmp_path, keep):
    (path,) = write_weights(tmp_path, tensors())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or was cut short"):
        open_weights(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_weights(tmp_path, tensors(), max_shard_bytes=100)
    os.remove(next(tmp_path.glob("model-00002-of-*")))
    with pytest.raises(CheckpointError, match=r"lists model-00002-of-\d+\.safetensors, not found"):
        open_weights(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path):
    write_weights(tmp_path, tensors(), max_shard_bytes=100)
    index = tmp_path / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["ghost"] = value["weight_map"]["half"]
    index.write_text(json.dumps(value))
    with pytest.raises(
        CheckpointError, match=r"model-.*\.safetensors holds ghost, but it does not"
    ):
        open_weights(tmp_path)
    value["weight_map"]["ghost"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="not a file beside it"):
        open_weights(tmp_path)


def test_a_tensor_that_the_index_puts_in_another_shard_is_named(tmp_path):
    write_weights(tmp_path, tensors(), max_shard_bytes=100)
    index = tmp_path / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    homes = value["weight_map"]
    other = next(file for file in homes.values() if file != homes["half"])
    homes["half"] = other
    index.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=rf"says that {other} holds half, but it does not"):
        open_weights(tmp_path)


def test_a_shard_cut_short_is_named(tmp_path):
    write_weights(tmp_path, tensors(), max_shard_bytes=100)
    shard = next(tmp_path.glob("model-00002-of-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{shard.name} is damaged or was cut short"):
        open_weights(tmp_path)


def test_a_tensor_that_the_index_forgot_is_still_there(tmp_path):
    write_weights(tmp_path, tensors(), max_shard_bytes=100)
    index = tmp_path / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    del value["weight_map"]["half"]
    index.write_text(json.dumps(value))
    assert bits(open_weights(tmp_path).read("half")) == bits(tensors()["half"])


def test_an_unknown_name_is_refused(tmp_path):
    write_weights(tmp_path, tensors())
    with pytest.raises(CheckpointError, match="holds no tensor 'ghost'"):
        open_weights(tmp_path).read("ghost")


def test_one_file_is_written_and_read_bit_for_bit(tmp_path):
    path = tmp_path / "state.safetensors"
    whole = torch.arange(12.0).view(3, 4)
    written = {"step": torch.tensor(7.0), "turned": whole.T, "shared": whole[:2]}
    write_tensors(path, written)
    found = read_tensors(path)
    assert found.keys() == written.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in written.items())


def test_a_single_file_that_is_missing_cut_or_not_writable_is_named(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    with pytest.raises(CheckpointError, match=r"cannot read .*state\.safetensors"):
        read_tensors(path)
    write_tensors(path, {"x": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"state\.safetensors is damaged or was cut short"):
        read_tensors(path)

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(CheckpointError, match="no space left"):
        write_tensors(path, {"x": torch.zeros(100)})
