"""The parameters of a decoder, counted without one."""

import pytest
import torch
from hypothesis import given

from ardor.arch.decoder import Decoder
from ardor.arch.spec import Decoder as Spec
from ardor.memory.shapes import is_quantized, parameters
from ardor.plan import known
from ardor.quant.linear import QuantizedLinear, quantize_decoder
from ardor.train.presets import PRESETS

from ..invariants.test_random_specs import many, specs


def of_a_decoder(spec: Spec) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        decoder = Decoder(spec)
    return {name: tuple(p.shape) for name, p in decoder.named_parameters()}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_of_its_decoder(name):
    spec = known(name).spec
    assert parameters(spec) == of_a_decoder(spec)


@pytest.mark.filterwarnings("ignore:Do not use the")  # beartype draws while it checks
@many
@given(specs)
@pytest.mark.sweep
def test_a_random_spec_has_the_parameters_of_its_decoder(spec):
    assert parameters(spec) == of_a_decoder(spec)


@pytest.mark.parametrize(
    "name", ["smollm2-135m", "gpt2-124m", "mixtral-43m", "granite-3.0-1b-a400m"]
)
def test_linear_is_what_is_quantized(name):
    spec = known(name, None).spec
    small = Decoder(Spec(**{f: getattr(spec, f) for f in spec.__slots__} | _first_layer(spec)))
    for parameter in small.parameters():
        torch.nn.init.ones_(parameter)
    quantized = {f"{found}.weight" for found in quantize_decoder(small)}
    linears = {n: shape for n, shape in parameters(small.spec).items() if is_quantized(n, shape)}
    assert {n for n, shape in linears.items() if len(shape) == 2} == quantized
    assert all(".experts." in n for n, shape in linears.items() if len(shape) > 2)
    assert any(isinstance(module, QuantizedLinear) for module in small.modules())


def _first_layer(spec: Spec) -> dict:
    return {"layers": spec.layers[:1], "vocab": 8}
