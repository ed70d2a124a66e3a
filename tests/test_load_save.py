"""From a name to a model and back to files; what is scored is what the logits say."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ardor
from ardor import load as public_load
from ardor.adapters.merge import merge
from ardor.errors import CheckpointError, ConfigError, ShapeError
from ardor.files.hub import Resolved
from ardor.files.runs import newest_checkpoint
from ardor.lm import LM
from ardor.load import load_model, tokenizer_of
from ardor.quant.linear import QuantizedLinear
from ardor.save import save_model
from ardor.score import Score

from .tiny import World, make_world, sentences

TEXT = "the cat sat on that hill and then it ran far away"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def newest(run: Path) -> Path:
    found = newest_checkpoint(run)
    assert found is not None
    return found


def logits(lm: LM) -> Tensor:
    return lm.logits([lm.tokenizer.encode(TEXT)])


# --- names ---


def test_a_run_a_checkpoint_and_a_directory_are_the_same_model(world, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(newest(world.base), copy)
    run, checkpoint, directory = map(public_load, (world.base, str(newest(world.base)), copy))
    assert torch.equal(logits(run), logits(checkpoint))
    assert torch.equal(logits(run), logits(directory))
    assert run.model.source == str(newest(world.base).resolve())
    assert run.model.revision is None and run.model.adapter is None


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_an_adapter_finds_its_base_and_how_it_was_held(world, kind):
    run = getattr(world, kind)
    alone = public_load(run, dtype="float32")
    assert torch.equal(logits(alone), logits(public_load(newest(run), dtype="float32")))
    on_base = public_load(world.base, adapter=newest(run), dtype="float32")
    assert torch.equal(logits(alone), logits(on_base))
    assert torch.equal(logits(alone), logits(public_load(world.base, adapter=run, dtype="float32")))
    base = public_load(world.base, dtype="float32")
    assert not torch.allclose(logits(alone), logits(base), atol=1e-3)  # the adapter does something

    quantized = [m for m in alone.model.decoder.modules() if isinstance(m, QuantizedLinear)]
    assert alone.model.quantization == ("nf4" if kind == "qlora" else None)
    assert bool(quantized) == (kind == "qlora")
    other = public_load(run, dtype="float32", quantization="none" if kind == "qlora" else "nf4")
    assert not torch.equal(logits(alone), logits(other))
    assert alone.model.source == base.model.source


def test_an_adapter_brings_the_chat_template_it_was_trained_with(world):
    assert public_load(world.base).model.template is None
    tuned = public_load(world.lora)
    assert tuned.model.template is not None
    assert tuned.chat([{"role": "user", "content": "the cat"}], max_new_tokens=3).tokens


def test_an_adapter_asks_the_hub_for_the_revision_it_was_trained_on(world, tmp_path, monkeypatch):
    adapter, base = tmp_path / "adapter", newest(world.base)
    shutil.copytree(newest(world.lora), adapter)
    config = adapter / "adapter_config.json"
    said = json.loads(config.read_text())
    config.write_text(
        json.dumps(said | {"base_model_name_or_path": "owner/base", "revision": "abc123"})
    )
    asked = []

    def resolve(name, revision=None, patterns=()):
        asked.append((name, revision))
        return Resolved(base, revision)

    monkeypatch.setattr(sys.modules[load_model.__module__], "resolve", resolve)
    load_model(adapter)
    load_model(adapter, revision="main")
    load_model("owner/other", adapter=adapter)
    assert asked == [("owner/base", "abc123"), ("owner/base", "main"), ("owner/other", None)]


def test_a_base_that_has_moved_is_named_with_the_remedy(world, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(newest(world.base), base)
    shutil.copytree(newest(world.lora), adapter)
    config = adapter / "adapter_config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps(said | {"base_model_name_or_path": str(base)}))
    before = logits(public_load(adapter))
    base.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=f"was at {base}, which does not exist; .*as adapter"):
        public_load(adapter)
    moved = public_load(tmp_path / "moved", adapter=adapter)
    assert torch.equal(logits(moved), before)
    config.write_text(json.dumps(said | {"base_model_name_or_path": None}))
    with pytest.raises(CheckpointError, match=r"adapter_config.json does not name its base model"):
        public_load(adapter)


def test_a_run_without_a_checkpoint_says_what_is_missing(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("data: x\n")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors .*found config\.yaml"):
        public_load(run)
    with pytest.raises(CheckpointError, match="is not a directory"):
        public_load(tmp_path / "no such")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "adapter_config.json"])
def test_a_file_that_holds_no_object_is_refused(world, tmp_path, file):
    run = world.lora if file == "adapter_config.json" else world.base
    shutil.copytree(newest(run), tmp_path / "m")
    (tmp_path / "m" / file).write_text("[]")
    with pytest.raises(CheckpointError, match=f"{file} holds a JSON list, expected an object"):
        public_load(tmp_path / "m")


def test_an_empty_name_and_an_adapter_on_an_adapter_are_refused(world):
    with pytest.raises(CheckpointError, match="the model's name is empty"):
        public_load("")
    with pytest.raises(CheckpointError, match="is an adapter itself, .*give the base model, and"):
        public_load(world.lora, adapter=world.qlora)


# --- how the model is held ---


def test_dtype_under_both_of_its_names(world):
    for given in ({"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}, {"dtype": "bf16"},
                  {"dtype": "bf16", "torch_dtype": torch.bfloat16}):  # fmt: skip
        lm = public_load(world.base, **given)
        assert {p.dtype for p in lm.model.decoder.parameters()} == {torch.bfloat16}
        assert lm.model.decoder.compute == torch.bfloat16
        assert logits(lm).dtype == torch.float32
    assert public_load(world.base).model.precision.weights == torch.float32  # as stored
    with pytest.raises(ConfigError, match="dtype=float32 and torch_dtype=bfloat16 differ"):
        public_load(world.base, dtype="float32", torch_dtype="bfloat16")
    for name in ("int8", torch.int8, torch.float8_e4m3fn):
        with pytest.raises(ConfigError, match=f"dtype '{name}' is not one of auto, float32"):
            public_load(world.base, dtype=name)


def test_the_accepted_spellings_of_four_bits_and_of_a_device(world):
    assert public_load(world.base, load_in_4bit=True).model.quantization == "nf4"
    both = public_load(world.base, load_in_4bit=True, quantization="nf4-dq")
    assert both.model.quantization == "nf4-dq"
    eight = public_load(world.base, load_in_8bit=True)
    assert eight.model.quantization == "llm-int8"
    assert public_load(world.base, quantization="int8").model.quantization == "llm-int8"
    with pytest.raises(ConfigError, match="load_in_4bit and quantization='none' differ"):
        public_load(world.base, load_in_4bit=True, quantization="none")
    with pytest.raises(ConfigError, match="quantization='int3' is not known; choose one of nf4"):
        public_load(world.base, quantization="int3")
    for place in ("cpu", torch.device("cpu"), {"": "cpu"}, None):
        lm = public_load(world.base, device_map=place, low_cpu_mem_usage=True, use_cache=True)
        assert lm.model.decoder.device.type == "cpu"
    for place in ("automatic", "meta", "cuda:99", 99, {"": 99}, {"": "gpu"}):
        with pytest.raises(ConfigError, match="is not a device of this machine; give one such as"):
            public_load(world.base, device_map=place)
    with pytest.raises(ConfigError, match="attn_implementation='flash' is not one of"):
        public_load(world.base, attn_implementation="flash")


def test_what_was_chosen_and_why_is_said_once(world, capfd):
    public_load(world.base, dtype="bfloat16")
    out, said = capfd.readouterr()
    wanted = "weights in bfloat16, computing in bfloat16 (as asked), on cpu"
    assert (out, said) == ("", f"{world.base}: {wanted}\n")
    public_load(world.qlora)
    assert "linears in nf4, other weights in float32" in capfd.readouterr().err


def test_what_other_loaders_take_for_granted_is_accepted(world):
    defaults = {"load_in_8bit": False, "trust_remote_code": False, "max_memory": None}
    assert public_load(world.base, **defaults, offload_folder=None)


@pytest.mark.parametrize("quantization", ["nf4", "nf4-dq"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantized_model_computes_with_its_dequantized_weights(world, quantization, dtype):
    found = public_load(world.base, quantization=quantization, dtype=dtype)
    dense = public_load(world.base, dtype=dtype)
    before = logits(dense)
    replaced = 0
    for name, module in found.model.decoder.named_modules():
        if isinstance(module, QuantizedLinear):
            linear = dense.model.decoder.get_submodule(name)
            linear.weight.data = module.dequantized(linear.weight.dtype)
            replaced += 1
    assert replaced == 2 * 7
    torch.testing.assert_close(logits(found), logits(dense), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(found), before, atol=1e-4)  # 4 bits do round


def test_nothing_that_is_loaded_takes_a_gradient(world):
    for run in (world.base, world.lora, world.qlora):
        decoder = public_load(run).model.decoder
        assert not any(p.requires_grad for p in decoder.parameters())
        assert not decoder.training


# --- back to files ---


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_what_was_loaded_is_saved_as_it_was(world, tmp_path):
    original = tmp_path / "original"
    shutil.copytree(newest(world.base), original)
    # By another hand: other order, other spaces, and a key that means nothing here.
    config = json.loads((original / "config.json").read_text())
    odd = '{"transformers_version":"4.0",\n\n' + json.dumps(dict(reversed(config.items())))[1:]
    (original / "config.json").write_text(odd)
    (original / "generation_config.json").write_text('{"eos_token_id":   276, "x": [1.0]}')
    public_load(original).save(tmp_path / "saved")
    found, wanted = files(tmp_path / "saved"), files(original)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert found[name] == wanted[name], name
    ours, theirs = (load_file(tmp_path / d / "model.safetensors") for d in ("saved", "original"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    public_load(tmp_path / "saved").save(tmp_path / "again")
    assert files(tmp_path / "again") == found


def test_a_file_of_several_dtypes_is_kept_and_saved_as_it_was(world, tmp_path):
    copy, file = tmp_path / "mixed", tmp_path / "mixed" / "model.safetensors"
    shutil.copytree(newest(world.base), copy)
    stored = {
        name: tensor * 1.001 if "norm" in name else tensor.bfloat16()
        for name, tensor in load_file(file).items()
    }
    save_file(stored, file)
    config = copy / "config.json"
    said = json.loads(config.read_text()) | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    config.write_text(json.dumps(said))
    lm = public_load(copy)
    assert logits(lm).isfinite().all()
    lm.save(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == stored.keys()
    for name, tensor in stored.items():
        assert saved[name].dtype == tensor.dtype and torch.equal(saved[name], tensor), name
    assert not torch.equal(stored["model.norm.weight"].bfloat16().float(),
                           stored["model.norm.weight"])  # fmt: skip


def test_codes_of_another_quantized_format_are_not_taken_for_weights(world, tmp_path):
    copy, file = tmp_path / "codes", tmp_path / "codes" / "model.safetensors"
    shutil.copytree(newest(world.base), copy)
    name, tensors = "model.layers.1.mlp.up_proj.weight", load_file(file)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        save_file(tensors | {name: tensors[name].to(dtype)}, file)
        with pytest.raises(CheckpointError, match=f"{name} is {dtype}, in a quantized format"):
            public_load(copy)


def test_another_dtype_is_said_in_the_config_and_nothing_else_changes(world, tmp_path):
    public_load(world.base, dtype="bfloat16").save(tmp_path / "half")
    was = json.loads((newest(world.base) / "config.json").read_text())
    now = json.loads((tmp_path / "half" / "config.json").read_text())
    assert now == was | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert list(now) == list(was)
    again = public_load(tmp_path / "half")
    assert again.model.precision.weights == torch.bfloat16
    assert torch.equal(
        logits(public_load(tmp_path / "half", dtype="bfloat16")),
        logits(public_load(world.base, dtype="bfloat16")),
    )


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_a_saved_adapter_is_the_adapter(world, tmp_path, kind):
    run = getattr(world, kind)
    public_load(run).save(tmp_path / "adapter")
    found, wanted = files(tmp_path / "adapter"), files(newest(run))
    for name in wanted.keys() - {"trainer.json", "trainer.safetensors"}:
        assert found[name] == wanted[name], name
    assert torch.equal(logits(public_load(tmp_path / "adapter")), logits(public_load(run)))


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_a_merged_model_is_saved_as_a_plain_one(world, tmp_path, kind):
    lm = public_load(getattr(world, kind), dtype="float32")
    before = logits(lm)
    merge(lm.model.decoder, torch.float32)
    lm.save(tmp_path / "merged")
    merged = public_load(tmp_path / "merged")
    assert merged.model.adapter is None and merged.model.quantization is None
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(public_load(world.base)), before, atol=1e-3)


def test_saving_replaces_a_directory_only_when_it_succeeds(world, tmp_path, monkeypatch):
    target = tmp_path / "target"
    public_load(world.base).save(target)
    before = files(target)
    model = load_model(world.base)

    def full(*_, **__):
        raise CheckpointError("no space left")

    monkeypatch.setattr(sys.modules["ardor.form"], "write_weights", full)
    with pytest.raises(CheckpointError, match="no space left"):
        save_model(model, target)
    assert files(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_saving_never_removes_what_is_no_checkpoint(world, tmp_path):
    (tmp_path / "notes.txt").write_text("years of work")
    lm = public_load(world.base)
    with pytest.raises(CheckpointError, match=r"also holds notes\.txt, which saving would remove"):
        lm.save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "years of work"
    with pytest.raises(CheckpointError, match="also holds trainer.json"):
        lm.save(newest(world.base))  # a checkpoint that training resumes from
    lm.save(tmp_path / "new")
    public_load(world.lora).save(tmp_path / "new")  # one checkpoint replaces another
    assert not (tmp_path / "new" / "config.json").exists()


def test_a_model_may_be_saved_over_itself(world, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(newest(world.base), home, ignore=shutil.ignore_patterns("trainer.*"))
    lm = public_load(home)  # its weights are mapped from the files that are replaced
    before = logits(lm)
    lm.save(home)
    assert torch.equal(logits(lm), before)
    assert torch.equal(logits(public_load(home)), before)


def test_the_public_names_are_there():
    assert ardor.load is public_load and ardor.LM is LM


# --- scores ---


def by_hand(lm: LM, ids: list[int]) -> list[float]:
    known = lm.tokenizer.vocab_rows  # other rows of the tables have no token, and no share
    table = logits_of(lm, ids)[:, :known].double().log_softmax(-1)
    return [float(table[i, id]) for i, id in enumerate(ids[1:])]


def logits_of(lm: LM, ids: list[int]) -> Tensor:
    return lm.logits([ids])[0]


def test_a_score_is_what_the_logits_say(world, monkeypatch):
    lm = public_load(world.base)
    ids = lm.tokenizer.encode(TEXT)
    wanted = by_hand(lm, ids)
    for chunk in (256, 1, 4):
        monkeypatch.setattr("ardor.score.CHUNK", chunk)
        score = lm.score(TEXT)
        assert score.tokens == tuple(ids)
        assert score.logprobs == pytest.approx(wanted, abs=1e-5)
    assert score.targets == len(ids) - 1
    assert score.nats == pytest.approx(-sum(wanted), rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(-sum(wanted) / (len(ids) - 1)), rel=1e-6)
    scored = lm.tokenizer.decode(ids[1:])
    assert TEXT.endswith(scored) and scored != TEXT  # the first token is given, not scored
    assert score.bits_per_byte == pytest.approx(
        -sum(wanted) / math.log(2) / len(scored.encode()), rel=1e-6
    )


def test_bits_count_bytes_and_not_characters(world):
    lm = public_load(world.base)
    score = lm.score("a naïve 你好 🙂")
    assert score.bytes == len("a naïve 你好 🙂".encode()) - len(
        lm.tokenizer.decode(score.tokens[:1]).encode()
    )
    assert Score((1, 2), (-math.log(4),), bytes=1).bits_per_byte == pytest.approx(2.0)


def test_a_score_needs_two_tokens_and_a_context_that_holds_them(world):
    lm = public_load(world.base)
    with pytest.raises(ShapeError, match="1 tokens cannot be scored: at least 2"):
        lm.score("a")
    with pytest.raises(ShapeError, match="context holds 48; give a longer text or split it"):
        lm.score(" ".join(sentences(30)))


def test_a_model_without_a_tokenizer_takes_ids_only(world, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(newest(world.base) / name, bare / name)
    lm = public_load(bare)
    assert lm.logits([[1, 2, 3]]).shape == (1, 3, lm.spec.vocab)
    for use in (lambda: lm.generate("x"), lambda: lm.score("x y"), lambda: lm.tokenizer):
        with pytest.raises(ConfigError, match=r"has no tokenizer\.json, which text needs"):
            use()
    lm.save(tmp_path / "saved")
    assert sorted(files(tmp_path / "saved")) == ["config.json", "model.safetensors"]


def test_a_base_model_does_not_chat(world):
    lm = public_load(world.base)
    with pytest.raises(ConfigError, match="has no chat template"):
        lm.chat([{"role": "user", "content": "hi"}])
    with pytest.raises(ConfigError, match="has no chat template"):
        list(lm.stream_chat([{"role": "user", "content": "hi"}]))


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (torch.tensor([1, 2]), r"found a tensor \[2\] of torch.int64; expected rows of token ids"),
        ([[1, 2], [3]], "all equally long"),
        ([[]], r"found a tensor \[1, 0\]"),
        (torch.tensor([[1.0, 2.0]]), "of torch.float32; expected rows"),
        ([[0, -1]], "token id -1 is not one of the model's 320 ids, 0 to 319"),
        ([[0, 320]], "token id 320 is not one"),
    ],
)
def test_logits_are_of_rows_of_known_ids(world, tokens, says):
    lm = public_load(world.base)
    assert lm.logits([[0, 319]]).shape == (1, 2, 320)
    with pytest.raises(ShapeError, match=says):
        lm.logits(tokens)


def test_a_setting_of_generation_that_is_none_names_the_nearest(world):
    lm = public_load(world.base)
    with pytest.raises(ConfigError, match="max_tokens=4 is no setting .*did you mean max_new_tok"):
        lm.generate("the", max_tokens=4)
    with pytest.raises(
        ConfigError, match="do_sample=True is no setting .*known are max_new_tokens"
    ):
        lm.generate("the", do_sample=True)
    assert lm.generate("the", max_new_tokens=2, stop=None).tokens


def test_logits_take_a_gradient_only_where_something_is_trained(world):
    lm = public_load(world.base)
    assert not logits(lm).requires_grad
    lm.model.decoder.requires_grad_(True)
    assert logits(lm).requires_grad
    assert tokenizer_of(lm.model) is lm.tokenizer
    assert replace(lm.model, tokenizer=None).tokenizer is None
