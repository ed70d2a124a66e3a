"""docs/FAMILIES.md is what the registry and the parity cases say."""

import inspect
from dataclasses import replace

import pytest

from ardor.arch.spec import Attention, Decoder, Layer, LinearScaling, Mlp, Norm, Rope
from ardor.families import FAMILIES

from ..parity import docs, test_families
from ..parity.cases import CASES


def test_the_committed_file_is_the_one_that_is_written():
    found = docs.DOC.read_text(encoding="utf-8")
    assert found == docs.document(), "run `make docs` and commit docs/FAMILIES.md"


@pytest.mark.parametrize("name", docs.PUBLISHED)
def test_a_family_names_its_models_and_has_cases_of_its_own(name):
    family = FAMILIES[name]
    assert family.models, f"give {family.model_type} its published models"
    assert family.unlike or name == "llama", f"say in what {family.model_type} is not plain Llama"
    held = {case.model_type for case in CASES.values()} | {*docs.KEYS}
    assert family.model_type in held


def test_every_check_of_a_case_has_a_letter():
    tests = {
        name
        for name, test in inspect.getmembers(test_families, inspect.isfunction)
        if name.startswith("test") and "case" in inspect.signature(test).parameters
    }
    assert tests == {name for _, name in docs.CHECKS.values()}


def test_knobs_are_what_a_spec_changes():
    norm = Norm(eps=1e-5)
    mixer = Attention(heads=2, kv_heads=2, head_width=4, scale=1.0, rope=Rope(theta=1.0, rotated=4))
    layer = Layer(mixer=mixer, ffn=Mlp(width=3, act="silu"), norm=norm)
    plain = Decoder(vocab=5, width=8, layers=(layer,) * 2, norm=norm, tied=False, max_positions=9)
    assert {*docs.knobs(plain)} == set()
    rope = Rope(theta=1.0, rotated=2, scaling=LinearScaling(factor=2.0))
    other = replace(layer, mixer=replace(mixer, kv_heads=1, window=3, rope=rope), placement="post")
    ffn = Mlp(width=3, act="gelu", gated=False, bias=True)
    spec = replace(plain, layers=(layer, replace(other, ffn=ffn)), tied=True, logit_softcap=3.0)
    assert {*docs.knobs(spec)} == {
        *("tied", "layers differ", "logit_softcap", "placement=post", "kv_heads", "window"),
        *("Rope.rotated", "LinearScaling", "act=gelu", "Mlp.gated=False", "Mlp.bias"),
    }
