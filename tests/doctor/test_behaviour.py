"""What a model does is seen: each rule on a stand-in that does wrong, and on what is well."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch

import ardor
from ardor.doctor.probe import QUESTIONS, Answer, Probe
from ardor.doctor.rules import behaviour

from .damage import EMBED, NORM, Case, check, edit, look, said, template, value, weights

PACKAGE = import_module("ardor.doctor")  # `ardor.doctor` is the function
SEEN = Probe(seconds=0.1, bytes=10)
PASSED = Answer("Hi", "x", 5, "length", "<|im_start|>")
CASES = {
    "runs": [Case(lambda seen: replace(seen, failed="no"), "E", ("no",))],
    "finite-outputs": [Case(lambda seen: replace(seen, finite=False), "E", ("NaN or infinite",))],
    "documents-apart": [Case(lambda seen: replace(seen, packed=0.1), "E", ("see each other",))],
    "batch-apart": [Case(lambda seen: replace(seen, batched=0.5), "E", ("0.5 nats",))],
    "left-padding": [Case(lambda seen: replace(seen, left_padded=0.4), "W", ("position_ids",))],
    "activation-range": [Case(lambda seen: replace(seen, largest=7e4), "W", ("7e+04",))],
    "writes-past-end": [
        Case(lambda seen: replace(seen, answers=(PASSED,)), "W", ("<|im_start|> after 'Hi'",))
    ],
    "beyond-vocabulary": [Case(lambda seen: replace(seen, beyond=0.08), "I", ("8.0% of",))],
}
WELL = {
    "runs": SEEN,
    "finite-outputs": SEEN,
    "documents-apart": replace(SEEN, packed=0.01, compute=torch.bfloat16),  # rounding
    "batch-apart": replace(SEEN, batched=1e-4),
    "left-padding": replace(SEEN, left_padded=1e-6),
    "activation-range": replace(SEEN, largest=5e4),
    "writes-past-end": replace(SEEN, answers=(replace(PASSED, passed=None),)),
    "beyond-vocabulary": replace(SEEN, beyond=0.001),
}


def look_with(chat, monkeypatch, seen: Probe):
    monkeypatch.setattr(PACKAGE, "observe", lambda *args, **settings: seen)
    return look(chat, probe=True, weights=False)


@pytest.mark.parametrize(("rule", "case"), [(r, c) for r, cases in CASES.items() for c in cases])
def test_a_rule_finds_what_it_is_for(chat, monkeypatch, rule, case):
    check(look_with(chat, monkeypatch, case.change(SEEN)), rule, case)


@pytest.mark.parametrize("rule", WELL)
def test_a_rule_leaves_what_only_looks_alike(chat, monkeypatch, rule):
    assert not said(look_with(chat, monkeypatch, WELL[rule]), rule)


def test_every_rule_has_both():
    assert {*CASES} == {*WELL} == {*behaviour.RULES}


def test_a_small_model_is_run_by_itself_and_is_well(chat):
    report = ardor.doctor(chat)
    assert not [f for f in report.findings if f.level != "I"] and report.probe is not None
    seen = report.probe
    assert seen.finite and seen.packed < 1e-3 and seen.batched < 1e-3 and seen.left_padded is None
    # The share on ids without a token is that of a model that was hardly trained: 40 rows of 320.
    assert seen.beyond == pytest.approx(40 / 320, abs=0.02)
    assert [a.prompt for a in seen.answers] == [*QUESTIONS]
    assert "loads 0 MiB of weights" in report.probe_note


def test_it_is_seen_that_an_answer_ends(chat):
    """The embedding is the head: a model that always says one token says its end, or no end."""

    def always(id: int):
        def change(held):
            held["model.norm.weight"][:] = 1.0
            held[EMBED][:] = 0.01
            held[EMBED][id] = 1.0

        return weights(change)

    # Shorter questions than the context of 48.
    for id, ended in ((279, "stop_token"), (278, "length"), (40, "length")):
        always(id)(chat)
        (answer,) = [
            a
            for a in ardor.doctor(chat, probe=True).probe.answers
            if a.prompt == "Hello! Who are you?"
        ]
        assert (answer.stop_reason == ended) or (
            ended == "length" and answer.stop_reason == "context"
        )
        assert answer.passed == ("<|im_start|>" if id == 278 else None)


def test_nan_is_seen_where_weights_are_not_read(chat):
    value(NORM, 0, torch.nan)(chat)
    report = ardor.doctor(chat, weights=False, probe=True)
    assert said(report, "finite-outputs") and not said(report, "not-finite")


def test_a_model_that_cannot_be_loaded_is_a_finding(chat):
    edit("config.json", hidden_act="mish")(chat)
    report = ardor.doctor(chat, probe=True)
    assert "mish" in said(report, "runs")[0][1]
    assert ardor.doctor(chat).probe is None  # an error already


def test_a_large_model_is_run_only_if_asked(chat, monkeypatch):
    monkeypatch.setattr(PACKAGE, "SMALL", 10)
    report = ardor.doctor(chat)
    assert report.probe is None and "--probe" in report.probe_note
    assert ardor.doctor(chat, probe=True).probe is not None


def test_a_template_that_refuses_the_question_is_told(chat):
    template("{{ raise_exception('never') }}")(chat)
    answers = ardor.doctor(chat, probe=True).probe.answers
    assert all("never" in answer.stop_reason and not answer.tokens for answer in answers)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "moves"), [("ctrl", True), ("xglm", None)])
def test_a_model_that_transformers_runs_is_padded_on_the_left(tmp_path, kind, moves):
    """Learned or sinusoidal positions count the padding unless they are told not to."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = {
        "ctrl": lambda: transformers.CTRLConfig(
            vocab_size=64, n_positions=64, n_embd=16, dff=32, n_layer=2, n_head=2
        ),
        "xglm": lambda: transformers.XGLMConfig(
            vocab_size=64, d_model=16, ffn_dim=32, num_layers=2, attention_heads=2
        ),
    }[kind]()
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    report = ardor.doctor(tmp_path, probe=True, trust_remote_code=True)
    seen = report.probe
    assert seen is not None and seen.failed is None, seen
    assert seen.left_padded is not None and seen.packed < 1e-3
    assert moves is None or bool(said(report, "left-padding")) is moves
