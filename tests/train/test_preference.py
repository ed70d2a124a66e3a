"""Preference tuning: the papers' losses, exact gradients, one reference, and runs that learn."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ardor.adapters.off import without_adapter
from ardor.cli import console
from ardor.cli.main import main
from ardor.data.batches import BatchPlan
from ardor.data.preferences import Judged, build_judged
from ardor.data.readers import Row
from ardor.errors import CheckpointError, ConfigError, DataError
from ardor.load import load_model, tokenizer_of
from ardor.loss import IGNORE, chunked_token_logprobs
from ardor.score import document_logprobs, document_loss
from ardor.train import finetune
from ardor.train.config import Finetune
from ardor.train.preference import PAIR_LOSSES, Pairs, Strength, half, kto
from ardor.train.reference import FILE, table, under_the_adapter

from ..tiny import sentences, write_rows
from .conftest import finish

ALL = ("dpo", "cdpo", "ipo", "hinge", "simpo", "orpo", "kto")


def preferences(count: int, seed: int = 0) -> list[dict]:
    """The better answer is the one that speaks of cats."""
    prompts, tails = sentences(count, seed + 10), sentences(count, seed + 20)
    return [
        {"prompt": p, "chosen": f" cat {t}", "rejected": f" dog {t} far"}
        for p, t in zip(prompts, tails, strict=True)
    ]


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("compared") / "pairs.jsonl", preferences(24))


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("compared") / "held.jsonl", preferences(20, 7))


@pytest.fixture
def settings(base, compared, tmp_path):
    def made(**changes) -> Finetune:
        given = {
            "model": str(base("llama")),
            "data": str(compared),
            "output": tmp_path / "run",
            "objective": "dpo",
            "learning_rate": 1e-3,
            "max_length": 48,
            "dtype": "float32",
            "per_device_train_batch_size": 4,
            "eval_fraction": 0.2,
        }
        return Finetune(**given | changes)

    return made


def judged(model, rows: list[dict], kind="pairs", limit=48, **options) -> Judged:
    rows = [Row(values, f"row {i}") for i, values in enumerate(rows, 1)]
    return build_judged(
        rows, tokenizer_of(model), model.template, kind, max_length=limit, **options
    )


# --- losses ---


def numbers() -> tuple[Pairs, list[list[float]]]:
    g = torch.Generator().manual_seed(0)
    logs = [-12 * torch.rand(5, generator=g) - 1 for _ in range(4)]
    tokens = [torch.randint(1, 9, (5,), generator=g) for _ in range(2)]
    pairs = Pairs(*logs, *tokens)
    return pairs, [[float(value) for value in row] for row in zip(*pairs, strict=True)]


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


FORMULAS = {
    # arXiv:2305.18290, equation 7
    "dpo": lambda w, v, rw, rv, n, m: (
        -math.log(
            sigma(
                0.3 * math.log(math.exp(w) / math.exp(rw))
                - 0.3 * math.log(math.exp(v) / math.exp(rv))
            )
        )
    ),
    # Mitchell 2023, equation 3
    "cdpo": lambda w, v, rw, rv, n, m: (
        -0.8 * math.log(sigma(0.3 * (w - rw - v + rv)))
        - 0.2 * math.log(1 - sigma(0.3 * (w - rw - v + rv)))
    ),
    # arXiv:2310.12036, equation 17, of means
    "ipo": lambda w, v, rw, rv, n, m: ((w - rw) / n - (v - rv) / m - 1 / 0.6) ** 2,
    # arXiv:2305.10425, equation 2
    "hinge": lambda w, v, rw, rv, n, m: max(0.0, 1 - 0.3 * ((w - v) - (rw - rv))),
    # arXiv:2405.14734, equation 6
    "simpo": lambda w, v, rw, rv, n, m: -math.log(sigma(0.3 / n * w - 0.3 / m * v - 0.7)),
    # arXiv:2403.07691, equations 3, 4, 6 and 7
    "orpo": lambda w, v, rw, rv, n, m: (
        -w / n
        - 0.3
        * math.log(
            sigma(
                math.log(
                    (math.exp(w / n) / (1 - math.exp(w / n)))
                    / (math.exp(v / m) / (1 - math.exp(v / m)))
                )
            )
        )
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_losses_are_the_papers(name):
    pairs, rows = numbers()
    strength = Strength(0.3, 0.2 if name == "cdpo" else 0.0, 0.7)
    expected = torch.tensor([FORMULAS[name](*row) for row in rows])
    torch.testing.assert_close(PAIR_LOSSES[name](pairs, strength), expected, rtol=1e-5, atol=1e-5)
    swapped = Pairs(*(pairs[i] for i in (1, 0, 3, 2, 5, 4)))
    assert not torch.allclose(PAIR_LOSSES[name](swapped, strength), expected, rtol=1e-2)


def test_the_loss_of_kto_is_the_paper_s():  # arXiv:2402.01306, equation 8
    gain, liked = torch.tensor([0.5, -2.0, 3.0]), torch.tensor([True, False, False])
    expected = [1 - sigma(0.3 * (0.5 - 0.4)), 1 - sigma(0.3 * (0.4 + 2.0)), 1 - sigma(0.3 * -2.6)]
    found = kto(gain, liked, torch.tensor(0.4), Strength(0.3))
    torch.testing.assert_close(found, torch.tensor(expected))


def test_orpo_of_an_answer_that_is_certain_is_finite():
    zero, one = torch.zeros(1, requires_grad=True), torch.ones(1, dtype=torch.int64)
    pairs = Pairs(zero, zero - 1, zero * 0, zero * 0, one, one)
    PAIR_LOSSES["orpo"](pairs, Strength(0.1)).backward()
    assert zero.grad is not None and zero.grad.isfinite().all()


# --- gradients ---


@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
def test_token_logprobs_in_chunks_are_those_of_whole_logits(chunk):
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 9, 6, generator=g, requires_grad=True)
    weight = torch.randn(11, 6, generator=g, requires_grad=True)
    targets = torch.randint(0, 11, (1, 9), generator=g)
    targets[0, [0, 4, 8]] = IGNORE
    scale = torch.randn(6, generator=g)
    found = chunked_token_logprobs(hidden, targets, lambda x, w: x @ w.T, (weight,), chunk=chunk)
    mine = torch.autograd.grad((found * scale).sum(), [hidden, weight])
    kept = targets[0] != IGNORE
    whole = (hidden @ weight.T).log_softmax(-1)[0, kept].gather(-1, targets[0, kept, None])[:, 0]
    naive = torch.autograd.grad((whole * scale).sum(), [hidden, weight])
    torch.testing.assert_close(found, whole)
    for one, expected in zip(mine, naive, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)


def test_ids_that_belong_to_no_token_have_no_probability(model):
    batch = BatchPlan(judged(model, preferences(3)), examples_per_batch=3).batch((0, 1, 2))
    decoder = model.decoder.eval()
    assert decoder.tokens_known is not None and decoder.tokens_known < decoder.facts.vocab
    with torch.no_grad():
        sums = document_logprobs(decoder, batch).sums
        torch.testing.assert_close(-sums.sum(), document_loss(decoder, batch).nats)
        tokens, log_p = batch.tokens[0, : batch.lengths[0]], []
        for logits in (decoder.token_logits, decoder.logits):
            each = logits(decoder.hidden(tokens[None]))[0].log_softmax(-1)
            targets = batch.targets[0, : batch.lengths[0]]
            log_p.append(each[targets != IGNORE].gather(-1, targets[targets != IGNORE, None]).sum())
    torch.testing.assert_close(sums[0], log_p[0])
    assert not torch.isclose(sums[0], log_p[1])  # the usual mistake


def stepped(run, monkeypatch) -> dict:
    """The event and the gradients of a run's first step."""
    seen = {}

    def step() -> None:
        parameters = run.trainer.parameters.items()
        seen.update({name: p.grad.clone() for name, p in parameters if p.grad is not None})

    monkeypatch.setattr(run.trainer.optimizer, "step", step)
    seen["event"] = run.trainer._step(*next(run.trainer._windows()))
    return seen


