"""Whatever a spec can say and no published architecture is: config.json holds the spec itself.

model_type "ardor". Tensors have the names that they have in memory, and only Ardor reads it.
"""

from typing import Any

from ardor.arch.spec import Decoder
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig
from ardor.families.names import layer_modules, outside_modules
from ardor.families.rules import Rule, Rules
from ardor.families.spec_data import from_data, to_data


def _read(hf: HFConfig) -> Decoder:
    spec = from_data(hf.take("spec"), f"{hf.path}, spec")
    # Copies for those who look for these keys without knowing this form.
    hf.require("vocab_size", spec.vocab, "it is a copy of the spec's vocab, which decides")
    hf.require("tie_word_embeddings", spec.tied, "it is a copy of the spec's tied, which decides")
    return spec


def _write(spec: Decoder) -> dict[str, Any]:
    return {"spec": to_data(spec)}


def _rules(spec: Decoder) -> Rules:
    modules = outside_modules(spec)
    for index, layer in enumerate(spec.layers):
        inside = layer_modules(layer, spec)
        modules |= {f"layers.{index}.{name}": module for name, module in inside.items()}
    rules = []
    for name, module in modules.items():
        parameters = [""] if module.bare else []
        if not module.bare:
            parameters = [f".{kind}" for kind in ("weight", "bias") if getattr(module, kind)]
        # Maps of experts are stacked, and no adapter has a place on them.
        axis = 1 if ".experts." in name else 0
        rules += [Rule(name + end, (name + end,), axis=axis) for end in parameters]
    tied = Rule("lm_head.weight", ("embed_tokens.weight",))
    return Rules(rules=tuple(rules), tied_head=tied if spec.tied else None)


NATIVE = Family(
    model_type="ardor",
    read=_read,
    name_tensors=_rules,
    write=_write,
)
