"""Which modules a config means: PEFT's answer, on random names and patterns."""

import random

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ardor.adapters.config import LoraConfig
from ardor.adapters.lora import add_lora, select
from ardor.arch.linear import Linear
from ardor.errors import ConfigError

LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OWNERS = ("self_attn", "mlp", "block", "mlp.experts.3", "cross")


def tree(seed):
    """Names of linears in layers, theirs by ours."""
    chosen = random.Random(seed)
    theirs = {}
    stem = chosen.choice(["model.layers", "transformer.h", "model.language_model.layers"])
    for layer in range(12):
        for place in range(chosen.randint(1, 4)):
            name = f"{stem}.{layer}.{chosen.choice(OWNERS)}.{chosen.choice(LEAVES)}"
            if name not in theirs.values():
                theirs[f"layers.{layer}.x{place}"] = name
    return theirs


def patterns(seed, names):
    """Settings that may or may not match."""
    chosen = random.Random(seed)
    pool = [*LEAVES, *(f"{o}.{leaf}" for o in OWNERS for leaf in LEAVES), *names, "proj", "attn"]
    settings = {"target_modules": chosen.sample(pool, chosen.randint(1, 5))}
    if chosen.random() < 0.3:
        settings["target_modules"] = chosen.choice(
            [r".*_proj", r".*\.1\..*", rf".*({'|'.join(chosen.sample(LEAVES, 2))})", r".*mlp.*"]
        )
    elif chosen.random() < 0.5:
        settings["layers_to_transform"] = chosen.sample(range(14), 3)
        if chosen.random() < 0.5:
            settings["layers_pattern"] = chosen.sample(["layers", "h", "experts", "blocks"], 2)
    if chosen.random() < 0.4:
        settings["exclude_modules"] = chosen.choice(
            [chosen.sample(pool, 2), r".*\.(2|3)\..*", r".*down.*"]
        )
    if chosen.random() < 0.2:
        settings["modules_to_save"] = [chosen.choice(["mlp", "q_proj", "cross"])]
    return settings


@pytest.mark.parametrize("seed", range(20))
def test_names_are_chosen_as_peft_chooses_them(seed):
    names = [*tree(seed).values()]
    for other in range(30):
        settings = patterns(1000 * seed + other, names)
        theirs = PeftConfig(**settings)
        ours = LoraConfig(**{k: v if isinstance(v, str) else tuple(v) for k, v in settings.items()})
        expected = [n for n in names if bool(check_target_module_exists(theirs, n))]
        # Where PEFT excludes, it answers with an object of its own.
        expected = [n for n in expected if not ours.excludes(n)]
        assert [n for n in names if ours.targets(n)] == expected, settings


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"0": nn.ModuleDict({"a": Linear(8, 8), "gate": Linear(8, 1)})})
        self.lm_head = Linear(8, 9)


def test_all_linear_leaves_out_the_head_and_gates_of_one_output():
    assert select(Holder(), LoraConfig(r=2), str) == ("layers.0.a",)
    assert select(Holder(), LoraConfig(r=1, target_modules=("gate",)), str) == ("layers.0.gate",)


def test_what_matches_nothing_lists_what_there_is():
    with pytest.raises(ConfigError, match=r"regular expression for whole names matches no linear"):
        add_lora(Holder(), LoraConfig(r=2, target_modules=r"a.*b"))
    with pytest.raises(
        ConfigError, match=r"layers_to_transform=\[7\] and exclude_modules leave non"
    ):
        add_lora(Holder(), LoraConfig(r=2, target_modules=("a",), layers_to_transform=(7,)))
    with pytest.raises(
        ConfigError, match=r"modules_to_save: 'lm_hed' matches no module .* lm_head"
    ):
        add_lora(Holder(), LoraConfig(r=2, modules_to_save=("lm_hed",)))
    for wrong in (("b",), "layers.*b"):  # a word that leaves nothing out is a mistake
        with pytest.raises(ConfigError, match=r"exclude_modules: '.*b' matches no .* there are a"):
            add_lora(Holder(), LoraConfig(r=2, exclude_modules=wrong))
    assert select(Holder(), LoraConfig(r=2, exclude_modules=("lm_head",)), str) == ("layers.0.a",)
    with pytest.raises(ConfigError, match="exclude_modules leave none of them"):
        add_lora(Holder(), LoraConfig(r=2, target_modules=("a",), exclude_modules=("a",)))


def test_the_first_pattern_that_matches_gives_rank_and_alpha():
    config = LoraConfig(
        r=2, target_modules=("a", "gate"), rank_pattern={"0.a": 3, "a": 4}, alpha_pattern={"a": 7}
    )
    assert config.rank(["layers.0.a"]) == 3 and config.rank(["layers.1.a"]) == 4
    assert config.rank(["layers.0.b"]) == 2 and config.alpha(["x.a"]) == 7
    assert config.rank(["layers.0.ba"]) == 2  # whole parts only


def test_nothing_depends_on_torch_state():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    add_lora(Holder(), LoraConfig(r=2), generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
