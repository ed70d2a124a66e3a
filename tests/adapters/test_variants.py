"""Every variant and beginning of LoRA computes the same in PEFT, both ways."""

import json

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ardor.adapters.embedding import AdaptedHead, LoraEmbedding, SavedModule
from ardor.adapters.lora import (
    LoraConfig,
    LoraExperts,
    LoraLinear,
    add_lora,
    lora_modules,
    lora_parameters,
)
from ardor.adapters.merge import attach, detach, merge, unmerge
from ardor.adapters.peft_files import load_adapter
from ardor.adapters.peft_layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ardor.adapters.peft_save import save_adapter
from ardor.errors import CheckpointError, ConfigError
from ardor.load import load_model
from ardor.train.reference import begins_as_its_base

TOKENS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(3))

pytestmark = [
    # PEFT asks transformers 5 by an old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    # It looks for the keys of patterns among modules only, and honours those of parameters.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    # A bias has one axis, which PEFT takes for a shard of a matrix.
    pytest.mark.filterwarnings("ignore:Adapter 'default'.* LoRA tensor.*lora_B.bias"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
]


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 10)


def made(pair, config, seed=0):
    decoder = pair.ours()
    add_lora(decoder, config, names=pair.name, generator=torch.Generator().manual_seed(seed))
    return decoder.eval()


def peft_of(pair, directory):
    return PeftModel.from_pretrained(pair.theirs(), str(directory)).eval()


def saved(pair, decoder, config, directory):
    save_adapter(directory, decoder, config, disk_names=pair.disk_names, base_model=pair.path)
    return directory


SOME = ("q_proj", "down_proj", "c_attn", "mlp.c_proj")
VARIANTS = {
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True, "lora_alpha": 5},
    "bias": {"lora_bias": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa-rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "pissa-dora": {"init_lora_weights": "pissa", "use_dora": True},
    "pissa-niter": {"init_lora_weights": "pissa_niter_8"},
    "olora": {"init_lora_weights": "olora", "lora_alpha": 3},
    "patterns": {
        "rank_pattern": {"q_proj|c_attn": 2},
        "alpha_pattern": {"down_proj|mlp.c_proj": 7},
    },
}


def variant(kind, **settings):
    targets = tuple(t for t in SOME if ("c_" in t) == (kind == "gpt2"))
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, **settings})


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_a_fresh_adapter_of_any_variant_changes_nothing(pair, settings):
    before = pair.logits(pair.ours())
    decoder = made(pair, variant(pair.kind, **settings))
    close(pair.logits(decoder), before)
    pair.randomise(lora_parameters(decoder))
    assert (pair.logits(decoder) - before).abs().max() > 0.1


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_peft_computes_the_same_with_ours_of_any_variant(pair, settings, tmp_path):
    config = variant(pair.kind, **settings)
    decoder = made(pair, config)
    pair.randomise(lora_parameters(decoder))
    saved(pair, decoder, config, tmp_path)
    with torch.no_grad():
        model = peft_of(pair, tmp_path)  # on the base as it is on disk, PiSSA and OLoRA too
        close(pair.logits(model), pair.logits(decoder))
    again = pair.ours()
    found = load_adapter(tmp_path, again, disk_names=pair.disk_names)
    assert (found.r, found.lora_alpha, found.use_dora) == (4, config.lora_alpha, config.use_dora)
    close(pair.logits(again.eval()), pair.logits(decoder))
    for one, two in zip(lora_parameters(again), lora_parameters(decoder), strict=True):
        assert torch.equal(one, two)  # so that a run can be resumed
    if config.lora_bias and pair.kind != "gpt2":
        with pytest.raises(ConfigError, match="q_proj was trained with lora_bias, and the map its"):
            merge(again)
        close(pair.logits(again), pair.logits(decoder))  # and the adapter is still there
        return
    merge(again)
    close(pair.logits(again), pair.logits(decoder), 1e-4)


