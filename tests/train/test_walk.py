"""How a run walks beside its optimizer: schedules, who trains at what rate, order, what is kept."""

import math
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from ardor.adapters.lora import lora_modules
from ardor.data.batches import BatchPlan
from ardor.errors import ConfigError
from ardor.files.runs import checkpoints, chosen_checkpoint, newest_checkpoint
from ardor.load import load_model
from ardor.memory.flops import step_flops
from ardor.score import document_loss
from ardor.train.config import Optimisation
from ardor.train.groups import Share, aliases, choose_trained, rate_shares
from ardor.train.noise import Noise
from ardor.train.recompute import recompute
from ardor.train.schedule import SCHEDULES, rate_share

from ..tiny import sentences
from .conftest import figures, finish, prepare, train_config, tune_config

pytestmark = pytest.mark.sweep


# --- schedules ---


def shares(kind, **given):
    facts = {"steps": 20, "warmup": 4, "decay": 5, "power": 2.0, **given}
    return [rate_share(step, kind=kind, **facts) for step in range(20)]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_schedule_rises_and_never_rises_again(kind):
    found = shares(kind, min_share=0.05)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a >= b for a, b in pairwise(found[4:]))
    assert all(0.05 <= share <= 1 for share in found)


def test_schedules_are_what_they_are_called():
    steady = shares("wsd")
    assert steady[4:16] == [1.0] * 12  # 15 is the last before the five steps of the fall
    assert steady[16] == pytest.approx(1 - math.sqrt(1 / 5))
    assert steady[19] == pytest.approx(1 - math.sqrt(4 / 5))
    assert shares("inverse_sqrt")[12] == pytest.approx(math.sqrt(4 / 12))
    assert shares("polynomial")[12] == pytest.approx(0.25)  # (1 - 8 / 16) ** 2
    assert shares("polynomial", power=1.0) == pytest.approx(shares("linear"))


# --- who trains, and how fast ---


def test_patterns_are_of_our_names_or_the_checkpoint_s(base):
    model = load_model(base("llama"), dtype="float32")
    names = aliases(model)
    assert names["layers.0.mixer.q_proj.weight"] == "model.layers.0.self_attn.q_proj.weight"
    model.decoder.requires_grad_(True)
    config = Optimisation(train_only=(r"self_attn\.", r"^norm"), freeze=(r"layers\.0\.",))
    (note,) = choose_trained(model.decoder, config, names)
    left = {name for name, p in model.decoder.named_parameters() if p.requires_grad}
    projections = {f"layers.1.mixer.{p}_proj.weight" for p in "qkvo"}
    assert left == {"norm.weight", *projections}
    assert note.startswith("frozen by name: ")
    assert not choose_trained(model.decoder, Optimisation(), names)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"freeze": ("lm_hed",)}, r"freeze 'lm_hed' matches none .* there are model.embed_tokens"),
        ({"train_only": ("q_proj(",)}, r"train_only 'q_proj\(' is no regular expression"),
        ({"freeze": (".",)}, "freeze and train_only leave nothing to train"),
    ],
)
def test_patterns_that_do_nothing_are_refused(base, given, message):
    model = load_model(base("llama"), dtype="float32")
    model.decoder.requires_grad_(True)
    with pytest.raises(ConfigError, match=message):
        choose_trained(model.decoder, Optimisation(**given), aliases(model))


def test_rates_by_pattern():
    names = ["embed_tokens.weight", "layers.0.q_proj.lora_A", "layers.0.q_proj.lora_B"]
    config = Optimisation(
        learning_rate=1e-3,
        loraplus_lr_ratio=16.0,
        learning_rates=("embed=1e-4", r"layers\.0.*A=x0.5"),
    )
    assert rate_shares(names, config, {}) == pytest.approx(
        dict(zip(names, (0.1, 0.5, 16.0), strict=True))
    )
    first = replace(config, learning_rates=("lora_B=x2", "lora=x3"))
    assert rate_shares(names, first, {})[names[2]] == 2
    for wrong in ("embed", "embed=", "embed=fast", "=1e-3", "embed=-1"):
        with pytest.raises(ConfigError, match="expected PATTERN=RATE or PATTERN=xFACTOR"):
            Share.parse(wrong)
    with pytest.raises(ConfigError, match=r"loraplus_lr_ratio=16.0 is for adapters"):
        rate_shares(names[:1], config, {})


def test_frozen_weights_stay_and_the_others_move(base, pairs, tmp_path):
    config = tune_config(
        base("llama"), pairs, tmp_path / "run", method="full", freeze=(r"layers\.0\.",), max_steps=2
    )
    finish(prepare(config))
    before, after = (
        load_model(path, dtype="float32").decoder.state_dict()
        for path in (base("llama"), tmp_path / "run")
    )
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith("layers.0.")}


