"""Two adapters of PEFT on one base here: each answers for itself, and PEFT reads their sum."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import ardor
from ardor.errors import ConfigError

from ..parity.peer import Case, logits, peer, saved, tokens
from .test_tables import CASES, theirs, trained
from .test_theirs import GPT2, SIZES

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
EXPERTS = Case(
    "qwen3_moe",
    {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 16,
        "mlp_only_layers": [],
    },
    sizes=SIZES,
)
GATE, DOWN = "experts.gate_up_proj", "experts.down_proj"
SUMMED = {
    "patterns and scales": (
        CASES["untied"],
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}},
        {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "lora_alpha": 3},
    ),
    "other experts' parameters": (  # which PEFT refuses
        EXPERTS,
        {"target_modules": ["q_proj"], "target_parameters": [GATE]},
        {"target_modules": [], "target_parameters": [GATE, DOWN]},
    ),
    "a tied embedding": (
        CASES["tied"],
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "lora_alpha": 3},
    ),
    "what PiSSA took off": (
        CASES["untied"],
        {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
        {"target_modules": ["q_proj", "up_proj"]},
    ),
    "joined maps": (
        GPT2,
        {"target_modules": ["c_attn"], "fan_in_fan_out": True},
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
}


@pytest.mark.parametrize(("case", "one", "two"), SUMMED.values(), ids=SUMMED)
@pytest.mark.sweep
def test_a_sum_is_saved_merged_and_taken_out(case, one, two, tmp_path):
    base = saved(peer(case), tmp_path / "base")
    lm = ardor.load(base, dtype="float32")
    plain = lm.logits(tokens())
    expected = {}
    for name, settings in (("one", one), ("two", two)):
        expected[name] = trained(base, tmp_path / name, tokens(), **settings)
        lm.load_adapter(tmp_path / name, name)
    for name in ("two", "one"):
        lm.use_adapter(name)
        torch.testing.assert_close(lm.logits(tokens()), expected[name], **CLOSE)
    lm.combine_adapters("sum", {"one": 0.7, "two": -0.4})
    lm.use_adapter("sum")
    found = lm.logits(tokens())
    assert (found - plain).abs().max() > 0.1
    lm.save(tmp_path / "sum")
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, str(tmp_path / "sum")).eval()
    torch.testing.assert_close(logits(model, tokens()), found, **CLOSE)
    lm.merge()
    torch.testing.assert_close(lm.logits(tokens()), found, **CLOSE)
    with pytest.raises(ConfigError, match="'sum' is merged into the weights; unmerge it first"):
        lm.adapters.remove("sum")
    lm.adapters.remove("two")
    lm.unmerge()
    assert torch.equal(lm.logits(tokens()), found)
    lm.adapters.remove("sum")
    assert torch.equal(lm.logits(tokens()), plain) and [*lm.adapters] == ["one"]


APART = {
    "modules in full": ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}),
    "rows": ({"trainable_token_indices": [4, 9]}, {"trainable_token_indices": [9, 11]}),
}


@pytest.mark.parametrize(("one", "two"), APART.values(), ids=APART)
def test_what_only_one_of_them_trains_is_the_base_s_under_the_other(one, two, tmp_path):
    base = saved(peer(CASES["untied"]), tmp_path / "base")
    lm = ardor.load(base, dtype="float32")
    plain = logits(theirs(base), tokens())
    expected = {None: plain}
    for name, settings in (("one", one), ("two", two)):
        settings = {"target_modules": ["q_proj"], **settings}
        expected[name] = trained(base, tmp_path / name, tokens(), **settings)
        lm.load_adapter(tmp_path / name, name)
    assert not any(p.requires_grad for p in lm.model.decoder.parameters())
    for name in ("one", "two", None, "one"):
        lm.use_adapter(name)
        torch.testing.assert_close(lm.logits(tokens()), expected[name], **CLOSE)
