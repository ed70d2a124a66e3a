"""The backends that need hardware or packages: what can be shown of them without."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ardor.arch import attention, flash
from ardor.arch import spec as specs
from ardor.arch.attention import attend, backend_for, eager
from ardor.arch.decoder import Decoder
from ardor.arch.flash import flash_attention_2
from ardor.arch.flex import flex
from ardor.arch.layout import Reach
from ardor.errors import ConfigError

from .test_blocked import LAYOUTS, SCORES, tensors

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


FLEX = """
import sys, warnings
import torch
from tests.arch.test_blocked import LAYOUTS, SCORES, tensors
from ardor.arch.attention import eager
from ardor.arch.flex import flex
warnings.simplefilter("ignore")  # that it is not compiled here
for layout, scores in (pair.split("/") for pair in sys.argv[1:]):
    q, k, v, sink = tensors(LAYOUTS[layout], torch.float32)
    for sinks in (None, sink):
        given = (q, k, v, LAYOUTS[layout], SCORES[scores], sinks)
        found, expected = flex(*given), eager(*given)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        print(layout, scores)
"""
EVERY = [f"{layout}/{scores}" for layout in LAYOUTS for scores in SCORES]


@pytest.mark.parametrize(
    "pairs",
    [
        pytest.param(["many/all", "uneven/window", "uneven/coarse alibi"], id="some"),
        pytest.param(EVERY, id="every", marks=pytest.mark.slow),
    ],
)
@pytest.mark.sweep
def test_flex_equals_the_reference(pairs):
    """In a process of its own: PyTorch traces the code, and cannot trace our checks of types."""
    command = [sys.executable, "-c", FLEX, *pairs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 * len(pairs)


def test_flex_says_that_it_cannot_train_on_a_cpu():
    q, k, v, _ = tensors(LAYOUTS["whole"], torch.float32)
    with pytest.raises(ConfigError, match="no backward pass on a CPU; train there with sdpa"):
        flex(q.requires_grad_(), k, v, LAYOUTS["whole"], SCORES["plain"])


@pytest.fixture
def package(monkeypatch):
    """A stand-in with the package's signatures, documents and all, from the reference."""

    def within(q, k, v, lengths, new, how):
        window = how["window_size"][0] + 1 or None
        query = lengths - new + torch.arange(new)[:, None]
        key = torch.arange(k.shape[0])
        bias = None
        if how["alibi_slopes"] is not None:
            bias = (how["alibi_slopes"][:, None, None] * (key - query))[None]
        q, k, v = (x.transpose(0, 1)[None].float() for x in (q, k, v))
        allowed = Reach(window).mask(query, key)[None, None]
        capped = how["softcap"] or None
        out = attend(q, k, v, allowed, scale=how["softmax_scale"], softcap=capped, bias=bias)
        return out[0].transpose(0, 1)

    def varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, **how):
        assert how["causal"] and torch.equal(starts_q, starts_k) and starts_q.dtype == torch.int32
        assert longest_q == longest_k == int(starts_q.diff().max())
        pieces = zip(*(x.split(starts_q.diff().tolist()) for x in (q, k, v)), strict=True)
        return torch.cat([within(*p, len(p[0]), len(p[0]), how) for p in pieces]).to(q.dtype)

    def kvcache(q, k, v, *, cache_seqlens, **how):
        rows = zip(q, k, v, cache_seqlens.tolist(), strict=True)
        outs = [
            within(*(x[:n] if x is not a else x for x in (a, b, c)), n, len(a), how)
            for a, b, c, n in rows
        ]
        return torch.stack(outs).to(q.dtype)

    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func, module.flash_attn_with_kvcache = varlen, kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", ["plain", "window", "softcap", "alibi"])
def test_what_is_handed_to_flash_attention_means_the_same(name, layout, package):
    q, k, v, _ = (x.bfloat16() for x in tensors(layout))
    v = v[..., :4]
    found = flash_attention_2(q, k, v, layout, SCORES[name])
    torch.testing.assert_close(found, eager(q, k, v, layout, SCORES[name]), rtol=0.02, atol=0.02)


def test_what_flash_attention_lacks_is_refused_with_the_remedy():
    layout = LAYOUTS["whole"]
    q, k, v, sinks = (x.bfloat16() for x in tensors(layout))
    for scores, given, what in (
        (SCORES["plain"], sinks, "attention sinks"),
        (SCORES["chunk"], None, "chunks"),
        (SCORES["coarse alibi"], None, "the rounding of ALiBi"),
    ):
        with pytest.raises(ConfigError, match=f"cannot do {what}; use attn_implementation='sdpa'"):
            flash_attention_2(q, k, v, layout, scores, given)
    with pytest.raises(ConfigError, match=r"torch\.float32 \(load with dtype='bfloat16'\)"):
        flash_attention_2(q.float(), k, v, layout, SCORES["plain"])


