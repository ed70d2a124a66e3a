"""Several adapters beside each other: switched, combined, merged and taken out again."""

import pytest
import torch
from peft import PeftModel

from ardor.adapters.combine import Combination, agreed, drop, trim
from ardor.adapters.lora import LoraConfig, add_lora, lora_modules, lora_parameters
from ardor.adapters.peft_save import save_adapter
from ardor.adapters.registry import Adapters
from ardor.errors import ConfigError

pytestmark = [
    # PEFT asks transformers 5 by an old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]

CONFIGS = {
    "one": LoraConfig(r=4, target_modules=("q_proj", "down_proj")),
    "two": LoraConfig(r=4, lora_alpha=6, target_modules=("q_proj", "up_proj")),
    "three": LoraConfig(r=4, lora_alpha=3, target_modules=("down_proj", "up_proj", "q_proj")),
    "rank2": LoraConfig(r=2, target_modules=("q_proj", "down_proj"), use_rslora=True),
    "dora": LoraConfig(r=4, target_modules=("q_proj",), use_dora=True),
}


@pytest.fixture(scope="module")
def files(llama, tmp_path_factory):
    """The directory of each adapter, and the logits of a model that has nothing but it."""
    found = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        decoder = llama.ours()
        add_lora(decoder, config, names=llama.name, generator=torch.Generator().manual_seed(seed))
        llama.randomise(lora_parameters(decoder), seed)
        directory = tmp_path_factory.mktemp(name)
        save_adapter(directory, decoder, config, disk_names=llama.disk_names, base_model=llama.path)
        found[name] = directory, llama.logits(decoder.eval()).detach()
    return found


@pytest.fixture
def loaded(llama, files):
    decoder = llama.ours()
    adapters = Adapters(decoder, llama.disk_names)
    for name, (directory, _) in files.items():
        adapters.load(directory, name)
    return decoder, adapters


def test_the_adapter_in_use_is_the_only_one_that_acts(llama, files, loaded):
    decoder, adapters = loaded
    base = llama.logits(llama.ours())
    assert [*adapters] == [*CONFIGS] and adapters.active is None
    assert torch.equal(llama.logits(decoder), base)
    for name in ("two", "one", "dora", "rank2", "two"):
        adapters.use(name)
        assert torch.equal(llama.logits(decoder), files[name][1])
    with adapters.using(None):
        assert torch.equal(llama.logits(decoder), base)
    assert adapters.active == "two" and torch.equal(llama.logits(decoder), files["two"][1])
    adapters.remove("two")
    assert torch.equal(llama.logits(decoder), base) and "two" not in [*adapters]


def test_names_are_looked_up_and_not_taken_twice(loaded, files):
    _, adapters = loaded
    with pytest.raises(ConfigError, match="there is no adapter 'onee'; did you mean 'one'?"):
        adapters.use("onee")
    with pytest.raises(ConfigError, match="there is an adapter 'one' already"):
        adapters.load(files["one"][0], "one")
    with pytest.raises(ConfigError, match="there is an adapter 'one' already"):
        adapters.combine("one", {"two": 1.0})


def test_a_request_under_way_keeps_its_adapter(loaded):
    _, adapters = loaded
    with adapters.using("one", hold=True):
        adapters.use("one")
        with pytest.raises(ConfigError, match="a stream with adapter 'one' has not been read"):
            adapters.use("two")
    adapters.use("two")


def test_merging_and_unmerging_is_exact(llama, files, loaded):
    decoder, adapters = loaded
    for name in ("one", "dora"):
        adapters.use(name)
        adapters.merge()
        merged = llama.logits(decoder)
        torch.testing.assert_close(merged, files[name][1], rtol=1e-4, atol=1e-4)
        with pytest.raises(ConfigError, match="is merged into the weights; unmerge it first"):
            adapters.use(None)
        adapters.unmerge()
        assert torch.equal(llama.logits(decoder), files[name][1])
        adapters.use(None)
        assert torch.equal(llama.logits(decoder), llama.logits(llama.ours()))
    with pytest.raises(ConfigError, match="no adapter is at work"):
        adapters.merge()
    with pytest.raises(ConfigError, match="nothing is merged"):
        adapters.unmerge()


SUMS = {
    "cat": {},
    "linear": {},
    "svd": {},
    **{how: {"density": 0.6} for how in ("ties", "ties_svd", "magnitude_prune")},
    "magnitude_prune_svd": {"density": 0.25},
    # Nothing is left to chance at 1.
    **{f"dare_{how}": {"density": 1.0} for how in ("linear", "ties", "linear_svd", "ties_svd")},
}
SUMS = {how: (how, settings) for how, settings in SUMS.items()}
for how in ("ties", "ties_svd"):
    SUMS[f"{how}, by count"] = how, {"density": 0.3, "majority_sign_method": "frequency"}


@pytest.mark.filterwarnings("ignore:The density 1.0 is greater than or equal to 1")
@pytest.mark.parametrize(("how", "settings"), SUMS.values(), ids=SUMS)
def test_combined_is_what_peft_combines(llama, files, loaded, how, settings):
    decoder, adapters = loaded
    names = ("one", "two", "three")
    weights = [0.7, -0.4, 1.3]
    model = PeftModel.from_pretrained(llama.theirs(), str(files["one"][0]), adapter_name="one")
    for name in names[1:]:
        model.load_adapter(str(files[name][0]), name)
    model.add_weighted_adapter([*names], weights, "c", combination_type=how, **settings)
    model.set_adapter("c")
    adapters.combine(
        "both", dict(zip(names, weights, strict=True)), Combination(how=how, **settings)
    )
    adapters.use("both")
    for name, module in lora_modules(decoder):
        theirs = model.get_submodule(f"base_model.model.{llama.name(name)}")
        expected = theirs.get_delta_weight("c")
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(module.delta(), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        expected = llama.logits(model.eval())
        torch.testing.assert_close(llama.logits(decoder), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["linear", "ties", "magnitude_prune"])
def test_adapted_embeddings_are_combined_as_peft_does(llama, tmp_path, how):
    """Of the two factors A has the sign of a weight, there too."""
    decoder = llama.ours()
    adapters = Adapters(decoder, llama.disk_names)
    for seed, name in enumerate("ab"):
        one = llama.ours()
        config = LoraConfig(r=3, target_modules=("embed_tokens",))
        add_lora(one, config, names=llama.name)
        llama.randomise(lora_parameters(one), seed)
        home = tmp_path / name
        save_adapter(home, one, config, disk_names=llama.disk_names, base_model=llama.path)
        adapters.load(home, name)
    model = PeftModel.from_pretrained(llama.theirs(), str(tmp_path / "a"), adapter_name="a")
    model.load_adapter(str(tmp_path / "b"), "b")
    density = {} if how == "linear" else {"density": 0.5}
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "c", combination_type=how, **density)
    model.set_adapter("c")
    adapters.combine("c", {"a": 0.7, "b": -0.4}, Combination(how=how, **density))
    adapters.use("c")
    theirs = model.get_submodule("base_model.model.model.embed_tokens")
    torch.testing.assert_close(
        decoder.embed_tokens.delta(), theirs.get_delta_weight("c"), rtol=1e-5, atol=1e-5
    )


def test_dare_keeps_its_share_and_the_expectation():
    stack = 1 + torch.rand(2, 400, 250, generator=torch.Generator().manual_seed(0))
    for density in (0.1, 0.5):
        kept = drop(stack, density, torch.Generator().manual_seed(1))
        share = (kept != 0).float().mean()
        assert abs(share - density) < 5 * (density / stack.numel()) ** 0.5  # five deviations
        assert torch.equal(kept[kept != 0], (stack / density)[kept != 0])
        assert abs(kept.mean() / stack.mean() - 1) < 5 / (density * stack.numel()) ** 0.5
        assert not torch.equal(kept[0] != 0, kept[1] != 0)  # each adapter loses others


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_a_seed_says_what_dare_drops(loaded, how):
    decoder, adapters = loaded
    weights = {"one": 1.0, "two": 0.5}

    def change(name, seed):
        adapters.combine(name, weights, Combination(how=how, density=0.5, seed=seed))
        with adapters.using(name):
            return [module.delta() for _, module in lora_modules(decoder)]

    first, again, other = change("a", 3), change("b", 3), change("c", 4)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(first, other, strict=True))