@pytest.mark.parametrize("objective", ALL)
def test_micro_batches_are_one_batch_and_the_gradient_is_that_of_whole_logits(
    settings, tmp_path, monkeypatch, objective
):
    common = {"objective": objective, "method": "full", "max_grad_norm": 0.0, "eval_fraction": 0.0}
    runs = [
        finetune.prepare(settings(output=tmp_path / name, **common, **sizes))
        for name, sizes in {
            "whole": {"per_device_train_batch_size": 24 * 2},
            "parts": {"per_device_train_batch_size": 7, "gradient_accumulation_steps": 7},
        }.items()
    ]
    whole, parts = (run_ for run_ in runs)
    for parameter in [*whole.trainer.parameters.values(), *parts.trainer.parameters.values()]:
        # Away from the reference, where losses are not all alike.
        g = torch.Generator().manual_seed(parameter.numel())
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=g)
    expected = naive_gradients(whole)
    found, again = stepped(whole, monkeypatch), stepped(parts, monkeypatch)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert found["event"]["loss"] == pytest.approx(again["event"]["loss"], rel=1e-5)
    for key in ("rewards/accuracies", "rewards/margins", "logps/chosen"):
        if key in found["event"]:
            assert found["event"][key] == pytest.approx(again["event"][key], rel=1e-4)


