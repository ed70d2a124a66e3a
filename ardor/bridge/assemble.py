"""A checkpoint that we do not implement -> transformers' model of it, and back into files."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ardor.arch.causal import CausalLM
from ardor.bridge.foreign import Foreign
from ardor.bridge.plan import Plan, announce, plan
from ardor.errors import ArdorError, CheckpointError, ConfigError
from ardor.families.rules import DiskPart
from ardor.files.atomic import write_atomic
from ardor.files.hub import Resolved
from ardor.precision import dtype_of

ATTENTION = {"flex": "flex_attention"}  # their names for it, where they differ


@dataclass(frozen=True)
class Bridged:
    """How a model of transformers lies in files: as its own classes write it."""

    places: Mapping[str, DiskPart]  # of all its modules
    # What it runs, by name. In memory: a resumed run drops the checkpoint that it began from.
    code: Mapping[str, bytes]

    needs_trust = True

    @property
    def files(self) -> tuple[str, ...]:
        """Names of files beside the usual ones that belong to the checkpoint."""
        return tuple(self.code)

    def disk_linears(self) -> Mapping[str, DiskPart]:
        """Where transformers has each module: all of them, as no target may match another."""
        return self.places

    def write(self, decoder: CausalLM, directory: Path, max_shard_bytes: int) -> dict[str, Any]:
        """Weights as transformers' save_pretrained writes them, and the code they came with."""
        assert isinstance(decoder, Foreign)
        decoder.settle()
        decoder.foreign.save_pretrained(directory, max_shard_size=max_shard_bytes)
        for name in ("config.json", "generation_config.json"):
            # The caller has those that were read.
            (directory / name).unlink(missing_ok=True)
        for name, source in self.code.items():
            write_atomic(directory / name, source)
        return {}


def bridge(
    found: Resolved,
    source: str,
    config: Mapping[str, Any],
    *,
    dtype: str | torch.dtype,
    attn_implementation: str | None,
) -> tuple[Foreign, Bridged]:
    """Run transformers' model of a checkpoint whose weights and code are in `found.path`.

    What will run is said on stderr first. Only safetensors are read, and every weight must be
    there: none is left as it was initialised.

    Raises: ConfigError or CheckpointError for what `plan` refuses, for weights that do not fit, and
    for whatever the code itself fails with.
    """
    what = plan(found.path, config)
    code = {str(path.relative_to(found.path)): path.read_bytes() for path in what.files}
    announce(what, source, found.revision)
    try:
        decoder = Foreign(_loaded(found.path, what, dtype, attn_implementation))
    except ArdorError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{found.path}: {' and '.join(what.classes)} cannot be run by transformers: "
            f"{type(error).__name__}: {error}"
        ) from error
    places = {ours: DiskPart(theirs, 0, 1, t) for ours, theirs, t in decoder.modules_on_disk()}
    return decoder, Bridged(places, code)


def _loaded(
    directory: Path, what: Plan, dtype: str | torch.dtype, attn_implementation: str | None
) -> Any:
    from transformers import AutoModelForCausalLM, GenerationConfig

    asked = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    foreign, told = AutoModelForCausalLM.from_pretrained(
        str(directory),
        trust_remote_code=bool(what.files),
        use_safetensors=True,
        local_files_only=True,
        dtype="auto" if dtype == "auto" else dtype_of(dtype),
        output_loading_info=True,
        # Given, as it would else look for code that generates (custom_generate/) and run it.
        generation_config=GenerationConfig(),
        **{key: ATTENTION.get(value, value) for key, value in asked.items()},
    )
    lost = [*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])]
    if lost:
        raise CheckpointError(
            f"{directory}: its weights do not fill {what.classes[-1]}: missing or of another shape "
            f"are {', '.join(sorted(lost)[:6])}; check that config.json, code and weights belong "
            "together"
        )
    if left := told["unexpected_keys"]:
        print(
            f"{directory}: {what.classes[-1]} has no place for {len(left)} tensors, such as "
            f"{', '.join(sorted(left)[:6])}; they are left unread",
            file=sys.stderr,
        )
    return foreign
