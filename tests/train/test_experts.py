"""A model with experts is trained whole or beside its experts, and its routers are kept even."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from ardor.arch.experts import load_balance
from ardor.data.batches import BatchPlan
from ardor.data.dataset import Dataset
from ardor.files.runs import newest_checkpoint
from ardor.load import load_model, tokenizer_of
from ardor.loss import IGNORE
from ardor.score import document_loss, heldout_loss
from ardor.train import finetune
from ardor.train.config import Finetune, Optimisation
from ardor.train.trainer import Hooks, Trainer

from ..tiny import SIZES, sentences
from .conftest import finish

SHARE = 0.3


@pytest.fixture(scope="module")
def experts(base, tmp_path_factory) -> dict[str, Path]:
    """Random models with the tokenizer of the tiny base model, by model_type."""
    tiny = newest_checkpoint(base("llama"))
    assert tiny is not None
    sizes = {k: v for k, v in SIZES.items() if k not in ("max_length", "dtype")}
    sizes |= {"num_key_value_heads": 1, "router_aux_loss_coef": SHARE}
    sizes["vocab_size"] = load_model(tiny).decoder.spec.vocab
    qwen = Qwen2MoeConfig(
        **sizes,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )
    found = {}
    torch.manual_seed(0)
    for theirs in (
        MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4)),
        Qwen2MoeForCausalLM(qwen),
    ):
        name = theirs.config.model_type
        found[name] = tmp_path_factory.mktemp("experts") / name
        shutil.copytree(tiny, found[name])
        (found[name] / "model.safetensors").unlink()
        theirs.save_pretrained(found[name])
    return found


@pytest.fixture
def trainer(experts, tmp_path):
    model = load_model(experts["mixtral"], dtype="float32")
    for parameter in model.decoder.parameters():
        parameter.data = parameter.data.clone()
    model.decoder.requires_grad_(True)
    dataset = Dataset.from_documents(sentences(9, seed=5), tokenizer_of(model))
    plan = BatchPlan(dataset, examples_per_batch=3)
    config = Optimisation(learning_rate=1e-3, gradient_accumulation_steps=3, max_grad_norm=0.0)
    return Trainer(model.decoder, plan, config, tmp_path, Hooks(lambda directory: None))


def step(trainer: Trainer, monkeypatch, share: float):
    """The gradients of one step, and its event, with the weights left alone."""
    decoder, seen = trainer.decoder, {}
    decoder.spec = replace(decoder.spec, balance=share)

    def keep() -> None:
        seen.update({name: p.grad.clone() for name, p in trainer.parameters.items()})

    monkeypatch.setattr(trainer.optimizer, "step", keep)
    batches = [trainer.plan.batch(members) for members in trainer.plan.epoch(0)]
    return seen, trainer._step(batches, 0, 0), batches


def test_an_uneven_choice_costs_once_per_target_and_is_not_told(trainer, monkeypatch):
    plain, told, batches = step(trainer, monkeypatch, 0.0)
    found, event, _ = step(trainer, monkeypatch, SHARE)
    assert event["loss"] == told["loss"]

    targets = [int((batch.targets != IGNORE).sum()) for batch in batches]
    assert len({*targets}) > 1  # else a mean over batches would pass too
    total = torch.zeros(())
    for batch, count in zip(batches, targets, strict=True):
        routings = []
        document_loss(trainer.decoder, batch, routings)
        assert len(routings) == 2  # layers
        total = total + SHARE * load_balance(routings) * count / sum(targets)
    names = [*trainer.parameters]
    wanted = torch.autograd.grad(total, [trainer.parameters[n] for n in names], allow_unused=True)
    for name, gradient in zip(names, wanted, strict=True):
        added = torch.zeros_like(plain[name]) if gradient is None else gradient
        torch.testing.assert_close(found[name], plain[name] + added, rtol=1e-4, atol=1e-6, msg=name)
    router = "layers.0.ffn.router.weight"
    assert not torch.allclose(found[router], plain[router], rtol=1e-2, atol=1e-6)  # it reaches it


def test_evaluation_does_not_count_it(trainer):
    decoder = trainer.decoder
    batches = [trainer.plan.batch(members) for members in trainer.plan.epoch(0)]
    assert decoder.spec.balance == SHARE
    found = heldout_loss(decoder, batches)
    decoder.spec = replace(decoder.spec, balance=0.0)
    assert float(heldout_loss(decoder, batches).nats) == float(found.nats)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize(
    ("method", "note"),
    [
        ("full", "M parameters, trained; 0.3 x"),
        ("lora", "frozen under adapters of their own on 6 maps"),
    ],
)
def test_a_run_on_experts_says_what_becomes_of_them(experts, pairs, tmp_path, family, method, note):
    config = Finetune(
        model=str(experts[family]),
        data=str(pairs),
        output=tmp_path / "run",
        method=method,
        max_steps=2,
        learning_rate=1e-2,
        lora_r=2 if method != "full" else Finetune.lora_r,
        dtype="float32",
    )
    run = finetune.prepare(config)
    assert any(line.startswith("experts: ") and note in line for line in run.notes)
    before = {n: p.detach().clone() for n, p in run.model.decoder.named_parameters()}
    finish(run)
    trained = {n for n, p in run.model.decoder.named_parameters() if not torch.equal(p, before[n])}
    adapters = {n for n in before if n.endswith(("lora_A", "lora_B"))}
    stacked = {n for n in before if ".ffn.experts." in n or ".ffn.router." in n} - adapters
    assert method == "full" or any(".ffn.experts." in name for name in trained)
    assert stacked <= trained if method == "full" else trained and not stacked & trained

    again = load_model(tmp_path / "run", dtype="float32").decoder
    ids = torch.arange(3, 12)[None]
    expected = run.model.decoder.eval().logits(run.model.decoder.hidden(ids))
    torch.testing.assert_close(again.eval().logits(again.hidden(ids)), expected)


def test_a_model_without_experts_has_no_note_of_them(base, pairs, tmp_path):
    config = Finetune(
        model=str(base("llama")), data=str(pairs), output=tmp_path / "run", max_steps=1
    )
    assert not any("experts" in line for line in finetune.prepare(config).notes)
