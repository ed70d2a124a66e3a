"""The table of a spec's modules is what `arch` builds."""

import torch

from ardor.arch.decoder import Decoder
from ardor.families.names import layer_modules, outside_modules
from ardor.load import state_of

from ..parity.cases import CASES
from .test_families import family_of, read


def test_the_modules_of_a_spec_are_those_of_its_decoder():
    for name, case in CASES.items():
        raw = case.config().to_dict()
        spec = read(raw)
        with torch.device("meta"):
            built = {*state_of(Decoder(spec))}
        named = dict(outside_modules(spec))
        for i, layer in enumerate(spec.layers):
            modules = layer_modules(layer, spec)
            named |= {f"layers.{i}.{n}": module for n, module in modules.items()}
        told = set()
        for module_name, module in named.items():
            if module.bare:
                told.add(module_name)
                continue
            told |= {f"{module_name}.{p}" for p in ("weight", "bias") if getattr(module, p)}
        assert told == built, name
        family_of(raw).rules(spec).check(
            [n for rule in family_of(raw).rules(spec).plain for n in rule.names], name
        )
