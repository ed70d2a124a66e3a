"""Mapped tensors are the file's, and what was made of them is taken for whole only if it is."""

import mmap

import pytest
import torch
from safetensors.torch import save_file

from ardor.errors import CheckpointError
from ardor.files.mapped import MappedFile, open_made, write_made

TENSORS = {
    "wide": torch.arange(40_000, dtype=torch.float32).view(200, 200),
    "half": torch.arange(9, dtype=torch.bfloat16),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "one": torch.tensor(3.5),
    "none": torch.empty(0, 4),
}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(TENSORS, file)
    return file


def test_a_mapped_tensor_is_the_tensor_before_and_after_its_pages_are_given_back(path):
    file = MappedFile(path)
    assert {*file.names()} == {*TENSORS}
    for name, wanted in TENSORS.items():
        tensor, region = file.tensor(name)
        for _ in range(2):
            region.expect()
            assert torch.equal(tensor, wanted) and tensor.dtype == wanted.dtype
            region.give_back()
        assert region.length == wanted.nbytes and file.aligned(name)


def test_a_page_is_given_back_only_if_it_is_of_the_tensor_alone(path):
    """What is written to a page that is given back is lost: that shows which are."""
    file = MappedFile(path)
    tensor, region = file.tensor("wide")
    other, _ = file.tensor("half")
    tensor.fill_(-1)
    other.fill_(-1)
    region.give_back()
    lost = (tensor.view(-1) != -1).nonzero().view(-1)
    pages = len(lost) * 4 / mmap.PAGESIZE
    assert pages == int(pages) and tensor.nbytes / mmap.PAGESIZE - 2 <= pages
    assert torch.equal(lost, torch.arange(int(lost[0]), int(lost[-1]) + 1))
    assert (other == -1).all()


def test_a_damaged_file_is_refused(path):
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="damaged or was cut short"):
        MappedFile(path)


def test_what_was_made_is_found_by_its_source_and_only_whole(tmp_path):
    path = tmp_path / "made" / "layers.0.safetensors"
    assert open_made(path, "source") is None
    write_made(path, TENSORS, "source")
    found = open_made(path, "source")
    assert found is not None and torch.equal(found.tensor("half")[0], TENSORS["half"])
    assert open_made(path, "another") is None
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert open_made(path, "source") is None
    save_file(TENSORS, path)  # of somebody else
    assert open_made(path, "source") is None
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_made(path, TENSORS, "first")
    before = path.read_bytes()

    def full(partial, tensors):
        partial.write_bytes(b"half")
        raise CheckpointError("no space left on the device")

    monkeypatch.setattr("ardor.files.mapped.write_tensors", full)
    with pytest.raises(CheckpointError, match="no space left"):
        write_made(path, TENSORS, "second")
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        write_made(tmp_path / "file" / "a.safetensors", TENSORS, "x")
