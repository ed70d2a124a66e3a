"""What is special to Gemma 4: where the reference needs help, and what its files hold beside."""

from dataclasses import replace

import torch
from safetensors.torch import load_file, save_file

import ardor
from ardor.generate.decode import Request, decode

from .cases_gemma4 import CASES
from .peer import CLOSE, contents, logits, peer, saved, tokens

E2B = CASES["gemma4_text: as E2B, a vector per layer, shared keys, wide layers"]


def test_layers_share_keys_without_a_vector_per_layer(tmp_path):
    """Their shortcut for such layers cuts vectors that are not there, unless asked for states."""
    keys = {**E2B.keys, "hidden_size_per_layer_input": 0}
    theirs = peer(replace(E2B, keys=keys))
    ours = ardor.load(saved(theirs, tmp_path)).logits(tokens())
    expected = logits(theirs, tokens(), output_hidden_states=True)
    torch.testing.assert_close(ours, expected, **CLOSE)


def test_maps_of_layers_that_read_others_are_saved_again_unread(tmp_path):
    """As the published files of E2B have them."""
    theirs = peer(E2B)
    before = saved(theirs, tmp_path / "before")
    weights = load_file(before / "model.safetensors")
    for part in ("k_proj", "v_proj", "k_norm"):
        weights[f"model.layers.4.self_attn.{part}.weight"] = torch.full((2, 2), torch.nan)
    save_file(weights, before / "model.safetensors", metadata={"format": "pt"})
    lm = ardor.load(before)
    torch.testing.assert_close(lm.logits(tokens()), logits(theirs, tokens()), **CLOSE)
    lm.save(tmp_path / "after")
    assert contents(tmp_path / "after") == contents(before)


def test_greedy_texts_of_unequal_prompts_are_those_of_transformers(tmp_path):
    """Each alone there; here in one batch, whose cache holds what is shared once."""
    theirs = peer(E2B)
    decoder = ardor.load(saved(theirs, tmp_path)).model.decoder
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (9, 2, 6)]
    found: list[list[int]] = [[] for _ in prompts]
    for token in decode(decoder, prompts, Request(max_new_tokens=8)):
        found[token.row].append(token.id)
    for prompt, ours in zip(prompts, found, strict=True):
        text = list(prompt)
        for _ in range(8):
            text.append(int(logits(theirs, torch.tensor([text]))[0, -1].argmax()))
        assert ours == text[len(prompt) :]