def test_biases_of_adapters_are_trained(base, pairs, tmp_path):
    config = tune_config(base("llama"), pairs, tmp_path / "run", lora_bias=True, max_steps=1)
    finish(prepare(config))
    decoder = load_model(tmp_path / "run", dtype="float32").decoder
    biases = [getattr(module, "lora_B_bias", None) for _, module in lora_modules(decoder)]
    assert biases and all(bias is not None and bias.any() for bias in biases)


# --- order ---


def test_orders_of_examples(dataset):
    lengths = dataset.lengths

    def plan(order, **given):
        return BatchPlan(dataset, examples_per_batch=2, order=order, **given)

    assert [i for b in plan("sequential").epoch(0) for i in b] == list(range(10))
    short = [int(lengths[i]) for b in plan("shortest_first").epoch(1) for i in b]
    assert short == sorted(short)
    grouped = plan("group_by_length")
    spread = [np.ptp(lengths[list(batch)]) for batch in grouped.epoch(0)]
    assert sum(spread) < sum(np.ptp(lengths[list(b)]) for b in plan("random").epoch(0))
    assert grouped.epoch(0) != sorted(grouped.epoch(0), key=lambda b: -lengths[b[0]])
    for order in ("random", "sequential", "group_by_length", "shortest_first"):
        for batches in (plan(order).epoch(3), BatchPlan(dataset, tokens_per_batch=64).epoch(3)):
            assert sorted(i for batch in batches for i in batch) == list(range(10))
        packed = BatchPlan(dataset, tokens_per_batch=64, order=order)
        assert all(lengths[list(batch)].sum() <= 64 for batch in packed.epoch(0))
    ordered = BatchPlan(dataset, tokens_per_batch=64, order="shortest_first").epoch(0)
    assert [i for batch in ordered for i in batch] == [
        i for batch in plan("shortest_first").epoch(0) for i in batch
    ]


# --- activations ---