def naive_gradients(run) -> dict:
    """One document at a time, with all logits, and the papers' formulas written out in torch."""
    decoder, data, objective = run.model.decoder, run.train, run.trainer.objective
    config = run.trainer.config
    sums, counts = [], []
    for index in range(len(data)):
        tokens, marks = data[index].tokens, data[index].supervised
        start = 0
        for length in data.documents(index):
            ids, on = torch.tensor(tokens[start:][:length]), torch.tensor(marks[start:][:length])
            start += length
            log_p = decoder.token_logits(decoder.hidden(ids[None]))[0].log_softmax(-1)
            each = log_p[:-1].gather(-1, ids[1:, None])[:, 0]
            sums.append(each[on[1:]].sum())
            counts.append(int(on[1:].sum()))
    p, n = torch.stack(sums).view(-1, 2), torch.tensor(counts).view(-1, 2)
    q = objective.reference.values if objective.reference is not None else torch.zeros_like(p)
    b, gain = config.beta, p - q
    margin = gain[:, 0] - gain[:, 1]
    mean = p / n
    name = config.objective
    if name == "dpo":
        loss = -(1 / (1 + (-b * margin).exp())).log()
    elif name == "cdpo":
        chance = 1 / (1 + (-b * margin).exp())
        loss = -0.9 * chance.log() - 0.1 * (1 - chance).log()
    elif name == "ipo":
        loss = ((gain / n)[:, 0] - (gain / n)[:, 1] - 0.5 / b).square()
    elif name == "hinge":
        loss = (1 - b * margin).clamp(min=0)
    elif name == "simpo":
        loss = -(1 / (1 + (1.0 - b * (mean[:, 0] - mean[:, 1])).exp())).log()
    elif name == "orpo":
        odds = mean.exp() / (1 - mean.exp())
        loss = -mean[:, 0] - b * (1 / (1 + odds[:, 1] / odds[:, 0])).log()
    else:
        moved = gain[:, 1].mean().clamp(min=0).detach()
        sign = torch.where(torch.from_numpy(data.liked), 1.0, -1.0)
        loss = 1 - 1 / (1 + (-b * sign * (gain[:, 0] - moved)).exp())
    found = torch.autograd.grad(loss.mean(), list(run.trainer.parameters.values()))
    return dict(zip(run.trainer.parameters, found, strict=True))