def test_biases_of_parts_of_a_joined_map_travel_under_one_scale(gpt2, tmp_path):
    """PEFT sees one bias of c_attn; a part without an adapter has none of it."""
    config = LoraConfig(
        r=2, target_modules=("q_proj", "v_proj"), alpha_pattern={"v_proj": 7}, lora_bias=True
    )
    decoder = made(gpt2, config)
    fresh = begins_as_its_base(decoder)
    with torch.no_grad():
        for _, module in lora_modules(decoder):
            module.lora_B_bias.normal_(generator=torch.Generator().manual_seed(5))
    assert fresh and not begins_as_its_base(decoder)  # though every B is zero
    gpt2.randomise(lora_parameters(decoder))
    saved(gpt2, decoder, config, tmp_path)
    with torch.no_grad():
        close(gpt2.logits(peft_of(gpt2, tmp_path)), gpt2.logits(decoder))
    other = gpt2.ours()
    load_adapter(tmp_path, other, disk_names=gpt2.disk_names)
    close(gpt2.logits(other.eval()), gpt2.logits(decoder))
    one = made(gpt2, LoraConfig(r=2, target_modules=("q_proj",), lora_bias=True))
    before = str(one)
    with pytest.raises(CheckpointError, match="reaches beyond the adapted"):
        load_adapter(tmp_path, one, disk_names=gpt2.disk_names)
    assert str(one) == before


def test_a_bias_has_no_place_with_dora_nor_in_an_embedding(llama):
    with pytest.raises(ConfigError, match="lora_bias and use_dora do not go together"):
        LoraConfig(lora_bias=True, use_dora=True)
    with pytest.raises(ConfigError, match="lora_bias is for linear maps, and embed_tokens"):
        made(llama, LoraConfig(r=2, target_modules=("embed_tokens",), lora_bias=True))


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_we_compute_the_same_with_theirs_of_any_variant(pair, settings, tmp_path):
    config = {"r": 4, "lora_alpha": 8, "target_modules": variant(pair.kind).target_modules}
    torch.manual_seed(1)
    settings = {"fan_in_fan_out": pair.kind == "gpt2", **settings}
    model = get_peft_model(pair.theirs(), PeftConfig(**config | settings)).eval()
    pair.randomise([p for p in model.parameters() if p.requires_grad])
    model.save_pretrained(str(tmp_path))
    decoder = pair.ours()
    if pair.kind == "gpt2" and settings.get("init_lora_weights") == "olora":
        # PEFT takes the transposed weight for the weight, and its own forward pass fails.
        with pytest.raises(CheckpointError, match="for another base"):
            load_adapter(tmp_path, decoder, disk_names=pair.disk_names)
        return
    if "niter" in str(settings.get("init_lora_weights")):
        with pytest.raises(CheckpointError, match="in a way that cannot be done again"):
            load_adapter(tmp_path, decoder, disk_names=pair.disk_names)
        return
    load_adapter(tmp_path, decoder, disk_names=pair.disk_names)
    with torch.no_grad():
        close(pair.logits(decoder.eval()), pair.logits(model))


def test_pissa_and_olora_begin_at_a_part_of_the_weight(llama):
    base = llama.ours().layers[0].mixer.q_proj.weight
    for kind, exact in (("pissa", True), ("pissa_niter_16", False), ("olora", None)):
        decoder = made(llama, variant("llama", init_lora_weights=kind))
        module = decoder.layers[0].mixer.q_proj
        assert isinstance(module, LoraLinear)
        assert module.delta().abs().max() < 1e-6  # the product is W's
        part = module.scale * module.lora_B @ module.lora_A
        if exact is None:  # Q_r R_r, whatever the scale
            q, r = torch.linalg.qr(base)
            close(part, module.scale * q[:, :4] @ r[:4])
            continue
        u, s, v = torch.linalg.svd(base)
        best = (u[:, :4] * s[:4]) @ v[:4]
        assert (part - best).norm() < (1e-5 if exact else 0.05) * best.norm()


def test_dora_takes_the_norm_for_a_constant(llama):
    decoder = made(llama, variant("llama", use_dora=True))
    llama.randomise(lora_parameters(decoder))
    decoder.train()
    module = decoder.layers[0].mixer.q_proj
    assert isinstance(module, LoraLinear) and module.lora_magnitude_vector is not None
    x = torch.randn(5, 24)
    weight = module.base.get_parameter("weight")
    adapted = weight + module.scale * module.lora_B @ module.lora_A
    norms = adapted.detach().norm(dim=1)
    torch.testing.assert_close(module.norms(), norms)
    expected = x @ adapted.T * (module.lora_magnitude_vector / norms)
    torch.testing.assert_close(module(x), expected)
    own = [module.lora_A, module.lora_B, module.lora_magnitude_vector]
    upstream = torch.randn(5, 24)
    found = torch.autograd.grad(module(x), own, upstream)
    torch.testing.assert_close(found, torch.autograd.grad(expected, own, upstream))


