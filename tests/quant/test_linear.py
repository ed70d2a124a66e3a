"""Quantized linears: the product, its gradient, what is kept for it, and module surgery."""

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ardor.arch.linear import Linear
from ardor.errors import CheckpointError, ConfigError, ShapeError
from ardor.quant.bnb4 import quantize_4bit
from ardor.quant.formats import FORMATS
from ardor.quant.linear import QuantizedLinear, quantize_decoder

IN, OUT = 128, 40
EXPANDED = [name for name in FORMATS if name != "llm-int8"]  # whose product is the dense one


def dense(bias=True, seed=0):
    torch.manual_seed(seed)
    linear = Linear(IN, OUT, bias=bias)
    for parameter in linear.parameters():
        nn.init.normal_(parameter)
    return linear


def quantized(format="nf4", bias=True):
    linear = dense(bias)
    return QuantizedLinear.from_weight(linear.weight, linear.bias, format)


class Stack(nn.Module):
    """The names of a decoder, and nothing else."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(8, IN)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mixer": nn.ModuleDict({"o_proj": dense()}), "head": dense()})
            for _ in range(2)
        )
        self.lm_head = dense()


@pytest.mark.parametrize("format", EXPANDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_product_is_that_of_the_dequantized_weight(format, dtype):
    linear = quantized(format)
    x = torch.randn(2, 3, IN, dtype=dtype)
    assert linear.bias is not None
    expected = F.linear(x, linear.dequantized(dtype), linear.bias.to(dtype))
    assert torch.equal(linear(x), expected) and linear(x).dtype == dtype
    assert not torch.allclose(linear(x), dense()(x))  # quantization is visible in this probe


@pytest.mark.parametrize("format", FORMATS)
def test_gradient_reaches_the_input_only(format):
    linear = quantized(format)
    x = torch.randn(5, IN, requires_grad=True)
    y = linear(x)
    upstream = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    torch.testing.assert_close(gradient, upstream @ linear.dequantized(torch.float32))
    assert not any(parameter.requires_grad for parameter in linear.parameters())
    assert not linear(x.detach()).requires_grad


def test_the_gradient_is_the_derivative():
    linear = quantized()
    x = torch.randn(2, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear, x)


def kept_for_backward(linear):
    """Sizes of all float tensors that autograd holds on to, in saved tensors or on the node."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = linear(torch.randn(5, IN, requires_grad=True))
    held = getattr(y.grad_fn, "__dict__", {}).values()  # what `ctx.x = x` leaves on the node
    kept += [value for value in held if isinstance(value, torch.Tensor)]
    return [t.numel() for t in kept if t.is_floating_point()]


def test_backward_keeps_no_dense_weight():
    assert OUT * IN in kept_for_backward(dense())  # the probe sees the weight where it is kept
    for format in FORMATS:
        assert max(kept_for_backward(quantized(format)), default=0) < OUT * IN


@pytest.mark.parametrize("format", ["nf4", "nf4-dq", "fp4", "fp4-dq"])
def test_a_state_dict_is_that_of_bitsandbytes(format):
    linear = quantized(format)
    state = linear.state_dict()
    assert state["weight"].shape == (OUT * IN // 2, 1)
    parts = {k.removeprefix("weight."): v for k, v in state.items() if k.startswith("weight.")}
    theirs = bnb.QuantState.from_dict(dict(parts), torch.device("cpu"))
    assert torch.equal(bnb.dequantize_4bit(state["weight"], theirs), linear.dequantized())


@pytest.mark.parametrize("format", FORMATS)
def test_a_state_dict_goes_out_and_back(format):
    linear = quantized(format)
    state = linear.state_dict()
    torch.manual_seed(1)
    other = QuantizedLinear.from_weight(torch.randn(OUT, IN), torch.zeros(OUT), format)
    assert not torch.equal(other.dequantized(), linear.dequantized())
    other.load_state_dict(state)
    assert torch.equal(other.dequantized(), linear.dequantized())
    assert torch.equal(other.get_parameter("bias"), linear.get_parameter("bias"))


def test_a_state_dict_that_does_not_fit_says_so():
    linear = quantized(bias=False)
    state = linear.state_dict()
    wrong = QuantizedLinear.from_weight(torch.randn(OUT, IN + 2), None, "nf4")
    with pytest.raises(RuntimeError, match=r"weight has shape \(40, 128\), expected \(40, 130\)"):
        wrong.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight\.other"):
        linear.load_state_dict(state | {"weight.other": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        linear.load_state_dict({})
    del state["weight.absmax"]
    with pytest.raises(RuntimeError, match="not a complete NF4 weight"):
        linear.load_state_dict(state)


@pytest.mark.parametrize("format", FORMATS)
def test_a_change_of_dtype_spares_the_scales(format):
    linear = quantized(format)
    before = linear.dequantized(torch.float32)
    linear.to(torch.bfloat16)
    assert torch.equal(linear.dequantized(torch.float32), before)
    assert linear.bias is not None and linear.bias.dtype == torch.bfloat16


def test_bytes_count_the_weight_and_the_bias():
    n = IN * OUT
    assert quantized("nf4", bias=False).bytes == n // 2 + 4 * n // 64
    assert quantized("nf4-dq", bias=False).bytes == n // 2 + n // 64 + 4 + 4
    assert quantized("nf4", bias=True).bytes == n // 2 + 4 * n // 64 + 4 * OUT


def test_only_linears_inside_the_layers_are_replaced():
    stack = Stack()
    expected = [f"layers.{i}.{name}" for i in range(2) for name in ("mixer.o_proj", "head")]
    assert quantize_decoder(stack, "nf4-dq") == expected
    assert all(isinstance(stack.get_submodule(n), QuantizedLinear) for n in expected)
    assert type(stack.lm_head) is Linear and type(stack.embed_tokens) is nn.Embedding
    assert stack.embed_tokens.weight.requires_grad  # what was not replaced is left alone


def test_the_skip_list_adds_to_the_default_and_matches_whole_names():
    stack = Stack()
    assert quantize_decoder(stack, "nf4", skip=("layers.0", "head")) == ["layers.1.mixer.o_proj"]
    assert type(stack.lm_head) is Linear


def test_unknown_formats_and_skips_are_refused_with_what_is_known():
    with pytest.raises(
        ConfigError, match="'nf5' is not known; choose one of nf4, nf4-dq, .*did you mean"
    ):
        quantize_decoder(Stack(), "nf5")
    with pytest.raises(ConfigError, match=r"'o_prj' matches no module; did you mean .*o_proj"):
        quantize_decoder(Stack(), "nf4", skip=("o_prj",))


def test_a_weight_that_is_no_matrix_is_refused():
    with pytest.raises(ShapeError, match="a linear weight is"):
        QuantizedLinear(quantize_4bit(torch.randn(4)))


def test_a_damaged_weight_names_its_fault():
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        QuantizedLinear.from_weight(torch.full((2, 2), float("nan")), None, "nf4")
