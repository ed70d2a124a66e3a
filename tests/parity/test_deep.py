"""What the files of such models hold beside the usual: other dtypes, and layers for drafting."""

import torch
from safetensors.torch import load_file, save_file

import ardor

from .cases import CASES
from .peer import assert_config_kept, contents, logits, peer, reloaded, saved, tokens

V3 = CASES["deepseek_v3: groups, two kinds of layers"]


def test_a_float32_correction_stays_so_among_bfloat16_weights(tmp_path):
    theirs = peer(V3).bfloat16()
    before = saved(theirs, tmp_path / "before")
    weights = load_file(before / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("e_score_correction_bias"):
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2))
            weights[name] = 0.3 * noise  # float32, which bfloat16 could not hold
    save_file(weights, before / "model.safetensors", metadata={"format": "pt"})
    lm = ardor.load(before)
    held = lm.model.decoder.layers[1].ffn.router.correction
    assert held.dtype == torch.float32 and not torch.equal(held, held.bfloat16().float())
    lm.save(tmp_path / "after")
    assert contents(tmp_path / "after") == contents(before)
    theirs = reloaded(before, V3).float()  # they keep it too
    whole = ardor.load(before, dtype="float32").logits(tokens())
    torch.testing.assert_close(whole, logits(theirs, tokens()), rtol=1e-5, atol=1e-5)


def test_layers_that_draft_are_not_run_but_saved_again(tmp_path):
    theirs = peer(V3)
    before = saved(theirs, tmp_path / "before")
    weights = load_file(before / "model.safetensors")
    for name in ("eh_proj.weight", "self_attn.o_proj.weight", "shared_head.norm.weight"):
        weights[f"model.layers.3.{name}"] = torch.ones(2, 2)
    save_file(weights, before / "model.safetensors", metadata={"format": "pt"})
    lm = ardor.load(before)
    torch.testing.assert_close(lm.logits(tokens()), logits(theirs, tokens()), rtol=1e-5, atol=1e-5)
    lm.save(tmp_path / "after")
    assert contents(tmp_path / "after") == contents(before)
    assert_config_kept(tmp_path / "after", before)
