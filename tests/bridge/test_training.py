"""Fine-tuning what transformers runs: it learns, resumes bitwise, and PEFT reads its adapters."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model

from ardor.adapters.lora import LoraConfig, LoraLinear, add_lora, lora_modules, lora_parameters
from ardor.adapters.merge import merge
from ardor.cli.main import main
from ardor.data.batches import Batch
from ardor.errors import ConfigError
from ardor.files.runs import newest_checkpoint
from ardor.lm import load
from ardor.loss import IGNORE
from ardor.save import save_model
from ardor.score import document_loss
from ardor.train import finetune
from ardor.train.config import Finetune

from ..tiny import sentences, write_rows
from .conftest import ran, theirs, write_native, write_odd

# A warning inside PEFT with this transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

TOKENS = torch.randint(0, 280, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    return write_rows(file, [{"text": text} for text in sentences(12)])


def tune(model: Path, rows: Path, output: Path, **changes: Any) -> list[dict[str, Any]]:
    given: dict[str, Any] = {"max_steps": 6, "learning_rate": 2e-2, "dtype": "float32"}
    given |= {} if changes.get("method") == "full" else {"lora_r": 2}
    given |= {"eval_fraction": 0.0, "trust_remote_code": True, **changes}
    config = Finetune(model=str(model), data=str(rows), output=output, **given)
    return [dict(event) for event in finetune.prepare(config).events()]


def newest(run: Path) -> Path:
    found = newest_checkpoint(run)
    assert found is not None
    return found


def losses(events: list[dict[str, Any]]) -> list[float]:
    return [event["loss"] for event in events if event["kind"] == "train"]


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def adapted(path: Path, config: LoraConfig) -> Any:
    """The model with an adapter as if it had been trained."""
    lm = load(path, trust_remote_code=True)
    names = lm.model.form.disk_linears()
    add_lora(lm.model.decoder, config, names=lambda name: names[name].name)
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in lora_parameters(lm.model.decoder):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    lm.model.adapter = config
    return lm


def test_the_loss_of_a_ragged_batch_and_its_gradients_are_theirs(odd):
    decoder = load(odd, trust_remote_code=True).model.decoder.requires_grad_(True)
    decoder.tokens_known = None  # transformers counts rows that no token has, too
    peer = theirs(odd)
    lengths, flat = (4, 4, 7, 3), TOKENS.flatten()
    targets = flat.roll(-1).clone()
    targets[torch.tensor(lengths).cumsum(0) - 1] = IGNORE
    targets[1] = IGNORE
    found = document_loss(decoder, Batch(flat[None], targets[None], lengths, (0, 1, 2, 3)))
    found.nats.backward()
    nats, start = torch.zeros(()), 0
    for length in lengths:
        piece = slice(start, start + length)
        logits = peer(flat[piece][None]).logits[0]
        nats = nats + torch.nn.functional.cross_entropy(
            logits, targets[piece], ignore_index=IGNORE, reduction="sum"
        )
        start += length
    nats.backward()
    same(found.nats.detach(), nats.detach())
    for ours, wanted in zip(decoder.foreign.parameters(), peer.parameters(), strict=True):
        assert ours.grad is not None and wanted.grad is not None
        same(ours.grad, wanted.grad)


def test_lora_learns_and_its_files_are_pefts(odd, rows, tmp_path):
    events = losses(tune(odd, rows, tmp_path / "run"))
    assert events[-1] < events[0] - 0.3
    checkpoint = newest(tmp_path / "run")
    lm = load(tmp_path / "run", trust_remote_code=True)
    with torch.no_grad():
        base = theirs(odd)(TOKENS).logits
        wanted = PeftModel.from_pretrained(theirs(odd), checkpoint).eval()(TOKENS).logits
        same(lm.logits(TOKENS), wanted)
        assert (wanted - base).abs().max() > 0.1
    assert {name for name, _ in lora_modules(lm.model.decoder)} == {
        f"foreign.blocks.{i}.{name}" for i in range(2) for name in ("qkv", "out")
    }
    assert lm.generate("the cat", max_new_tokens=3).tokens


def test_a_run_does_not_hand_trust_on(tokenizer, rows, tmp_path):
    path = write_odd(tmp_path / "base", tokenizer)
    tune(path, rows, tmp_path / "run", max_steps=1)
    path.with_name("base-ran").unlink()
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["trust_remote_code"] is False
    for name, given in ((tmp_path / "run", {}), (path, {"adapter": newest(tmp_path / "run")})):
        with pytest.raises(ConfigError, match=r"is an adapter on .*base.*; give trust_remote_code"):
            load(name, **given)
    assert not ran(path)


def test_the_adapter_of_a_stranger_does_not_bring_trust_either(tokenizer, tmp_path):
    path = write_odd(tmp_path / "base", tokenizer)
    config = PeftConfig(r=2, target_modules=["qkv"], task_type="CAUSAL_LM")
    with_adapter = get_peft_model(theirs(path), config)
    with_adapter.save_pretrained(tmp_path / "adapter")
    path.with_name("base-ran").unlink()
    with pytest.raises(ConfigError, match="model_type='odd' is not implemented"):
        load(tmp_path / "adapter")
    assert not ran(path)
    assert load(tmp_path / "adapter", trust_remote_code=True).model.adapter is not None


@pytest.mark.parametrize("method", ["lora", "full", "qlora"])
def test_a_resumed_run_is_the_uninterrupted_one_bitwise(tokenizer, rows, tmp_path, method):
    # Its own dropout acts in training: the random numbers must go on too.
    path = write_odd(tmp_path / "odd", tokenizer, dropout=0.2)
    # The checkpoint that it goes on from is dropped on the way, with the code in it.
    given = {"method": method, "save_steps": 2, "eval_steps": 100, "save_total_limit": 1}
    whole = losses(tune(path, rows, tmp_path / "whole", max_steps=4, **given))
    config = Finetune(
        model=str(path), data=str(rows), output=tmp_path / "cut", max_steps=4,
        lora_r=Finetune.lora_r if method == "full" else 2,
        learning_rate=2e-2, dtype="float32", eval_fraction=0.0, trust_remote_code=True, **given,
    )  # fmt: skip
    run = finetune.prepare(config)
    for event in run.events():
        if event["kind"] == "train" and event["step"] == 2:
            run.trainer.stop_requested = True
    torch.manual_seed(123)
    rest = losses(tune(path, rows, tmp_path / "cut", max_steps=4, resume=True, **given))
    assert rest == whole[2:]
    weights = "model" if method == "full" else "adapter_model"
    ends = [newest(tmp_path / name) / f"{weights}.safetensors" for name in ("whole", "cut")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_full_fine_tuning_leaves_a_checkpoint_that_transformers_reads(odd, rows, tmp_path):
    events = losses(tune(odd, rows, tmp_path / "run", method="full"))
    assert events[-1] < events[0] - 0.3
    lm = load(tmp_path / "run", trust_remote_code=True)
    with torch.no_grad():
        same(lm.logits(TOKENS), theirs(newest(tmp_path / "run"))(TOKENS).logits)
    with pytest.raises(ConfigError, match="model_type='odd' is not implemented"):
        load(tmp_path / "run")


def test_qlora_is_lora_on_quantized_linears(odd, rows, tmp_path):
    events = losses(tune(odd, rows, tmp_path / "run", method="qlora"))
    assert events[-1] < events[0] - 0.3
    lm = load(tmp_path / "run", trust_remote_code=True)
    assert lm.model.quantization == "nf4"
    (name, module), *_ = lora_modules(lm.model.decoder)
    assert hasattr(module.base, "dequantized"), name


@pytest.mark.parametrize("targets", ["all-linear", ("qkv",), ("blocks.1.out", "unembed")])
def test_targets_mean_what_they_mean_for_ours(odd, tmp_path, targets):
    lm = adapted(odd, LoraConfig(r=2, target_modules=targets, use_rslora=True))
    found = {name.removeprefix("foreign.") for name, _ in lora_modules(lm.model.decoder)}
    wanted = {
        "all-linear": {f"blocks.{i}.{name}" for i in range(2) for name in ("qkv", "out")},
        ("qkv",): {"blocks.0.qkv", "blocks.1.qkv"},
        ("blocks.1.out", "unembed"): {"blocks.1.out", "unembed"},
    }[targets]
    assert found == wanted
    save_model(lm.model, tmp_path / "adapter")
    with torch.no_grad():
        peer = PeftModel.from_pretrained(theirs(odd), tmp_path / "adapter").eval()
        same(lm.logits(TOKENS), peer(TOKENS).logits)
        again = load(odd, adapter=tmp_path / "adapter", trust_remote_code=True)
        assert torch.equal(again.logits(TOKENS), lm.logits(TOKENS))


def test_a_target_that_is_not_there_names_those_near(odd):
    with pytest.raises(ConfigError, match="'qvk' matches no linear .*did you mean qkv"):
        adapted(odd, LoraConfig(target_modules=("qvk",)))


def test_a_saved_target_names_no_module_that_is_not_adapted(tokenizer, tmp_path):
    """PEFT compares targets with all modules, and refuses one that is no linear."""

    def ambiguous(source):
        return source.replace("self.table = None", "self.out = nn.Identity(); self.table = None")

    path = write_odd(tmp_path / "odd", tokenizer, ambiguous)
    lm = adapted(path, LoraConfig(r=2, target_modules=("out",)))
    save_model(lm.model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["0.out", "1.out"]
    with torch.no_grad():
        peer = PeftModel.from_pretrained(theirs(path), tmp_path / "adapter").eval()
        same(lm.logits(TOKENS), peer(TOKENS).logits)


def test_gpt2s_transposed_linears_are_adapted_too(tokenizer, rows, tmp_path):
    path = write_native(tmp_path / "gpt", tokenizer, "openai-gpt")
    found = losses(tune(path, rows, tmp_path / "run"))
    assert found[-1] < found[0]
    config = json.loads((newest(tmp_path / "run") / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"]
    lm = load(tmp_path / "run", trust_remote_code=True)
    with torch.no_grad():
        peer = PeftModel.from_pretrained(theirs(path), newest(tmp_path / "run")).eval()
        same(lm.logits(TOKENS), peer(TOKENS).logits)
    with pytest.raises(ConfigError, match="is a Conv1D, into which nothing can be merged"):
        merge(lm.model.decoder)


def test_a_merged_adapter_is_saved_with_the_weights(odd, tmp_path):
    lm = adapted(odd, LoraConfig(r=2))
    with torch.no_grad():
        before = lm.logits(TOKENS)
        merge(lm.model.decoder)
        assert not any(isinstance(m, LoraLinear) for m in lm.model.decoder.modules())
        same(lm.logits(TOKENS), before)
        lm.save(tmp_path / "merged")
        same(theirs(tmp_path / "merged")(TOKENS).logits, before)


@pytest.mark.sweep
def test_a_linear_that_their_code_takes_apart_is_named(tokenizer, rows, tmp_path):
    path = write_native(tmp_path / "rwkv", tokenizer, "rwkv")
    with pytest.raises(ConfigError, match=r"Rwkv\w+ reads 'weight' of rwkv\.blocks.* a LoraLinear"):
        tune(path, rows, tmp_path / "run", eval_fraction=0.2)
    found = losses(tune(path, rows, tmp_path / "r", target_modules=("key", "receptance")))
    assert found[-1] < found[0]
    lm = load(tmp_path / "r", trust_remote_code=True)
    with torch.no_grad():
        peer = PeftModel.from_pretrained(theirs(path), newest(tmp_path / "r")).eval()
        same(lm.logits(TOKENS), peer(TOKENS).logits)


def test_token_rows_are_refused_with_the_way_around_them(odd, tmp_path):
    pairs = [
        {"prompt": a, "completion": b} for a, b in zip(sentences(3), sentences(3), strict=True)
    ]
    rows = write_rows(tmp_path / "pairs.jsonl", pairs)
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}<a>{{ m['content'] }}{% endfor %}")
    with pytest.raises(ConfigError, match="--train-control-tokens no"):
        adapted(odd, LoraConfig(r=2, trainable_token_indices=(1,)))
    tune(odd, rows, tmp_path / "run", max_steps=1, chat_template=str(template))


def test_the_commands_go_all_the_way(odd, rows, tmp_path, capsys):
    run, flag = str(tmp_path / "run"), "--trust-remote-code"
    options = f"--max-steps 3 --lora-r 2 --dtype float32 --eval-fraction 0.2 -o {run}".split()
    assert main(["finetune", str(odd), str(rows), *options, flag]) == 0
    said = capsys.readouterr().err
    assert "about to run its own code" in said and "lora" in said
    assert main(["score", run, str(rows), "--json", flag]) == 0
    assert math.isfinite(json.loads(capsys.readouterr().out)["loss"])
    assert main(["generate", run, "the cat", "-n", "3", flag]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["generate", run, "the cat"]) == 2
    assert "give trust_remote_code=True (--trust-remote-code)" in capsys.readouterr().err