def gradients_of(decoder, batch) -> dict[str, Tensor]:
    decoder.train()
    torch.manual_seed(0)
    document_loss(decoder, batch, []).nats.backward()
    return {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("what", ["layers", "selective"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_computing_activations_again_changes_no_gradient(base, pairs, tmp_path, what, method):
    found = []
    for how in ("none", what):
        config = tune_config(base("llama"), pairs, tmp_path / how, method=method)
        run = prepare(replace(config, gradient_checkpointing=how))
        for name, parameter in run.trainer.parameters.items():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        batch = run.trainer.plan.batch((0, 1, 2))
        found.append(gradients_of(run.model.decoder, batch))
    plain, again = found
    assert plain.keys() == again.keys() and len(plain) > 4
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def saved_bytes(decoder, batch) -> int:
    held = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    decoder.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = document_loss(decoder, batch, []).nats
    del loss
    return sum(held.values())


def test_less_is_kept(make, dataset):
    kept = {}
    for what in ("none", "selective", "layers"):
        trainer = make(gradient_checkpointing=what)
        weights = {p.untyped_storage().data_ptr() for p in trainer.decoder.parameters()}
        assert weights
        kept[what] = saved_bytes(trainer.decoder, trainer.plan.batch(tuple(range(10))))
    assert kept["layers"] < kept["selective"] < kept["none"]


def test_a_model_run_by_transformers_is_refused(dataset):
    from ardor.arch.causal import CausalLM

    recompute(CausalLM(), "none")
    for act in (lambda: recompute(CausalLM(), "layers"), lambda: Noise(CausalLM(), 5.0)):
        with pytest.raises(ConfigError, match="for models that Ardor runs itself"):
            act()


# --- noise ---


def test_noise_is_as_large_as_the_paper_says_and_only_in_training(base):
    decoder = load_model(base("llama"), dtype="float32").decoder
    width = decoder.spec.width
    ids = torch.zeros(1, 3000, dtype=torch.int64)
    plain = decoder.embed_tokens(ids)
    noise = Noise(decoder, 5.0)
    noise.lengths = (1000, 2000)
    decoder.eval()
    assert torch.equal(decoder.embed_tokens(ids), plain)
    decoder.train()
    torch.manual_seed(0)
    added = (decoder.embed_tokens(ids) - plain).detach()
    for piece, length in ((added[0, :1000], 1000), (added[0, 1000:], 2000)):
        most = 5.0 / math.sqrt(length * width)
        assert piece.abs().max() == pytest.approx(most, rel=1e-2)
        assert piece.std() == pytest.approx(most / math.sqrt(3), rel=2e-2)


# --- what is kept ---


def test_the_best_checkpoint_is_kept_and_stands_for_the_run(texts, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7, 2.8])
    config = train_config(
        texts,
        tmp_path / "run",
        eval_steps=1,
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        early_stopping_patience=3,
    )
    run = prepare(config)
    hooks = replace(
        run.trainer.hooks, evaluate=lambda: [{"kind": "eval", "loss": next(losses), "targets": 1}]
    )
    run.trainer.hooks = hooks
    events = finish(run)
    assert run.trainer.stopped_early and run.trainer.finished
    assert max(event["step"] for event in events) == 5  # of 6; the third miss
    assert [path.name for path in checkpoints(run.folder)] == ["checkpoint-2", "checkpoint-5"]
    best, newest = chosen_checkpoint(run.folder), newest_checkpoint(run.folder)
    assert best is not None and newest is not None
    assert (best.name, newest.name) == ("checkpoint-2", "checkpoint-5")
    wanted, found = (load_model(p).decoder.state_dict() for p in (best, run.folder))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    again = prepare(replace(config, resume=True))
    assert again.trainer.finished and again.trainer.progress.best_step == 2
    del again  # gives the folder back
    longer = prepare(replace(config, resume=True, early_stopping_patience=9))
    assert not longer.trainer.finished


def test_a_loss_that_is_better_by_too_little_is_no_better(make):
    trainer = make(early_stopping_patience=2, early_stopping_threshold=0.1)
    for loss, misses in ((2.0, 0), (1.95, 1), (1.85, 0), (1.8, 1), (1.8, 2)):
        trainer._judge(loss)
        assert trainer.progress.misses == misses
    assert trainer.stopped_early


def test_early_stopping_needs_held_out_data(texts, tmp_path):
    for given in ({"early_stopping_patience": 2}, {"load_best_model_at_end": True}):
        config = train_config(texts, tmp_path / "run", eval_fraction=0.0, **given)
        with pytest.raises(ConfigError, match=re.escape("nothing is held out; give --eval-data")):
            prepare(config)


# --- samples, and what the machine does ---


def test_samples_of_a_tuning_begin_before_it(base, pairs, tmp_path):
    config = tune_config(
        base("llama"), pairs, tmp_path / "run", sample_prompts=("the cat",), max_steps=3
    )
    samples = [event for event in finish(prepare(config)) if event["kind"] == "sample"]
    assert [event["step"] for event in samples] == [0, 3]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Step 0" in page and "the cat" in page


def test_utilisation_is_operations_over_what_the_device_could_do(make):
    trainer = make(peak_tflops=1e-3)  # 1 GFLOP/s
    event = trainer._step(*next(trainer._windows()))
    lengths = trainer.plan.batch(trainer.plan.epoch(0)[0]).lengths
    flops = step_flops(trainer.decoder.spec, lengths, full=True)
    assert event["mfu"] == pytest.approx(flops / event["seconds"] / 1e9)
    assert event["memory"] > 1 << 20
    assert "mfu" not in make()._step(*next(make()._windows()))  # too short to measure for


def test_operations_are_those_that_pytorch_counts(base):
    from torch.utils.flop_counter import FlopCounterMode

    decoder = load_model(base("llama"), dtype="float32", attn_implementation="eager").decoder
    ids = torch.arange(24)[None] % decoder.spec.vocab
    with FlopCounterMode(display=False) as counter:
        decoder.logits(decoder.hidden(ids))
    ours = step_flops(decoder.spec, [24], full=True) / 3  # forwards only
    square = step_flops(decoder.spec, [24], full=True) - 24 * step_flops(
        decoder.spec, [1], full=True
    )
    # PyTorch counts the whole square of scores, of which we count the triangle.
    assert counter.get_total_flops() == pytest.approx(ours + square / 3, rel=0.02)
    assert step_flops(decoder.spec, [24], full=False) < 0.75 * 3 * ours
    assert step_flops(decoder.spec, [12, 12], full=True) < 3 * ours


def test_metrics_say_the_same_whatever_was_measured(texts, tmp_path):
    finish(prepare(train_config(texts, tmp_path / "run", max_steps=2)))
    assert all("memory" not in row for row in figures(tmp_path / "run"))


# --- continued pre-training ---


@pytest.mark.parametrize("method", ["full", "lora"])
def test_plain_documents_are_learnt_whole_in_chunks(base, tmp_path, method):
    text = " ".join(sentences(12, seed=3))
    data = tmp_path / "book.txt"
    data.write_text(text)
    config = tune_config(
        base("llama"), data, tmp_path / "run", method=method, max_length=20, eval_fraction=0.0
    )
    run = prepare(replace(config, max_steps=2))
    tokenizer = run.model.tokenizer
    assert tokenizer is not None and run.model.template is None
    pieces = [run.train[i] for i in range(len(run.train))]
    assert len(pieces) > 3 and all(len(piece.tokens) <= 20 for piece in pieces)
    joined = list(pieces[0].tokens)
    for piece in pieces[1:]:
        assert piece.tokens[0] == joined[-1]  # the border is predicted, once
        joined += piece.tokens[1:]
    assert joined == [*tokenizer.encode(text), tokenizer.special.eos]
    assert run.train.census.targets == len(joined) - 1
    events = finish(run)
    assert sum(event["kind"] == "train" for event in events) == 2
