"""Rows of the embedding and the head, read where they are asked for and nowhere else.

Axes: V vocabulary, D model width.
"""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from ardor.doctor.checkpoint import Checkpoint

SAMPLED = 512  # rows that the scale is taken from
TINY = 1e-3  # of the usual size of a row: what was never trained is a millionth of it and less


def tables(it: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """(tensor's name, [V, D] mapped from its file) of the embedding, and of the head if stored."""
    if it.files is None or it.spec is None:
        return
    for name in (it.embedding, it.head):
        if name is None:
            continue
        matrix = it.files.read(name)
        if matrix.is_floating_point() and matrix.ndim == 2 and len(matrix) == it.spec.vocab:
            yield name, matrix


def untrained(matrix: Tensor, used: Collection[int], others: Collection[int]) -> dict[int, str]:
    """Which of the ids that are `used` have a row that nobody trained, and how it shows.

    Its values are next to nothing beside those of other rows, or it is exactly the row of another
    of the added tokens (`others`).

    Source: unsloth-zoo's fix_untrained_tokens, which looks for the same two signs.
    """
    step = max(1, len(matrix) // SAMPLED)
    usual = float(matrix[::step].float().abs().amax(1).median())
    found: dict[int, str] = {}
    same: dict[bytes, list[int]] = {}
    for id in {*used, *others}:
        row = matrix[id].float()
        if float(row.abs().max()) <= TINY * usual:
            if id in used:
                found[id] = "a row of almost zeros"
        else:
            same.setdefault(row.numpy().tobytes(), []).append(id)
    for ids in same.values():
        for id in ids if len(ids) > 1 else ():
            if id in used:
                found[id] = f"the same row as token {next(i for i in ids if i != id)}"
    return found


def mean_rows(matrix: Tensor, ids: Collection[int]) -> Tensor:
    """[len(ids), D] rows to begin with: the mean of the trained ones, each a little apart.

    In float32. The spread is a hundredth of the rows' own, which rounding to bfloat16 keeps:
    rows that are all the same would be trained to be the same.
    """
    kept = torch.ones(len(matrix), dtype=torch.bool)
    kept[list(ids)] = False
    rows = matrix[kept].float()
    usual = rows.abs().amax(1)
    rows = rows[usual > TINY * usual.median()]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(ids), matrix.shape[1], generator=generator)
    return rows.mean(0) + 0.01 * rows.std(0) * noise