def test_signs_are_elected_by_sum_or_count_and_the_mean_is_of_those_who_agree():
    stack = torch.tensor([[3.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [-1.0, 0.0, -2.0]])
    weights = torch.tensor([1.0, 2.0, 3.0])
    # By sum: +, + (of 0), -. By count: -, + (of 0), -.
    assert agreed(stack, weights, "total").tolist() == [3.0, 2.0, -6.0]
    assert agreed(stack, weights, "frequency").tolist() == [-2.5, 2.0, -6.0]


def test_each_expert_is_trimmed_by_itself():
    stack = torch.tensor([[[[1.0, 2.0, -3.0, 4.0]], [[50.0, 60.0, 70.0, -80.0]]]])
    assert trim(stack, 0.5).tolist() == [[[[0, 0, -3.0, 4.0]], [[0, 0, 70.0, -80.0]]]]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"how": "tie"},
            "how='tie' is not known; choose one of cat, linear, svd, magnitude_prune, ties",
        ),
        ({"how": "ties"}, "how='ties' keeps a share of each adapter: give a density"),
        ({"how": "ties", "density": 0.0}, r"density=0 is no share above 0 and up to 1"),
        ({"how": "dare_linear", "density": 1.5}, r"density=1.5 is no share above 0"),
        ({"how": "cat", "density": 0.5}, "density=0.5 is for ties, dare and magnitude_prune"),
        (
            {"how": "ties", "density": 0.5, "majority_sign_method": "sum"},
            "majority_sign_method='sum' is not known; choose one of total, frequency",
        ),
        (
            {"how": "dare_linear", "density": 0.5, "majority_sign_method": "frequency"},
            "majority_sign_method is for ties; how='dare_linear' elects no signs",
        ),
        ({"how": "ties", "density": 0.5, "rank": 3}, "rank=3 is for svd and ways that end in _svd"),
        ({"how": "svd", "rank": 0}, "rank=0 is for svd and ways that end in _svd, 1 or more"),
    ],
)
def test_settings_that_make_no_sum_are_refused(loaded, settings, told):
    _, adapters = loaded
    with pytest.raises(ConfigError, match=told):
        adapters.combine("x", {"one": 1.0, "two": 1.0}, Combination(**settings))
    assert "x" not in [*adapters]