def test_dora_forgets_its_norms_when_its_weights_change(llama):
    decoder = made(llama, variant("llama", use_dora=True))
    before = llama.logits(decoder)
    llama.randomise(lora_parameters(decoder))
    after = llama.logits(decoder)
    assert (after - before).abs().max() > 0.1
    decoder.train()
    for p in lora_parameters(decoder):
        p.data.mul_(0.5)  # counts no version
    trained = llama.logits(decoder)
    assert not torch.equal(trained, after)
    close(llama.logits(decoder.eval()), trained)


@pytest.fixture(scope="session")
def tied(tmp_path_factory):
    from tests.adapters.conftest import _pair

    return _pair("llama-tied", tmp_path_factory)


WHOLE = {
    "embedding": {"target_modules": ("q_proj", "embed_tokens")},
    "embedding-rslora": {"target_modules": ("embed_tokens",), "use_rslora": True},
    "saved": {"target_modules": ("q_proj",), "modules_to_save": ("embed_tokens",)},
    "norms": {"target_modules": ("v_proj",), "modules_to_save": ("input_layernorm", "o_proj")},
}
UNTIED = {
    "head": {"target_modules": ("q_proj", "lm_head")},
    "head-dora": {"target_modules": ("lm_head",), "use_dora": True},
    "saved-head": {"target_modules": ("q_proj",), "modules_to_save": ("lm_head", "embed_tokens")},
}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [*((k, s) for s in WHOLE.values() for k in ("tied", "llama"))]
    + [("llama", s) for s in UNTIED.values()],
)
def test_embeddings_and_heads_travel_both_ways(kind, settings, request, tmp_path):
    pair = request.getfixturevalue(kind)
    config = LoraConfig(r=4, **settings)
    decoder = made(pair, config)
    base = pair.logits(pair.ours())
    close(pair.logits(decoder), base)
    pair.randomise(lora_parameters(decoder))
    logits = pair.logits(decoder)
    assert (logits - base).abs().max() > 0.1
    saved(pair, decoder, config, tmp_path / "ours")
    with torch.no_grad():
        theirs = peft_of(pair, tmp_path / "ours")
        close(pair.logits(theirs), logits)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = pair.ours()
    load_adapter(tmp_path / "theirs", again, disk_names=pair.disk_names)
    close(pair.logits(again.eval()), logits)
    merged = merge(again)
    close(pair.logits(again), logits, 1e-4)
    if kind == "tied":
        assert again.lm_head is None
    unmerge(again, merged)
    close(pair.logits(again), logits)


def test_a_tied_head_follows_an_adapted_embedding_and_teaches_it(tied):
    decoder = made(tied, LoraConfig(r=4, target_modules=("embed_tokens",)))
    tied.randomise(lora_parameters(decoder))
    embedding, head = decoder.embed_tokens, decoder.lm_head
    assert isinstance(embedding, LoraEmbedding) and isinstance(head, AdaptedHead)
    hidden = torch.randn(3, 24)
    own = lora_parameters(decoder)
    expected = hidden @ embedding.weight.T
    close(decoder.head(hidden), expected)
    upstream = torch.randn(3, 61)
    found = torch.autograd.grad(decoder.head(hidden), own, upstream)
    close(found, torch.autograd.grad(expected, own, upstream))


def test_tied_heads_cannot_be_named_alone(tied):
    with pytest.raises(ConfigError, match="this model's head is its embedding; target embed_token"):
        made(tied, LoraConfig(r=4, target_modules=("lm_head",)))
    with pytest.raises(ConfigError, match="this model's head is its embedding; name embed_tokens"):
        made(tied, LoraConfig(r=4, modules_to_save=("lm_head",)))


def test_an_embedding_that_was_trained_apart_from_its_head_is_refused(tied, tmp_path):
    config = LoraConfig(r=4, target_modules=("embed_tokens",))
    saved(tied, made(tied, config), config, tmp_path)
    path = tmp_path / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ensure_weight_tying": False}))
    with pytest.raises(CheckpointError, match="trained one of them apart from the other"):
        load_adapter(tmp_path, tied.ours(), disk_names=tied.disk_names)


def test_modules_in_full_are_float32_copies(llama):
    decoder = made(llama, LoraConfig(r=4, modules_to_save=("lm_head",)))
    head = decoder.lm_head
    assert isinstance(head, SavedModule) and head.weight.dtype == torch.float32
    assert head.weight.requires_grad and not head.base.get_parameter("weight").requires_grad
    assert head.weight.data_ptr() != head.base.get_parameter("weight").data_ptr()


# --- experts ---

