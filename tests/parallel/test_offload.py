"""Turns: what is fetched when, and that a part is as it was after its turn, whatever happens."""

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ardor.load import Model, load_model
from ardor.parallel.offload import Part, Turns
from ardor.place import Spread
from tests.parity.peer import Case, peer, saved, tokens

CPU = torch.device("cpu")
LAYERS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    case = Case("llama", {"num_hidden_layers": LAYERS, "tie_word_embeddings": False})
    return saved(peer(case), tmp_path_factory.mktemp("llama"))


def model(checkpoint: Path, home: str) -> tuple[Model, Turns]:
    """With its layers on the CPU or on disk, beside a pretended accelerator or none."""
    accelerators = {0: CPU} if home == "cpu" else {}
    rest = 0 if home == "cpu" else "cpu"
    given = {"model.layers": home, "": rest}
    found = load_model(checkpoint, device=Spread(given, accelerators=accelerators))
    assert found.turns is not None
    return found, found.turns


def held(model: Model) -> dict[str, Tensor]:
    return dict(model.decoder.named_parameters())


@torch.inference_mode()
def run(model: Model) -> Tensor:
    return model.decoder.logits(model.decoder.hidden(tokens()))


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_the_next_part_is_fetched_in_a_thread_while_one_computes(checkpoint, monkeypatch, home):
    found, turns = model(checkpoint, home)
    events: list[tuple[str, str, bool]] = []
    fetched, began = Turns._fetched, Turns._end
    here = threading.get_ident()

    def fetch(self: Turns, part: Part):
        events.append(("fetch", part.name, threading.get_ident() == here))
        return fetched(self, part)

    def end(self: Turns, part: Part) -> None:
        if part.kept != "device":
            self._thread and [future.result() for future in self._coming.values()]
            events.append(("end", part.name, threading.get_ident() == here))
        began(self, part)

    monkeypatch.setattr(Turns, "_fetched", fetch)
    monkeypatch.setattr(Turns, "_end", end)
    run(found)
    wanted = [("fetch", "layers.0", True)]
    for index in range(LAYERS):
        if index + 1 < LAYERS:
            wanted.append(("fetch", f"layers.{index + 1}", False))
        wanted.append(("end", f"layers.{index}", True))
    assert events == wanted
    assert turns.resident == 0


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_a_part_is_as_it_was_after_its_turn(checkpoint, home):
    found, turns = model(checkpoint, home)
    before = held(found)
    copies = {name: tensor.clone() for name, tensor in before.items()}
    run(found)
    after = held(found)
    assert all(after[name] is tensor for name, tensor in before.items())
    assert all(torch.equal(after[name], copies[name]) for name in copies)
    assert turns.peak > 0


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_an_error_within_a_turn_lets_go_and_the_next_call_is_right(checkpoint, home):
    found, turns = model(checkpoint, home)
    wanted = run(found)
    before = held(found)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    norm = found.decoder.get_submodule("layers.1.ffn_norm")
    handle = norm.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(found)
    handle.remove()
    assert all(held(found)[name] is tensor for name, tensor in before.items())
    assert torch.equal(run(found), wanted)
    assert turns.resident == 0


def test_an_error_while_fetching_reaches_the_caller(checkpoint, monkeypatch):
    found, _ = model(checkpoint, "cpu")
    fetched = Turns._fetched

    def fail(self: Turns, part: Part):
        if part.name == "layers.2":
            raise OSError("the disk is gone")
        return fetched(self, part)

    monkeypatch.setattr(Turns, "_fetched", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        run(found)


def test_what_was_written_to_is_not_given_back(checkpoint):
    found, _ = model(checkpoint, "disk")
    weight = found.decoder.get_parameter("layers.1.mixer.q_proj.weight")
    before = run(found)
    with torch.no_grad():
        weight.mul_(2)
    changed = run(found)
    assert not torch.allclose(changed, before)
    assert torch.equal(run(found), changed)


def test_the_parts_of_a_head_are_used_while_they_are_there(checkpoint):
    found = load_model(checkpoint, device=Spread({"lm_head": "cpu", "": 0}, accelerators={0: CPU}))
    whole = load_model(checkpoint)
    hidden = whole.decoder.hidden(tokens()).detach()
    function, values = found.decoder.head_parts()
    assert found.turns is not None
    with torch.inference_mode():
        given = [function(hidden[:, i : i + 4], *values) for i in (0, 4)]
        wanted = whole.decoder.head(hidden[:, :8])
    torch.testing.assert_close(torch.cat(given, 1), wanted)
    assert found.turns.resident == 0 and found.turns.peak == values[0].nbytes