def test_a_backend_is_chosen_by_what_is_there(monkeypatch):
    assert backend_for("eager", CPU) == ("eager", "as asked")
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU, and the device is cpu; use 'sdpa'"):
        backend_for("flash_attention_2", CPU)
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert flash.why_not(cuda) == "Tesla T4 is older than Ampere"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash, "find_spec", lambda name: None)
    assert flash.why_not(cuda) == "the flash-attn package is not installed"
    monkeypatch.setattr(flash, "find_spec", lambda name: object())
    assert flash.why_not(cuda) is None
    assert backend_for("flash_attention_2", cuda).name == "flash_attention_2"


def spec_of(**keys) -> specs.Decoder:
    plain = specs.Attention(heads=2, kv_heads=1, head_width=8, scale=1.0, rope=None)
    norm = specs.Norm(eps=1e-5)
    first = specs.Layer(mixer=plain, ffn=specs.Mlp(width=8, act="silu"), norm=norm)
    layers = (first, replace(first, mixer=replace(plain, **keys)))
    return specs.Decoder(vocab=9, width=16, layers=layers, norm=norm, tied=True, max_positions=9)


@pytest.mark.parametrize(
    ("device", "installed", "compute", "keys", "name", "why"),
    [
        ("cpu", True, torch.bfloat16, {}, "sdpa", "a CPU"),
        ("cuda", False, torch.bfloat16, {}, "sdpa", "package is not installed"),
        ("cuda", True, torch.float32, {}, "sdpa", "does not compute in torch.float32"),
        ("cuda", True, torch.bfloat16, {}, "flash_attention_2", "does all that the model needs"),
        ("cuda", True, torch.float16, {"window": 4, "softcap": 9.0}, "flash_attention_2", "all"),
        ("cuda", True, torch.bfloat16, {"sinks": True}, "sdpa", "no attention sinks"),
        ("cuda", True, torch.bfloat16, {"chunk": 4}, "sdpa", "no chunks"),
        ("cuda", True, torch.bfloat16, {"head_width": 512}, "sdpa", "up to 256 wide, and these"),
        ("cuda", True, torch.bfloat16, {"alibi_coarse": True}, "sdpa", "does not round ALiBi"),
    ],
)
def test_the_best_that_is_there_is_chosen_and_says_why(
    monkeypatch, device, installed, compute, keys, name, why
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash, "find_spec", lambda name: object() if installed else None)
    choice = backend_for(None, torch.device(device), spec=spec_of(**keys), compute=compute)
    assert choice.name == name and why in choice.why


def test_latent_attention_and_an_unknown_model_stay_with_sdpa(monkeypatch):
    monkeypatch.setattr(attention, "why_not", lambda device: None)
    cuda = torch.device("cuda")
    assert backend_for(None, cuda, compute=torch.bfloat16).name == "sdpa"
    latent = specs.LatentAttention(
        heads=2,
        query_rank=None,
        kv_rank=4,
        plain_width=4,
        value_width=4,
        scale=1.0,
        rope=specs.Rope(theta=1e4, rotated=4),
        norm=specs.Norm(eps=1e-5),
    )
    spec = spec_of()
    spec = replace(spec, layers=(replace(spec.layers[0], mixer=latent),))
    choice = backend_for(None, cuda, spec=spec, compute=torch.bfloat16)
    assert choice == ("sdpa", flash.lacks(latent))


def test_a_decoder_changes_its_backend_in_every_layer():
    decoder = Decoder(spec_of())
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 2, 3]])
    expected = decoder.logits(decoder.hidden(ids))
    decoder.attend_by("eager", "to see")
    assert (decoder.attn, decoder.attn_why) == ("eager", "to see")
    assert {layer.mixer.backend for layer in decoder.layers} == {"eager"}
    torch.testing.assert_close(decoder.logits(decoder.hidden(ids)), expected)


def test_flex_is_refused_for_training_on_a_cpu_before_any_step():
    with pytest.raises(ConfigError, match="no backward pass on a CPU"):
        backend_for("flex", CPU, trains=True)
    assert (
        backend_for("flex", CPU).name == backend_for("flex", torch.device("cuda"), trains=True).name
    )
