"""Checkpoints that are wrong: named, with what to do about it, by Python and by the commands."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ardor
from ardor.cli.main import main
from ardor.errors import CheckpointError, ConfigError, DataError, ShapeError
from ardor.files.hub import PATTERNS, PICKLE_PATTERNS, Resolved
from ardor.files.runs import newest_checkpoint
from ardor.files.weights import open_weights, write_weights
from ardor.load import load_model
from ardor.train import finetune, pretrain
from ardor.train.config import Finetune
from ardor.train.finetune import prepare

from .tiny import World, make_world, sentences, write_rows

BIN = "pytorch_model.bin"
UP = "model.layers.0.mlp.up_proj.weight"
TUNE = ["--max-steps", "2", "--dtype", "float32", "--stop-rate-samples", "0"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def model(world, tmp_path) -> Path:
    """A copy of the base model to damage."""
    newest = newest_checkpoint(world.base)
    assert newest is not None
    shutil.copytree(newest, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """The one message of a command that the user has to correct."""

    def run(*args: object) -> str:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        said = capsys.readouterr()
        assert code == 2 and said.out == "" and "Traceback" not in said.err
        return said.err

    return run


def rewrite(model: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = model / "model.safetensors"
    held = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(change(held), file)


def edit(file: Path, **keys: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


# --- a config that contradicts the tensors ---


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda held: held | {UP: torch.zeros(3, 3)}, rf"model\.safetensors: {UP} .*\[3, 3\], but"),
        (lambda held: {k: v for k, v in held.items() if k != UP}, f"missing {UP}; .*do not belong"),
        (lambda held: held | {"extra": torch.zeros(1)}, "unexpected extra; .*do not belong"),
        (lambda held: held | {UP: held[UP].to(torch.int8)}, "quantized format that"),
    ],
    ids=["shape", "missing", "extra", "dtype"],
)
def test_tensors_that_the_config_does_not_describe(model, refused, change, says):
    rewrite(model, change)
    with pytest.raises(CheckpointError, match=says):
        ardor.load(model)
    for verb in (["generate", model, "x"], ["score", model, "x y", "--text"]):
        assert str(model) in refused(*verb)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"hidden_size": 20},
            r"the shape \[\d+, 16\], but config.json makes it \[\d+, 20\]; .*both",
        ),
        ({"num_hidden_layers": 3}, r"missing model\.layers\.2\.\S+, .* and 1 more; "),
        ({"num_hidden_layers": 1}, r"unexpected model\.layers\.1\."),
        ({"tie_word_embeddings": False}, r"missing lm_head\.weight"),
        ({"num_key_value_heads": 1}, r"k_proj\.weight gives \S+ the shape \[16, 16\]"),
    ],
)
def test_a_config_that_does_not_describe_the_tensors(model, keys, says):
    edit(model / "config.json", **keys)
    with pytest.raises(CheckpointError, match=says):
        ardor.load(model)


def test_heads_that_do_not_share_kv_heads_evenly(model, refused):
    edit(model / "config.json", num_attention_heads=4, num_key_value_heads=3)
    says = "num_attention_heads=4 is not a multiple of num_key_value_heads=3; correct one of them"
    with pytest.raises(ConfigError, match=says):
        ardor.load(model)
    assert says in refused("generate", model, "x")


def test_a_shard_that_is_missing(model, refused):
    held = load_file(model / "model.safetensors")
    write_weights(model, held, max_shard_bytes=20_000)
    shards = sorted(model.glob("model-*-of-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"lists {shards[1].name}, not found in .*download"):
        ardor.load(model)
    assert shards[1].name in refused("generate", model, "x")


# --- an embedding smaller than the vocabulary ---


def shrink(model: Path, rows: int) -> None:
    name = "model.embed_tokens.weight"
    rewrite(model, lambda held: held | {name: held[name][:rows].clone()})
    edit(model / "config.json", vocab_size=rows)


def test_a_vocabulary_that_the_embedding_has_no_rows_for(world, model, refused):
    shrink(model, 270)  # of 276 + 4 added
    says = "tokenizer.json: its vocabulary has 276 ids, but the embedding only 270 rows; take the"
    with pytest.raises(CheckpointError, match=says):
        ardor.load(model)
    assert says in refused("score", model, "x y", "--text")
    assert says in refused("finetune", model, world.pairs, "-o", model / "run", *TUNE)
    assert not (model / "run").exists()


def test_an_end_of_text_that_the_embedding_has_no_row_for(model):
    shrink(model, 276)
    with pytest.raises(CheckpointError, match="EOS is token 276, but the embedding has only 276"):
        ardor.load(model)


def test_another_added_token_beyond_the_embedding_is_refused_where_it_occurs(model, tmp_path):
    """As Gemma 3's text models have it: 262144 rows, and an image token of that id."""
    shrink(model, 279)
    lm = ardor.load(model)
    assert lm.tokenizer.vocab_rows == 280 and lm.generate("the cat", max_new_tokens=2).tokens
    with pytest.raises(ShapeError, match="token id 279 is not one of the model's 279 ids"):
        lm.generate("the <|im_end|>")
    with pytest.raises(ShapeError, match="token id 279 is not one of the model's 279 ids"):
        lm.score("the <|im_end|>")
    data = write_rows(tmp_path / "chats.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    config = Finetune(model=str(model), data=str(data), output=tmp_path / "run", max_steps=1)
    prepare(config)
    chats = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    ]
    config = Finetune(
        model=str(model),
        data=str(write_rows(data, chats)),
        output=tmp_path / "chat",
        chat_template="chatml",
    )
    with pytest.raises(
        DataError, match=r"chats.jsonl:1 holds token '<\|im_end\|>', id 279, but the mod"
    ):
        prepare(config)
    assert not (tmp_path / "chat").exists()


