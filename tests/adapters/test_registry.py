"""Several adapters beside each other: switched, combined, merged and taken out again."""

import pytest
import torch
from peft import PeftModel

from ardor.adapters.lora import LoraConfig, add_lora, lora_parameters
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


@pytest.mark.parametrize(
    ("how", "names"), [("cat", ("one", "two")), ("svd", ("one", "two")), ("linear", ("one", "two"))]
)
def test_combined_is_what_peft_combines(llama, files, loaded, how, names):
    decoder, adapters = loaded
    weights = [0.7, -0.4]
    model = PeftModel.from_pretrained(llama.theirs(), str(files[names[0]][0]), adapter_name="a")
    model.load_adapter(str(files[names[1]][0]), "b")
    model.add_weighted_adapter(["a", "b"], weights, "c", combination_type=how)
    model.set_adapter("c")
    adapters.combine("both", dict(zip(names, weights, strict=True)), how=how)
    adapters.use("both")
    with torch.no_grad():
        expected = llama.logits(model.eval())
        torch.testing.assert_close(llama.logits(decoder), expected, rtol=1e-4, atol=1e-4)


def test_cat_is_the_weighted_sum_of_the_changes_also_of_unlike_ranks(loaded):
    decoder, adapters = loaded
    name = "layers.1.mixer.q_proj"

    def change(adapter):
        with adapters.using(adapter):
            return decoder.get_submodule(name).delta()

    expected = 2 * change("one") - 0.5 * change("rank2")
    adapters.combine("both", {"one": 2.0, "rank2": -0.5})
    torch.testing.assert_close(change("both"), expected)
    adapters.combine("near", {"one": 2.0, "rank2": -0.5}, how="svd", rank=6)
    torch.testing.assert_close(change("near"), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_added_is_refused(loaded):
    _, adapters = loaded
    with pytest.raises(ConfigError, match=r"their ranks at .*q_proj are \[4, 2\]; use 'cat'"):
        adapters.combine("x", {"one": 1.0, "rank2": 1.0}, how="linear")
    with pytest.raises(ConfigError, match="LoraLinear with DoRA"):
        adapters.combine("x", {"one": 1.0, "dora": 1.0})
    with pytest.raises(ConfigError, match="there is nothing to combine"):
        adapters.combine("x", {})
    with pytest.raises(ConfigError, match="there is no adapter 'three'"):
        adapters.combine("x", {"three": 1.0})
    assert "x" not in [*adapters]