# --- the reference ---


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_reference_is_the_base_exactly_however_far_the_adapter_went(settings, method, base):
    config = settings(method=method, train_control_tokens="auto")
    run = finetune.prepare(config)
    batch = run.trainer.plan.batch(run.trainer.plan.epoch(0)[0])
    asked = table(run.model.decoder, run.train)
    for name, parameter in run.trainer.parameters.items():
        g = torch.Generator().manual_seed(len(name))
        parameter.data += torch.randn(parameter.shape, generator=g)
    quantization = config.quantization if method == "qlora" else "none"
    plain = load_model(base("llama"), dtype="float32", quantization=quantization)
    with torch.no_grad():
        expected = document_logprobs(plain.decoder.eval(), batch).sums
        moved = document_logprobs(run.model.decoder.eval(), batch).sums
    found = under_the_adapter(run.model.decoder, batch)
    assert torch.equal(found, expected) and not torch.allclose(found, moved)
    # Computed before the first step, in other batches: the same up to the order of sums.
    torch.testing.assert_close(asked(run.model.decoder, batch), found, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_was_taken_off_is_back_as_it_was(settings):
    run = finetune.prepare(settings())
    before = [(name, id(module)) for name, module in run.model.decoder.named_modules()]
    with without_adapter(run.model.decoder):
        assert len([*run.model.decoder.named_modules()]) < len(before)
    assert [(name, id(module)) for name, module in run.model.decoder.named_modules()] == before


def test_asked_once_or_in_every_step_the_run_is_the_same(settings, tmp_path):
    live = finish(finetune.prepare(settings(output=tmp_path / "a")))
    once = finish(finetune.prepare(settings(output=tmp_path / "b", precompute_ref_log_probs=True)))
    assert (tmp_path / "b" / FILE).exists() and not (tmp_path / "a" / FILE).exists()
    for one, other in zip(live, once, strict=True):
        if "loss" in one:
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_an_adapter_that_does_not_begin_empty_is_measured_against_its_own_beginning(
    settings, tmp_path, init
):
    method = "qlora" if init == "loftq" else "lora"
    events = finish(finetune.prepare(settings(init_lora_weights=init, method=method)))
    first = next(event for event in events if event["kind"] == "eval")
    assert (tmp_path / "run" / FILE).exists()
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-4)


# --- runs ---


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_dpo_teaches_which_answers_are_better(settings, other, method):
    # The base has had three steps: its head, which adapters leave alone, has small weights and
    # bounds how far an answer's gain can go. So beta is 1, which wants smaller gains.
    config = settings(
        method=method,
        eval_data=str(other),
        num_train_epochs=12.0,
        learning_rate=2e-2 if method != "full" else 5e-3,
        beta=1.0,
    )
    evaluations = [e for e in finish(finetune.prepare(config)) if e["kind"] == "eval"]
    first, last = evaluations[0], evaluations[-1]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-4)  # the model is its reference
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert last["rewards/accuracies"] > 0.95
    assert last["rewards/margins"] > 1 and last["loss"] < 0.3


# orpo mostly imitates, and kto's slope is a quarter of the others', so both train every weight.
IN_FULL = {
    "orpo": {"beta": 1.0, "learning_rate": 5e-3},
    "kto": {"beta": 0.5, "learning_rate": 2e-3},
}


@pytest.mark.parametrize("objective", ALL[1:])
def test_each_objective_learns(settings, other, objective):
    changes = {"num_train_epochs": 6.0, "learning_rate": 2e-2}
    if objective in IN_FULL:
        changes = {"num_train_epochs": 12.0, "method": "full", **IN_FULL[objective]}
    config = settings(objective=objective, eval_data=str(other), **changes)
    evaluations = [e for e in finish(finetune.prepare(config)) if e["kind"] == "eval"]
    first, last = evaluations[0], evaluations[-1]
    assert last["loss"] < first["loss"]
    # A good answer whose gain is below the mean of the others' (z0) counts as wrong in kto: some
    # always may be, where the other accuracies compare the two answers of a pair.
    assert last["rewards/accuracies"] > (0.9 if objective == "kto" else 0.95)
    assert last["rewards/margins"] > first["rewards/margins"] + {"kto": 1.0}.get(objective, 0.05)