def test_cat_is_the_weighted_sum_of_the_changes_also_of_unlike_ranks(loaded):
    decoder, adapters = loaded
    name = "layers.1.mixer.q_proj"

    def change(adapter):
        with adapters.using(adapter):
            return decoder.get_submodule(name).delta()

    expected = 2 * change("one") - 0.5 * change("rank2")
    adapters.combine("both", {"one": 2.0, "rank2": -0.5})
    torch.testing.assert_close(change("both"), expected)
    adapters.combine("near", {"one": 2.0, "rank2": -0.5}, Combination(how="svd", rank=6))
    torch.testing.assert_close(change("near"), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_added_is_refused(llama, loaded, tmp_path):
    _, adapters = loaded
    decoder, config = llama.ours(), LoraConfig(r=4, target_modules=("q_proj",), lora_bias=True)
    add_lora(decoder, config, names=llama.name)
    save_adapter(tmp_path, decoder, config, disk_names=llama.disk_names, base_model=llama.path)
    adapters.load(tmp_path, "biased")
    with pytest.raises(ConfigError, match=r"product of A and B \(lora_bias\)"):
        adapters.combine("x", {"one": 1.0, "biased": 1.0})
    with pytest.raises(ConfigError, match=r"their ranks at .*q_proj are \[4, 2\]; use 'cat'"):
        adapters.combine("x", {"one": 1.0, "rank2": 1.0}, Combination(how="linear"))
    with pytest.raises(ConfigError, match=r"how='ties' adds A to A, but their ranks .* in _svd"):
        adapters.combine("x", {"one": 1.0, "rank2": 1.0}, Combination(how="ties", density=0.5))
    for how, density in (("cat", None), ("ties", 0.5), ("dare_linear_svd", 0.5)):
        with pytest.raises(ConfigError, match=r"product of A and B \(DoRA\)"):
            adapters.combine("x", {"one": 1.0, "dora": 1.0}, Combination(how=how, density=density))
    with pytest.raises(ConfigError, match="there is nothing to combine"):
        adapters.combine("x", {})
    with pytest.raises(ConfigError, match="there is no adapter 'four'"):
        adapters.combine("x", {"four": 1.0})
    assert "x" not in [*adapters]