# --- NaN and infinity ---


def poison(held: dict[str, Tensor]) -> dict[str, Tensor]:
    held[UP][1, 2], held[UP][3, :2] = torch.nan, torch.inf
    return held


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_weights_that_are_no_numbers_are_never_trained_on(world, model, refused, tmp_path, method):
    rewrite(model, poison)
    run = tmp_path / "run"
    said = refused("finetune", model, world.pairs, "-o", run, "--method", method, *TUNE)
    assert f"{model / 'model.safetensors'}: {UP} holds 1 NaN and 2 infinite of 384 values" in said
    assert "take an earlier checkpoint" in said and not run.exists()
    load_model(model)  # only training asks


def test_a_run_is_not_taken_up_from_weights_that_are_no_numbers(world, refused, tmp_path):
    for kind, name in (("base", UP), ("lora", "lora_B.weight")):
        run = tmp_path / kind
        shutil.copytree(getattr(world, kind), run)
        newest = newest_checkpoint(run)
        assert newest is not None
        file = newest / ("model.safetensors" if kind == "base" else "adapter_model.safetensors")
        held = {key: tensor.clone() for key, tensor in load_file(file).items()}
        next(tensor for key, tensor in held.items() if key.endswith(name))[0, 0] = torch.nan
        save_file(held, file)
        verb = "train" if kind == "base" else "finetune"
        said = refused(verb, "--config", run / "config.yaml", "-o", run, "--resume")
        assert f"{file}: " in said and f"{name} holds 1 NaN of" in said


# --- pickles ---


def pickled(model: Path, *, shards: int = 1) -> dict[str, Tensor]:
    """The weights as torch.save writes them, tied as a state dict holds them; what they are."""
    held = {name: tensor.clone() for name, tensor in load_file(model / "model.safetensors").items()}
    (model / "model.safetensors").unlink()
    state = held | {"lm_head.weight": held["model.embed_tokens.weight"]}
    names = list(state)
    files = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    for i, file in enumerate(files if shards > 1 else [BIN]):
        torch.save({name: state[name] for name in names[i::shards]}, model / file)
    if shards > 1:
        homes = {name: files[i % shards] for i, name in enumerate(names)}
        (model / f"{BIN}.index.json").write_text(json.dumps({"weight_map": homes}))
    return state