@pytest.mark.parametrize(
    ("objective", "method"), [("dpo", "full"), ("dpo", "lora"), ("kto", "lora"), ("simpo", "full")]
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    settings, tmp_path, monkeypatch, objective, method
):
    monkeypatch.setenv("ARDOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ardor.data.cache.SMALL", 0)

    def made(name: str, **changes) -> Finetune:
        return settings(
            output=tmp_path / name, objective=objective, method=method, save_steps=2, **changes
        )

    finish(finetune.prepare(made("whole", cache=False)))
    run = finetune.prepare(made("parts"))
    assert any("tokens: kept in" in note for note in run.notes)
    for event in run.events():
        if event["kind"] == "train" and event["step"] == 2:
            run.trainer.stop_requested = True
    run = finetune.prepare(made("parts", resume=True))
    assert any("tokens: as encoded before" in note for note in run.notes)
    finish(run)
    whole, parts = (
        sorted((tmp_path / name).glob("checkpoint-*"))[-1] for name in ("whole", "parts")
    )
    files = [path.name for path in whole.iterdir() if path.suffix == ".safetensors"]
    assert files and whole.name == parts.name
    for name in files:
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name


def test_a_resumed_run_that_lost_its_reference_or_changed_its_loss_says_so(settings, tmp_path):
    config = settings(method="full", max_steps=2)
    finish(finetune.prepare(config))
    with pytest.raises(CheckpointError, match=r"beta: 0.1, now 0.2"):
        finetune.prepare(replace(config, beta=0.2, resume=True))
    (tmp_path / "run" / FILE).unlink()
    with pytest.raises(CheckpointError, match=FILE):
        finetune.prepare(replace(config, resume=True))


# --- data ---


@pytest.fixture(scope="module")
def model(base):
    return load_model(base("llama"))


def test_pairs_stay_together_and_only_their_answers_count(model):
    data = judged(model, preferences(6))
    batch = BatchPlan(data, examples_per_batch=4).batch((3, 1))
    assert len(batch.lengths) == 4 and batch.examples == (3, 3, 1, 1)
    tokenizer = tokenizer_of(model)
    for row, part in zip(preferences(6)[3:4], [half(batch, 0)], strict=True):
        kept = part.targets[0][: part.lengths[0]]
        text = tokenizer.decode(kept[kept != IGNORE].tolist(), skip_special=True)
        assert text == row["chosen"]
    assert data.split(0.5)[0].fingerprint != data.fingerprint


def test_equal_and_blank_answers_are_left_out_and_counted(model):
    rows = preferences(3)
    rows[1]["rejected"] = rows[1]["chosen"]
    rows[2]["chosen"] = " "
    data = judged(model, rows)
    assert (len(data), data.census.alike, data.census.empty) == (1, 1, 1)
    assert "1 with two equal answers" in data.census.summary()
    with pytest.raises(DataError, match=r"nothing is left .* 1 with two equal answers"):
        judged(model, rows[1:2])


def test_both_prompts_of_a_pair_are_cut_at_the_same_place(model):
    row = {
        "prompt": "the cat sat on a mat and then",
        "chosen": " it ran",
        "rejected": " it saw one",
    }
    whole = judged(model, [row])
    limit = max(whole.documents(0)) - 3
    data = judged(model, [row], limit=limit)
    first, second = data.documents(0)
    tokens = data[0].tokens
    assert second == limit and data.census.truncated == 1
    prompt = first - 1 - data[0].supervised[:first].count(True)
    assert tokens[: prompt + 1] == tokens[first : first + prompt + 1]
    assert (
        judged(
            model,
            [row, {"prompt": "a", "chosen": "b", "rejected": "c"}],
            limit=limit,
            over_length="drop",
        ).census.dropped
        == 1
    )
    with pytest.raises(DataError, match="longer than max_length"):
        judged(model, [row], limit=limit, over_length="error")


def test_kto_measures_with_the_answers_to_other_prompts(model):
    rows = [
        {"prompt": "the cat", "completion": " sat", "label": True},
        {"prompt": "a dog", "completion": " ran away", "label": False},
    ]
    data = judged(model, rows, "labels")
    assert [data.likes(0), data.likes(1)] == [True, False]
    tokenizer = tokenizer_of(model)
    first, _ = data.documents(0)
    assert tokenizer.decode(list(data[0].tokens[first:]), skip_special=True) == "the cat ran away"
    assert len(judged(model, preferences(3), "labels")) == 6  # a pair is two answers