EXPERTS = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="session", params=["mixtral", "qwen3_moe"])
def experts(request, tmp_path_factory):
    torch.manual_seed(0)
    if request.param == "mixtral":
        kind = MixtralForCausalLM
        known = {k: v for k, v in EXPERTS.items() if k != "moe_intermediate_size"}
        model = kind(MixtralConfig(**known))
    else:
        kind = Qwen3MoeForCausalLM
        model = kind(Qwen3MoeConfig(**EXPERTS))
    path = str(tmp_path_factory.mktemp(request.param))
    model.save_pretrained(path)
    return kind, path


def loaded(path):
    model = load_model(path, dtype="float32")
    return model.decoder, model.form.disk_linears()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ("q_proj", "experts.down_proj"), "lora_alpha": 4},
        {"target_modules": ("gate_proj",), "use_rslora": True},
        {"target_modules": ("gate_up_proj", "down_proj"), "init_lora_weights": "pissa"},
    ],
    ids=["all-linear", "down", "half", "pissa"],
)
def test_experts_are_adapted_and_travel_both_ways(experts, settings, tmp_path):
    kind, path = experts
    decoder, places = loaded(path)
    config = LoraConfig(**{"r": 4, **settings})
    before = decoder.logits(decoder.hidden(TOKENS))
    names = add_lora(decoder, config, names=lambda n: places[n].name if n in places else n)
    assert any(isinstance(m, LoraExperts) for _, m in lora_modules(decoder))
    assert any("experts" in name for name in names)
    close(decoder.logits(decoder.hidden(TOKENS)), before)
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in lora_parameters(decoder):
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    logits = decoder.logits(decoder.hidden(TOKENS))
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in lora_parameters(decoder))
    assert (logits - before).abs().max() > 0.1
    save_adapter(tmp_path / "ours", decoder, config, disk_names=places, base_model=path)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(kind.from_pretrained(path), str(tmp_path / "ours"))
        close(theirs.eval()(TOKENS).logits, logits.detach())
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again, _ = loaded(path)
    load_adapter(tmp_path / "theirs", again, disk_names=places)
    close(again.logits(again.hidden(TOKENS)).detach(), logits.detach())
    merged = merge(again)
    close(again.logits(again.hidden(TOKENS)), logits.detach(), 1e-4)
    unmerge(again, merged)
    close(again.logits(again.hidden(TOKENS)).detach(), logits.detach())


def test_experts_under_dora_or_a_bias_are_refused_with_what_to_do(experts):
    decoder, _ = loaded(experts[1])
    with pytest.raises(ConfigError, match=r"PEFT has no magnitudes for experts; leave them out"):
        add_lora(decoder, LoraConfig(r=4, use_dora=True))
    with pytest.raises(ConfigError, match=r"PEFT has no biases for experts; leave them out"):
        add_lora(decoder, LoraConfig(r=4, lora_bias=True))
    names = add_lora(
        decoder, LoraConfig(r=4, use_dora=True, exclude_modules=r".*\.experts\..*"), names=str
    )
    assert names and not any("experts" in name for name in names)


# --- selection ---


def test_a_rank_larger_than_the_matrix_is_refused_by_name(llama):
    decoder = llama.ours()
    before = str(decoder)
    message = r"larger than the matrix in 4 of 14 modules: layers.0.mixer.k_proj \(24 x 12, rank 16"
    with pytest.raises(ConfigError, match=message):
        add_lora(decoder, LoraConfig())
    assert str(decoder) == before
    add_lora(decoder, LoraConfig(rank_pattern={"k_proj|v_proj": 12}))


def test_an_adapter_for_another_base_names_its_tensors(llama, gpt2, tmp_path):
    config = LoraConfig(r=4, target_modules=("q_proj", "v_proj"))
    saved(llama, made(llama, config), config, tmp_path)
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    from safetensors.torch import save_file

    wide = {k: torch.cat([t, t], 1) if "lora_A" in k else t for k, t in tensors.items()}
    save_file(wide, tmp_path / ADAPTER_WEIGHTS)
    message = r"for another base than this model \(4 of 4 modules\): .*q_proj has A \[4, 48\]"
    with pytest.raises(CheckpointError, match=message):
        load_adapter(tmp_path, llama.ours(), disk_names=llama.disk_names)


def test_an_adapter_comes_off_and_goes_on_bitwise(pair):
    config = variant(pair.kind, trainable_token_indices=(3, 5))
    decoder = made(pair, config)
    pair.randomise(lora_parameters(decoder))
    logits, base = pair.logits(decoder), pair.logits(pair.ours())
    parts = detach(decoder)
    assert torch.equal(pair.logits(decoder), base)
    assert str(decoder) == str(pair.ours())
    attach(decoder, parts)
    assert torch.equal(pair.logits(decoder), logits)
