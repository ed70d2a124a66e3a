"""The settings of `ardor preview`: those of a run that decide its rows, and which are shown."""

from dataclasses import dataclass

from ardor.data.choices import OverLength
from ardor.train.config import Reading


@dataclass(frozen=True, kw_only=True)
class Settings(Reading):
    """What decides the rows: settings of `ardor finetune`, with its defaults."""

    max_length: int = 1024
    """Longest example in tokens."""
    over_length: OverLength = "truncate_left"
    """What happens to longer ones: truncate_left takes first turns and the start of prompts,
    truncate_right the end with its stop token; or drop, or error. All are counted."""
    tokens_per_batch: int | None = None
    """Fill micro-batches with whole documents up to this many tokens."""
    per_device_train_batch_size: int = 8
    """Examples per micro-batch, where tokens_per_batch is not given."""
    shuffle: bool = False
    """Show the first micro-batches of training, in its order and without what is held out; else
    the first rows of the data."""
    eval_fraction: float = 0.02
    """Share of the examples held out; for --shuffle."""
    seed: int = 0
    """Of the order; for --shuffle."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
