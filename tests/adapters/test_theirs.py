"""What PEFT makes of scaled embeddings, joined maps, biases, and patterns with anchors."""

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import ardor

from ..parity.peer import Case, logits, peer, saved, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
SIZES = {
    "vocab_size": 53,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ALONE = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
GEMMA = Case("gemma", {"head_dim": 16}, sizes=SIZES)
LLAMA = Case("llama", sizes=SIZES)
OPT = Case(
    "opt",
    {"word_embed_proj_dim": 64, "ffn_dim": 80},
    sizes={key: value for key, value in ALONE.items() if key != "intermediate_size"},
)
GPT2 = Case(
    "gpt2",
    {"n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    sizes={key: value for key, value in ALONE.items() if key != "intermediate_size"},
)
TIED = {"ensure_weight_tying": True}
CASES = {
    "scaled embedding": (GEMMA, {"target_modules": ["embed_tokens", "q_proj"], **TIED}),
    "scaled rows": (GEMMA, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9]}),
    "scaled, in full": (
        GEMMA,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], **TIED},
    ),
    "multiplied logits": (
        Case("cohere", {"logit_scale": 0.5}, sizes=SIZES),
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9]},
    ),
    "joined": (Case("phi3", sizes=SIZES), {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "joined by heads, dora": (
        Case("gpt_neox", sizes=ALONE),
        {"target_modules": ["query_key_value"], "use_dora": True},
    ),
    "biases": (OPT, {"target_modules": "all-linear"}),
    "a wrong fan_in_fan_out": (GPT2, {"target_modules": ["c_attn"], "fan_in_fan_out": False}),
    "one layer": (
        LLAMA,
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    ),
    "anchored patterns": (
        LLAMA,
        {
            "target_modules": ["q_proj"],
            "rank_pattern": {"^model.layers.1.self_attn.q_proj": 2, "q_proj": 3},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 5, "q_proj": 7},
        },
    ),
    "random beginnings": (LLAMA, {"target_modules": ["q_proj"], "init_lora_weights": False}),
}


@pytest.mark.parametrize(("case", "settings"), CASES.values(), ids=CASES)
def test_we_compute_what_peft_does(case, settings, tmp_path):
    base = saved(peer(case), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    plain, plain_tied = logits(model, tokens()), model.config.tie_word_embeddings
    torch.manual_seed(0)
    model = get_peft_model(model, PeftConfig(r=4, **settings))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    expected = logits(model.eval(), tokens())
    assert (expected - plain).abs().max() > 0.1
    model.save_pretrained(str(tmp_path / "a"))
    lm = ardor.load(base, adapter=tmp_path / "a", dtype="float32")
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(lm.logits(tokens()), expected, **close)
    lm.save(tmp_path / "again")
    again = ardor.load(base, adapter=tmp_path / "again", dtype="float32")
    torch.testing.assert_close(again.logits(tokens()), expected, **close)
    lm.merge()
    torch.testing.assert_close(lm.logits(tokens()), expected, **close)
    lm.save(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager"
    )
    torch.testing.assert_close(logits(merged.eval(), tokens()), expected, **close)
    shared = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert merged.config.tie_word_embeddings == shared == plain_tied
