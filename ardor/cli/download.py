"""`ardor download MODEL`."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ardor.cli.console import print_json, remarks, results

if TYPE_CHECKING:
    from ardor.files.hub import Listing


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fetch a model from the hub: weights, config and tokenizer, and nothing else.

    Run it again after an interruption: it goes on where it stopped. Prints the directory.
    """

    model: str
    """Hub id, such as TinyLlama/TinyLlama-1.1B-Chat-v1.0."""
    revision: str | None = None
    """Branch, tag or commit. Default: the main branch."""
    output: Path | None = None
    """A directory for the files, to be given as the model. Default: the hub's cache, which every
    verb looks in for the hub id."""
    use_safetensors: bool = True
    """Weights as safetensors; --no-use-safetensors: as pickles (.bin)."""
    json: bool = False
    """Print one JSON document: path, commit, files with their bytes, seconds."""


def run(config: Config) -> int:
    from ardor.files.hub import PATTERNS, PICKLE_PATTERNS, resolve

    heard: list[Listing] = []

    def tell(listing: "Listing") -> None:
        heard.append(listing)
        _show(config.model, listing)

    began = time.monotonic()
    try:
        found = resolve(
            config.model,
            config.revision,
            patterns=PATTERNS if config.use_safetensors else PICKLE_PATTERNS,
            into=config.output,
            tell=tell,
        )
    except KeyboardInterrupt as request:
        request.add_note("what has come is kept: the same command goes on from there")
        raise
    if not config.json:
        results().print(str(found.path))
        return 0
    files = {file.name: file.size for listing in heard for file in listing.files}
    print_json(
        {
            "model": config.model,
            "path": str(found.path),
            "commit": found.revision,
            "files": files,
            "bytes": sum(files.values()),
            "seconds": round(time.monotonic() - began, 3),
        }
    )
    return 0


def _show(model: str, listing: "Listing") -> None:
    """What there is to have, largest first."""
    console = remarks()
    total = sum(file.size for file in listing.files)
    console.print(f"{model} at {listing.commit}: {len(listing.files)} files, {_size(total)}")
    for file in sorted(listing.files, key=lambda file: -file.size):
        console.print(f"  {_size(file.size):>9}  {file.name}")


def _size(count: int) -> str:
    """In the decimal units that the hub's pages use."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
