"""A padded rectangle gives the logits of its rows alone, on either side, whatever id pads."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from ardor.errors import TextError
from ardor.text.example import Example, pad_examples
from ardor.text.padding import pad
from ardor.text.tokenizer import Tokenizer

ROWS = [[5, 3, 2, 9, 4], [7, 2], [2, 8, 2]]  # 2 is the EOS, and pads

PEERS = {
    "learned positions": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=12, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
    ),
    "rope": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=12,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.5,
        )
    ),
    "alibi": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=12, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.5)
    ),
}


@pytest.mark.parametrize("kind", PEERS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fill", [2, 0])
def test_either_side_gives_the_logits_of_each_row_alone(kind: str, side, fill: int):
    torch.manual_seed(0)
    peer = PEERS[kind]().eval()
    found = pad(ROWS, fill, side, multiple_of=4)
    assert len(found.input_ids[0]) == 8
    held = {name: torch.tensor(value) for name, value in found._asdict().items() if value}
    if kind == "alibi":
        held.pop("position_ids")  # made from the mask there
    together = peer(**held).logits
    for row, mask, alone in zip(together, held["attention_mask"].bool(), ROWS, strict=True):
        wanted = peer(torch.tensor([alone])).logits[0]
        torch.testing.assert_close(row[mask], wanted, atol=1e-4, rtol=1e-4)
    if kind == "learned positions" and side == "left":  # without positions it is another text
        held.pop("position_ids")
        other = peer(**held, position_ids=torch.arange(8)[None]).logits
        assert (other - together)[1, -2:].abs().max() > 0.1


def test_labels_come_from_what_is_trained_on_not_from_ids(tokenizer: Tokenizer):
    eos = tokenizer.special.eos
    assert eos is not None
    pads = tokenizer.naming(pad_token="<|endoftext|>")
    assert pads.filler == eos
    rows = [
        Example((5, 6, eos), (False, True, True)),
        Example((5, eos), (False, True)),
        Example((5, eos, 6, eos), (False, False, True, True)),
    ]
    found = pad_examples(pads, rows)
    ignored = -100
    assert found.labels == [
        [ignored, 6, eos, ignored],
        [ignored, eos, ignored, ignored],
        [ignored, ignored, 6, eos],
    ]
    assert found.attention_mask == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert found.input_ids[1] == [5, eos, eos, eos]
    others = pad_examples(tokenizer, rows)  # another id pads: only that differs
    assert others._replace(input_ids=None) == found._replace(input_ids=None)
    left = tokenizer.pad([[5, 6, 7], [5]])
    assert left.attention_mask == [[1, 1, 1], [0, 0, 1]]
    assert left.position_ids == [[0, 1, 2], [0, 0, 0]]
    assert left.input_ids[1] == [tokenizer.special.pad, tokenizer.special.pad, 5]


def test_what_cannot_be_padded_is_refused(tokenizer: Tokenizer):
    with pytest.raises(TextError, match="no rows to pad"):
        tokenizer.pad([])
    with pytest.raises(TextError, match="multiple_of=0 must be at least 1"):
        tokenizer.pad([[1]], multiple_of=0)
