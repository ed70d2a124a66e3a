"""The model that preferences are measured against: this one, as it was before the run."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ardor.adapters.lora import lora_modules
from ardor.adapters.off import without_adapter
from ardor.arch.causal import CausalLM
from ardor.data.batches import Batch
from ardor.data.dataset import Dataset
from ardor.errors import CheckpointError
from ardor.files.atomic import write_atomic
from ardor.files.weights import packed, read_tensors
from ardor.score import document_logprobs
from ardor.train.evaluate import in_order

FILE = "reference.safetensors"  # in the folder of a run

Tell = Callable[[int, int], None]
"""Hears (done, total) examples that the reference was asked about before the first step."""


@torch.no_grad()
def under_the_adapter(decoder: CausalLM, batch: Batch) -> Float[Tensor, "documents"]:
    """The base's own log-probabilities; the adapter is taken off for as long as it takes."""
    training = decoder.training
    decoder.eval()
    with without_adapter(decoder):
        found = document_logprobs(decoder, batch).sums
    decoder.train(training)
    return found


class Table:
    """Log-probabilities that were computed once, of every document of a dataset."""

    def __init__(self, values: Float[Tensor, "examples 2"]):
        self.values = values

    def __call__(self, decoder: CausalLM, batch: Batch) -> Float[Tensor, "documents"]:
        return self.values[list(batch.examples[::2])].flatten().to(decoder.device)


@torch.no_grad()
def table(decoder: CausalLM, data: Dataset, tell: Callable[[int], None] = lambda n: None) -> Table:
    """Of the model as it stands; `tell` hears of how many more examples it knows."""
    decoder.eval()
    values = torch.empty(len(data), 2)
    for batch in in_order(data):
        members = list(batch.examples[::2])
        values[members] = document_logprobs(decoder, batch).sums.float().cpu().view(-1, 2)
        tell(len(members))
    return Table(values)


def tables(
    folder: Path, decoder: CausalLM, data: Sequence[Dataset], *, resumed: bool, tell: Tell | None
) -> list[Table]:
    """One for each dataset: computed, or as they were kept (`keep`) in the folder of the run.

    Raises: CheckpointError if a resumed run has none, or has those of other data.
    """
    path, names = folder / FILE, [one.fingerprint for one in data]
    if resumed:
        found = read_tensors(path)
        if found.keys() != {*names}:
            raise CheckpointError(
                f"{path} holds the reference of other data; resume with the data the run began "
                "with, or choose another output folder"
            )
        return [Table(found[name]) for name in names]
    done, total = 0, sum(map(len, data))

    def more(examples: int) -> None:
        nonlocal done
        done += examples
        if tell is not None:
            tell(done, total)

    return [table(decoder, one, more) for one in data]


def keep(folder: Path, data: Sequence[Dataset], found: Sequence[Table]) -> None:
    """Write the tables for whoever resumes the run.

    Raises: CheckpointError if the disk is full or the place cannot be written.
    """
    named = {one.fingerprint: kept.values for one, kept in zip(data, found, strict=True)}
    write_atomic(folder / FILE, packed(named))


def begins_as_its_base(decoder: CausalLM) -> bool:
    """Whether the adapter, as it stands, changes nothing: then the base is the reference."""
    return not any(
        bool(tensor.any())
        for _, module in lora_modules(decoder)
        for tensor in (module.lora_B, getattr(module, "lora_B_bias", None))
        if tensor is not None
    )
