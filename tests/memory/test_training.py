"""What a run's own model trains and holds, beside what is said of it."""

from dataclasses import replace

import pytest
import torch

from ardor.adapters.config import LoraConfig
from ardor.adapters.lora import LoraLinear, add_lora, lora_modules, lora_parameters
from ardor.arch.decoder import Decoder
from ardor.memory.estimate import Held, Use
from ardor.plan import known
from ardor.train.peak import trains

LLAMA = known("llama-15m").spec
SMALL = replace(LLAMA, vocab=64, layers=LLAMA.layers[:3])
TRAIN = Use(task="train", weights="float32", compute="float32", rows=2, length=40)


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "pissa"},
        {"use_dora": True},
        {"modules_to_save": ("embed_tokens",)},
        {"modules_to_save": ("ffn.down_proj",), "target_modules": ("q_proj",)},
        {"rank_pattern": {"q_proj": 64}},
    ],
    ids=str,
)
def test_what_an_adapter_holds_is_exact(settings):
    decoder = Decoder(SMALL)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    add_lora(decoder, LoraConfig(r=8, **settings))
    for parameter in lora_parameters(decoder):
        parameter.requires_grad_(True)
    held = Held(SMALL, replace(TRAIN, method="lora", **trains(decoder)))
    state = [*decoder.parameters(), *decoder.buffers()]
    # What DoRA's norms were last is kept beside the buffers.
    state += [
        m._norms[1] for _, m in lora_modules(decoder) if isinstance(m, LoraLinear) and m._norms
    ]
    own = sum({t.data_ptr(): t.nbytes for t in state if t.numel()}.values())
    assert 4 * held.trained + held.constants == own - held.weights


def test_frozen_layers_keep_nothing():
    decoder = Decoder(SMALL)
    every = Held(SMALL, replace(TRAIN, **trains(decoder)))
    decoder.requires_grad_(False)
    decoder.get_submodule("layers.2").requires_grad_(True)
    held = Held(SMALL, replace(TRAIN, **trains(decoder)))
    assert held.trained == sum(p.numel() for p in decoder.parameters() if p.requires_grad)
    assert held.saved(0) == held.saved(1) == held.gradients(1) == 0
    assert held.saved(2) == every.saved(2) and held.states < every.states / 2
    assert every.saved(0) > 0 and every.trains_head and not held.trains_head
