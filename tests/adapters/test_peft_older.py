"""Adapters of experts, routers and renamed modules, as PEFT makes them now and made them once."""

import json

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ardor
from ardor.adapters.embedding import SavedModule
from ardor.adapters.lora import LoraConfig, add_lora, lora_modules, lora_parameters
from ardor.adapters.peft_layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ardor.errors import CheckpointError
from ardor.families import family_of
from ardor.families.hf_config import HFConfig

from ..parity.cases import CASES
from ..parity.peer import Case, logits, peer, saved, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]
SIZES = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MIXTRAL = Case("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, sizes=SIZES)
QWEN = Case(
    "qwen3_moe",
    {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "head_dim": 6},
    sizes=SIZES,
)
WIDER = SIZES | {"hidden_size": 64}  # for rotations of a part of each head
NEOX = Case("gpt_neox", sizes={k: v for k, v in WIDER.items() if k != "num_key_value_heads"})
MOES = {"mixtral": MIXTRAL, "qwen3_moe": QWEN}


def theirs(base):
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def ours(base, adapter=None):
    return ardor.load(base, adapter=adapter, dtype="float32")


def trained(base, folder, **settings):
    """The logits of an adapter made and saved by PEFT."""
    model = get_peft_model(theirs(base), PeftConfig(**{"r": 4, "lora_alpha": 6, **settings}))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.eval().save_pretrained(str(folder))
    return logits(model, tokens())


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.sweep
@pytest.mark.parametrize("name", CASES)
def test_every_module_that_adapters_can_name_is_one_of_transformers(name):
    case = CASES[name]
    raw = case.config().to_dict()
    family = family_of(raw, path="config.json")
    places = family.disk_linears(family.spec(HFConfig(raw, path="config.json")))
    with torch.device("meta"):
        modules = {n for n, _ in case.auto.from_config(case.config()).named_modules()}
    assert {place.name for place in places.values() if not place.experts} <= modules


@pytest.mark.parametrize("case", MOES.values(), ids=MOES)
def test_all_linear_of_peft_takes_routers_and_we_compute_the_same(case, tmp_path):
    base = saved(peer(case), tmp_path / "base")
    plain = ours(base).logits(tokens())
    expected = trained(base, tmp_path / "a", target_modules="all-linear")
    assert (expected - plain).abs().max() > 0.1
    assert (
        "gate.weight"
        in json.loads((tmp_path / "a" / ADAPTER_CONFIG).read_text())["target_parameters"]
    )
    lm = ours(base, tmp_path / "a")
    close(lm.logits(tokens()), expected)
    assert isinstance(lm.model.decoder.layers[0].ffn.router, SavedModule)
    lm.save(tmp_path / "again")  # the router as a module in full, which PEFT reads
    close(
        logits(PeftModel.from_pretrained(theirs(base), str(tmp_path / "again")), tokens()), expected
    )
    close(ours(base, tmp_path / "again").logits(tokens()), expected)
    lm.merge()
    close(lm.logits(tokens()), expected)


LEAVES = {
    "mixtral": ("block_sparse_moe.experts.{}.{}", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp.experts.{}.{}", ("gate_proj", "up_proj", "down_proj")),
}


def as_before(kind, folder, lm, *, parts=(0, 1, 2), gone=(), alphas=None):
    """The adapter of `lm` as PEFT wrote it when each expert was a module."""
    place, leaves = LEAVES[kind]
    tensors = {}
    for name, module in lm.model.decoder.named_modules():
        if name.endswith(("experts.gate_proj", "experts.up_proj", "experts.down_proj")):
            part = ("gate_proj", "up_proj", "down_proj").index(name.rpartition(".")[2])
            for expert in range(4) if part in parts else ():
                stem = f"base_model.model.model.layers.{name.split('.')[1]}."
                stem += place.format(expert, leaves[part])
                if expert not in gone:
                    tensors[f"{stem}.lora_A.weight"] = module.lora_A[expert].detach().clone()
                    tensors[f"{stem}.lora_B.weight"] = module.lora_B[expert].detach().clone()
    folder.mkdir()
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 6,
        "target_modules": [leaves[part] for part in parts],
        "alpha_pattern": alphas or {},
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    return folder


def adapted(base, targets, alphas=None):
    lm = ours(base)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, alpha_pattern=alphas or {})
    add_lora(lm.model.decoder, config, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in lora_parameters(lm.model.decoder):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    lm.model.adapter = config
    return lm


PARTS = ("experts.gate_proj", "experts.up_proj", "experts.down_proj")


@pytest.mark.parametrize("parts", [(0, 1, 2), (2,), (0, 1), (1,)], ids=str)
@pytest.mark.parametrize("kind", MOES)
def test_adapters_of_experts_that_were_modules_are_those_of_the_parameter(kind, parts, tmp_path):
    base = saved(peer(MOES[kind]), tmp_path / "base")
    lm = adapted(base, tuple(PARTS[part] for part in parts))
    expected = lm.logits(tokens())
    assert (expected - ours(base).logits(tokens())).abs().max() > 0.1
    folder = as_before(kind, tmp_path / "old", lm, parts=parts)
    found = ours(base, folder)
    close(found.logits(tokens()), expected)
    if 2 in parts:  # without it PEFT 0.21 looks for the others where they would be beside it
        close(logits(PeftModel.from_pretrained(theirs(base), str(folder)), tokens()), expected)
    if parts == (0, 1, 2):  # they come apart again into what they were
        for (_, one), (_, two) in zip(
            lora_modules(found.model.decoder), lora_modules(lm.model.decoder), strict=True
        ):
            assert torch.equal(one.lora_A, two.lora_A) and torch.equal(one.lora_B, two.lora_B)
            assert (one.r, one.alpha) == (two.r, two.alpha)
    found.save(tmp_path / "new")
    close(
        logits(PeftModel.from_pretrained(theirs(base), str(tmp_path / "new")), tokens()), expected
    )


def test_maps_of_unlike_scales_are_joined_at_their_scales(tmp_path):
    base = saved(peer(MIXTRAL), tmp_path / "base")
    lm = adapted(base, PARTS, {"experts.up_proj": 11, "experts.down_proj": 2})
    expected = lm.logits(tokens())
    folder = as_before("mixtral", tmp_path / "old", lm, alphas={"w3": 11, "w2": 2})
    close(ours(base, folder).logits(tokens()), expected)


def test_experts_of_which_some_have_none_are_refused(tmp_path):
    base = saved(peer(MIXTRAL), tmp_path / "base")
    folder = as_before("mixtral", tmp_path / "old", adapted(base, PARTS), gone=(2,))
    with pytest.raises(
        CheckpointError, match=r"3 of the 4 experts beside .*w[123] have an adapter"
    ):
        ours(base, folder)
    folder = as_before(
        "mixtral", tmp_path / "unlike", adapted(base, PARTS), alphas={r"experts\.2\.w1": 9}
    )
    with pytest.raises(CheckpointError, match="4 of the 4 experts .* of 2 ranks or alphas"):
        ours(base, folder)


def test_experts_that_the_base_has_not_are_named(tmp_path):
    folder = as_before(
        "mixtral", tmp_path / "old", adapted(saved(peer(MIXTRAL), tmp_path / "base"), PARTS)
    )
    other = saved(peer(Case("llama", sizes=SIZES)), tmp_path / "dense")
    config = json.loads((folder / ADAPTER_CONFIG).read_text()) | {"target_modules": ["q_proj"]}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    for layer in (0, 1):
        key = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
        tensors |= {f"{key}A.weight": torch.ones(4, 24), f"{key}B.weight": torch.ones(24, 4)}
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    with pytest.raises(CheckpointError, match=r"no place: .*block_sparse_moe\.experts"):
        ours(other, folder)


@pytest.mark.parametrize("bias", ["with", "without"])
def test_an_adapted_head_may_have_a_bias(bias, tmp_path):
    case = Case("phi", sizes=WIDER) if bias == "with" else Case("llama", sizes=SIZES)
    base = saved(peer(case), tmp_path / "base")
    expected = trained(base, tmp_path / "a", target_modules=["q_proj", "lm_head"])
    lm = ours(base, tmp_path / "a")
    close(lm.logits(tokens()), expected)
    lm.merge()
    close(lm.logits(tokens()), expected)


@pytest.mark.parametrize("settings", [{"target_modules": ["embed_out"]}, {}], ids=["lora", "full"])
def test_a_module_that_was_renamed_is_found_by_its_older_name(settings, tmp_path):
    base = saved(peer(NEOX), tmp_path / "base")
    now = {"target_modules": ["query_key_value", "lm_head"]}
    if not settings:
        now = {"target_modules": ["query_key_value"], "modules_to_save": ["lm_head"]}
    expected = trained(base, tmp_path / "a", **now)
    close(ours(base, tmp_path / "a").logits(tokens()), expected)
    weights, config = tmp_path / "a" / ADAPTER_WEIGHTS, tmp_path / "a" / ADAPTER_CONFIG
    before = {k.replace(".lm_head.", ".embed_out."): v for k, v in load_file(weights).items()}
    assert any("embed_out" in key for key in before)
    save_file(before, weights)
    config.write_text(config.read_text().replace('"lm_head"', '"embed_out"'))
    lm = ours(base, tmp_path / "a")
    close(lm.logits(tokens()), expected)
    lm.save(tmp_path / "now")
    close(
        logits(PeftModel.from_pretrained(theirs(base), str(tmp_path / "now")), tokens()), expected
    )