@pytest.mark.parametrize("shards", [1, 3])
def test_a_pickled_model_is_the_same_model(world, model, tmp_path, shards):
    ids = [[5, 3, 8, 1]]
    expected = ardor.load(model).logits(ids)
    state = pickled(model, shards=shards)
    with pytest.raises(CheckpointError, match="read only when asked for: give use_safetensors=Fal"):
        ardor.load(model)
    lm = ardor.load(model, use_safetensors=False)
    assert torch.equal(lm.logits(ids), expected)
    lm.save(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.bin*"))
    found = open_weights(tmp_path / "saved")
    assert {*found.names()} == {*state}
    assert all(torch.equal(found.read(name), tensor) for name, tensor in state.items())
    assert torch.equal(ardor.load(tmp_path / "saved").logits(ids), expected)


def test_every_verb_reads_pickles_when_asked(world, model, refused, capsys, tmp_path):
    pickled(model)
    run, flag = tmp_path / "run", "--no-use-safetensors"
    verbs = {
        "generate": [model, "the cat", "-n", "2"],
        "score": [model, "the cat sat", "--text"],
        "chat": [model],
        "finetune": [model, world.pairs, "-o", run, "--method", "full", *TUNE],
    }
    for verb, args in verbs.items():
        assert flag in refused(verb, *args)
        if verb != "chat":
            assert main([verb, *map(str, args), flag]) == 0
    # The run's own checkpoints are not pickles, whatever its base was.
    settings = write_rows(tmp_path / "texts.jsonl", [{"text": t} for t in sentences(3)])
    assert main(["score", str(run), str(settings)]) == 0
    again = ["finetune", "--config", str(run / "config.yaml"), "-o", str(run), "--resume"]
    assert main(again) == 0
    capsys.readouterr()


def test_a_repository_of_pickles_alone_says_so_after_the_download(model, monkeypatch):
    pickled(model)
    asked = []

    def resolve(name, revision=None, patterns=()):
        asked.append(patterns)
        return Resolved(model, "commit")

    monkeypatch.setattr(sys.modules[load_model.__module__], "resolve", resolve)
    ardor.load("owner/model", use_safetensors=False)
    (model / BIN).unlink()
    with pytest.raises(CheckpointError, match="no model.safetensors") as caught:
        ardor.load("owner/model")
    assert "give use_safetensors=False (--no-use-safetensors)" in caught.value.__notes__[0]
    assert asked == [PICKLE_PATTERNS, PATTERNS]


def test_a_pickle_that_would_run_code_is_a_message(model, refused, tmp_path):
    state = pickled(model)

    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save(state | {"x": Evil()}, model / BIN)
    assert "asks for exec, which" in refused("generate", model, "x", "--no-use-safetensors")
    assert not (tmp_path / "ran").exists()


# --- a backend that cannot train ---


def test_flex_on_a_cpu_is_refused_before_the_run_is_begun(world, refused, tmp_path, monkeypatch):
    for module in (finetune, pretrain):
        monkeypatch.setattr(module, "default_device", lambda: torch.device("cpu"))
    run, flag = tmp_path / "run", ["--attn-implementation", "flex"]
    for verb in (["finetune", world.base, world.pairs], ["train", world.texts]):
        said = refused(*verb, "-o", run, *flag)
        assert "flex' has no backward pass on a CPU" in said and not run.exists()


# --- what else a run cannot have ---

UNFIT = [  # flags, and what is said; the machine has no compiler and none of the packages
    (["--report-to", "wandb"], "report_to=wandb needs the package wandb"),
    (["--report-to", "tensorboard"], "report_to=tensorboard needs the package tensorboard"),
    (["--report-to", "trackio"], "report_to=trackio needs the package trackio"),
    (["--optim", "adamw_8bit"], "optim=adamw_8bit needs the package bitsandbytes"),
    (["--optim", "lion_8bit"], "optim=lion_8bit needs the package bitsandbytes"),
    (
        ["--optim", "schedule_free_adamw", "--lr-scheduler-type", "constant"],
        "optim=schedule_free_adamw needs the package schedulefree",
    ),
    (["--torch-compile"], "torch_compile wants a C++ compiler"),
    (["--attn-implementation", "flash_attention_2"], "attn_implementation='flash_attention_2'"),
    (["--attn-implementation", "quick"], "attn_implementation='quick' is not one of"),
    (["--peak-tflops", "0"], "peak_tflops=0.0 must be above 0 and finite"),
    (["--peak-tflops", "nan"], "peak_tflops=nan must be above 0 and finite"),
    (["--sample-prompts", " "], "sample_prompts holds a blank prompt"),
    (["--sample-tokens", "0"], "sample_tokens=0 must be at least 1"),
    (["--eval-data", "nothing.jsonl"], "nothing.jsonl does not exist"),
    (["--dtype", "float8"], "float8"),
]
# Of these the model or the data say more.
UNFIT_FOR_DATA = [
    (["--early-stopping-patience", "2", "--eval-fraction", "0"], "nothing is held out"),
    (["--load-best-model-at-end", "--eval-fraction", "0"], "nothing is held out"),
    (["--learning-rates", "nothing_of_this=0.1"], "nothing_of_this"),
    (["--learning-rates", "(=0.1"], "learning_rates"),
    (["--freeze", "nothing_of_this"], "nothing_of_this"),
]


@pytest.fixture
def bare(monkeypatch, tmp_path) -> None:
    """A machine with nothing that is optional, where an accelerator would be too."""
    for module in (finetune, pretrain):
        monkeypatch.setattr(module, "default_device", lambda: torch.device("cpu"))
    for name in ("wandb", "tensorboard", "trackio", "bitsandbytes", "schedulefree"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


@pytest.mark.parametrize(("flags", "says"), UNFIT)
def test_what_cannot_be_had_is_refused_before_a_model_is_loaded(
    world, refused, tmp_path, monkeypatch, bare, flags, says
):
    for module in (finetune, pretrain):
        for name in ("load_model", "new_model", "encode"):
            monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("begun"), raising=False)
    if "--dtype" in flags:
        monkeypatch.undo()
    run = tmp_path / "run"
    for verb in (["finetune", world.base, world.pairs], ["train", world.texts]):
        assert says in refused(*verb, "-o", run, *flags) and not run.exists()


@pytest.mark.parametrize(("flags", "says"), UNFIT_FOR_DATA)
def test_what_does_not_fit_the_data_is_refused_before_the_run_is_begun(
    world, refused, tmp_path, flags, says
):
    judged = write_rows(
        tmp_path / "judged.jsonl",
        [{"prompt": "the cat", "chosen": f" sat {i}", "rejected": " ran"} for i in range(12)],
    )
    run = tmp_path / "run"
    for verb in (
        ["finetune", world.base, world.pairs],
        # The reference of preferences is in the run's folder, and is computed first.
        ["finetune", world.base, judged, "--objective", "dpo", "--method", "full"],
        ["train", world.texts],
    ):
        assert says in refused(*verb, "-o", run, *flags, "--dtype", "float32")
        assert not run.exists()


# --- settings of generation ---


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number of at least 1"),
        ({"max_new_tokens": True}, "max_new_tokens=True must be a whole number of at least 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be above 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty=nan must be above 0"),
    ],
)
def test_a_limit_of_no_sense_is_refused(model, settings, says):
    with pytest.raises(ConfigError, match=says):
        ardor.load(model).generate("the", **settings)


def test_a_limit_is_refused_before_a_model_is_loaded(refused, tmp_path):
    for verb in (["generate", tmp_path / "no model", "x"], ["chat", tmp_path / "no model"]):
        assert "max_new_tokens=0 must be a whole" in refused(*verb, "-n", "0")


def test_a_limit_that_is_no_whole_number_is_refused_where_no_types_are_checked():
    script = "from ardor.generate.settings import Settings; Settings(max_new_tokens=2.5)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "ConfigError: max_new_tokens=2.5 must be a whole number" in done.stderr
