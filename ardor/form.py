"""How a model lies in the files that other tools read: ours by its family's rules, or another's."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ardor.adapters.peft_layout import DiskLinear
from ardor.arch import spec as specs
from ardor.arch.causal import CausalLM
from ardor.arch.decoder import Decoder
from ardor.arch.grow import grow_rows, with_rows
from ardor.errors import CheckpointError, ConfigError
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig
from ardor.families.packing import FP8
from ardor.families.rules import Rules
from ardor.files.weights import MAX_SHARD_BYTES, write_weights
from ardor.packing import to_disk
from ardor.quant.fp8 import FP8Experts, FP8Linear, expand_pairs


@runtime_checkable
class Form(Protocol):
    """How a model lies in the files that other tools read."""

    @property
    def needs_trust(self) -> bool: ...  # whether it is loaded with trust_remote_code only
    @property
    def files(self) -> tuple[str, ...]: ...  # of the checkpoint, beside those that any has
    def disk_linears(self) -> Mapping[str, DiskLinear]: ...
    # All files but JSON, the weights in shards of at most so many bytes; what config.json must say
    # of them, where that is not what it said.
    def write(self, decoder: CausalLM, directory: Path, max_shard_bytes: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Growth:
    """Tokens that were added to a model, and how their rows were made: enough to make them again.

    `rows` are all rows of the tables then (never fewer than before), `known` those that had tokens.
    """

    ids: Mapping[str, int]  # of the new tokens, by their text
    rows: int
    known: int
    seed: int = 0

    @classmethod
    def read(cls, record: Mapping[str, Any], where: str) -> "Growth":
        """Raises: CheckpointError if the record is not one."""
        try:
            ids = {str(token): int(id) for token, id in record["added_tokens"].items()}
            return cls(ids, *(int(record[key]) for key in ("rows", "known", "seed")))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{where}: the record of added tokens is damaged ({error!r}); save the adapter "
                "again, or take an earlier checkpoint"
            ) from error

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        tokens = dict(self.ids)
        return {"added_tokens": tokens, "rows": self.rows, "known": self.known, "seed": self.seed}


@dataclass(frozen=True)
class Native:
    """The form of a model that we implement."""

    family: Family
    spec: specs.Decoder
    rules: Rules  # bound to the names of the checkpoint, so that saving gives them back
    kept: dict[str, Tensor] = field(default_factory=dict)  # of the checkpoint, and not read here
    fp8: FP8 | None = None  # how its weights are held in FP8

    needs_trust = False
    files = ()

    def disk_linears(self) -> Mapping[str, DiskLinear]:
        """Where transformers, and so PEFT, has each linear map."""
        return self.family.disk_linears(self.spec)

    def grow(
        self, decoder: CausalLM, config: Mapping[str, Any], growth: "Growth"
    ) -> tuple["Native", dict[str, Any]]:
        """Give `decoder` the rows of `growth`; the form and the config.json of what it is then.

        Raises: ConfigError if rows cannot be added, or config.json would not say how many.
        """
        assert isinstance(decoder, Decoder)
        spec = with_rows(decoder.spec, growth.rows)
        changed = _with_rows(dict(config), spec, self.family)
        if self.family.spec(HFConfig(changed, path="config.json")) != spec:
            raise ConfigError(
                f"config.json of the {self.family.model_type} family cannot be changed to say "
                f"{spec.vocab} rows; resize the embedding with transformers and load the result"
            )
        grow_rows(
            decoder, growth.rows, known=growth.known, fresh=growth.ids.values(), seed=growth.seed
        )
        return replace(self, spec=spec), changed

    def write(
        self, decoder: CausalLM, directory: Path, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> dict[str, Any]:
        """Every tensor under the name and in the shape that it was read with.

        FP8 weights of which some were merged with an adapter are written in bfloat16, all of them.
        """
        rules, kept, state = self.rules, self.kept, state_of(decoder)
        changed = {}
        if self.fp8 is not None and not {*state}.issuperset(chain.from_iterable(rules.memory)):
            # What was merged is FP8 no longer: nor can the others stay so.
            rules, kept = rules.expanded(), expand_pairs(kept, self.fp8.block)
            changed = {"quantization_config": None}

        def read(name: str) -> Tensor:
            if name in state:
                return state[name].detach()
            module = decoder.get_submodule(name.removesuffix(".weight"))
            assert isinstance(module, FP8Linear | FP8Experts), name
            return module.dequantized(torch.bfloat16)

        tensors = to_disk(rules, decoder, lambda name: read(name).cpu())
        layout = to_disk(rules, decoder, lambda name: read(name).to("meta"), "meta")
        write_weights(
            directory,
            chain(tensors, kept.items()),
            max_shard_bytes,
            layout=chain(layout, kept.items()),
        )
        return changed


def _with_rows(config: dict[str, Any], spec: specs.Decoder, family: Family) -> dict[str, Any]:
    """config.json with the numbers of rows that `spec` has."""
    sizes = {"vocab_size": spec.vocab}
    if spec.token_input is not None:
        sizes["vocab_size_per_layer_input"] = spec.token_input.rows
    text = config.get("text_config")
    if isinstance(text, Mapping):
        held = {key: size for key, size in sizes.items() if key in config}
        return config | held | {"text_config": {**text, **sizes}}
    own = family.write(spec) if "spec" in config and family.write is not None else {}
    return config | sizes | own


def state_of(decoder: nn.Module) -> dict[str, Tensor]:
    """Everything that comes from files, by name: the parameters, and what is stored packed."""
    return {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