def test_an_answer_to_the_same_prompt_is_no_answer_to_another(model):
    asked = ["the cat", "a dog", "the cat", "the cat", "the cat"]  # halves that begin alike
    answers = [" sat", " ran away", " saw", " is", " was here"]
    rows = [
        {"prompt": prompt, "completion": answer, "label": True}
        for prompt, answer in zip(asked, answers, strict=True)
    ]
    data, tokenizer = judged(model, rows, "labels"), tokenizer_of(model)
    for index, prompt in enumerate(asked):
        first, _ = data.documents(index)
        found = tokenizer.decode(list(data[index].tokens[first:]), skip_special=True)
        assert found in [
            prompt + answer for other, answer in zip(asked, answers, strict=True) if other != prompt
        ]
    with pytest.raises(DataError, match="all 4 labelled answers are to one prompt"):
        judged(model, [one for one in rows if one["prompt"] == "the cat"], "labels")


# --- mistakes ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "beta=0.0 must be above 0"),
        ({"beta": -1.0}, "beta=-1.0 must be above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5 must be at least 0 and below 0.5"),
        ({"objective": "ipo", "label_smoothing": 0.1}, "is for objective dpo, cdpo"),
        ({"objective": "sft", "beta": 0.1}, "beta=0.1 is for objective dpo"),
        ({"objective": "simpo", "precompute_ref_log_probs": True}, "is for objective dpo"),
        ({"preferences": "chosen"}, "trains on the chosen answers alone"),
        ({"method": "full", "precompute_ref_log_probs": False}, "changes the weights"),
        ({"objective": "kto", "neftune_noise_alpha": 5.0}, "no place in objective kto"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


@pytest.mark.parametrize(
    ("objective", "row", "message"),
    [
        (
            "dpo",
            {"prompt": "a", "completion": "b"},
            "expected chosen and rejected .*--objective out",
        ),
        ("dpo", {"prompt": "a", "completion": "b", "label": True}, "--objective kto"),
        ("kto", {"prompt": "a", "completion": "b"}, "expected prompt, completion and label"),
        ("kto", {"prompt": "a", "completion": "b", "label": "so"}, "label is 'so'"),
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": ["c"]}, "expected two strings or"),
    ],
)
def test_other_data_are_refused_from_the_command_line(
    tmp_path, base, capsys, objective, row, message
):
    data = write_rows(tmp_path / "data.jsonl", [row])
    args = ["finetune", str(base("llama")), str(data), "-o", str(tmp_path / "run")]
    assert main([*args, "--objective", objective]) == 2
    shown = " ".join(capsys.readouterr().err.split())

    assert re.search(message, shown), shown
    assert not (tmp_path / "run").exists()


def test_a_long_pass_of_the_reference_shows_how_far_it_is(
    tmp_path, base, compared, capsys, monkeypatch
):
    args = ["finetune", str(base("llama")), str(compared), "--objective", "dpo", "--max-steps", "1"]
    args += ["--precompute-ref-log-probs", "--eval-fraction", "0.25"]
    assert main([*args, "-o", str(tmp_path / "short")]) == 0
    short = capsys.readouterr().err
    monkeypatch.setattr(console, "QUIET", 0.0)
    assert main([*args, "-o", str(tmp_path / "long")]) == 0
    assert "asking the reference  24/24" in capsys.readouterr().err
    assert "asking the reference" not in short


def test_from_the_command_line_to_a_report(tmp_path, base, compared, capsys):
    args = ["finetune", str(base("llama")), str(compared), "-o", str(tmp_path / "run")]
    assert main([*args, "--objective", "dpo", "--beta", "0.2", "--max-steps", "2"]) == 0
    shown = capsys.readouterr().err
    assert "objective: dpo, beta 0.2; reference: the base under the adapter" in shown
    assert "accuracy" in shown
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    train = next(row for row in map(json.loads, lines) if row["kind"] == "train")
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"} <= {
        *train
    }
    assert "Margin of rewards" in (tmp_path / "run" / "report.html").read_text()
