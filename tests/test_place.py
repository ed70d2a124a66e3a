"""Models spread over devices, the CPU and the disk: the same numbers, within the memory allowed.

On a machine without a GPU "cpu" stands for each accelerator of a pretended topology.
"""

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.accelerate as transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import ardor
from ardor.arch.decoder import Decoder
from ardor.cli.main import main
from ardor.errors import CheckpointError, ConfigError
from ardor.families import family_of
from ardor.families.hf_config import HFConfig
from ardor.files.runs import newest_checkpoint
from ardor.load import Model, load_model
from ardor.parallel.offload import Part
from ardor.parallel.placement import STRATEGIES, allowance, device_map
from ardor.place import (
    Placement,
    Spread,
    available,
    measure,
    module_names,
    part_of,
    requested,
    ties_of,
    tree,
)

from .parallel import theirs
from .parity.cases import CASES
from .parity.peer import CLOSE, Case, peer, saved, tokens
from .tiny import World, make_world

CPU = torch.device("cpu")
PRETENDED: dict[Any, torch.device] = {0: CPU, 1: CPU}
PROMPT = "the cat sat on"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return saved(peer(CASES["llama: grouped"]), tmp_path_factory.mktemp("llama"))


@torch.inference_mode()
def logits(model: Model) -> Tensor:
    return model.decoder.logits(model.decoder.hidden(tokens()))


def total(model: Model) -> int:
    held = (*model.decoder.parameters(), *model.decoder.buffers())
    return sum(tensor.nbytes for tensor in held)


def placed(model: Model) -> Placement:
    assert model.placement is not None
    return model.placement


# --- maps ---


def ours(model: Any) -> tuple[Any, ...]:
    """Our tree of a model of theirs, from its config alone."""
    raw = json.loads(model.config.to_json_string())
    family = family_of(raw, path="config.json")
    spec = family.spec(HFConfig(raw, path="config.json"))
    with torch.device("meta"):
        decoder = Decoder(spec).to(model.dtype)
    rules = family.rules(spec)
    names = module_names(rules)
    sizes = dict.fromkeys(names.values(), 0)
    for name, tensor in decoder.named_parameters():
        rule = next(rule for rule in rules.plain if name in rule.memory or name == rule.memory)
        sizes[names[part_of(rule)]] += tensor.nbytes
    return tree(sizes, names), ties_of(rules), decoder


def devices_of(found: dict[str, Any], weights: list[str]) -> dict[str, Any]:
    """The device of every weight, by the longest name of the map that it is within."""
    given = {}
    for weight in weights:
        within = [n for n in found if not n or weight == n or weight.startswith(f"{n}.")]
        given[weight] = found[max(within, key=len)]
    return given


def compared(count: int, first: int, families: tuple[str, ...]) -> int:
    spread = 0
    for draw in map(random.Random, range(first, first + count)):
        keys = theirs.random_keys(draw) | {"model_type": draw.choice(families)}
        model = theirs.without_tables(theirs.on_meta(keys, draw.choice(theirs.DTYPES)))
        root, ties, _ = ours(model)
        memory = theirs.random_memory(draw, root.size)
        weights = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        for strategy in STRATEGIES:
            wanted = transformers._get_device_map(model, strategy, dict(memory), None)
            given = device_map(root, strategy, allowance(memory), ties)
            assert devices_of(given, weights) == devices_of(wanted, weights), (keys, memory)
            spread += len({*given.values()}) > 1
    return spread


ALIKE = tuple(name for name in theirs.FAMILIES if name != "opt")


def test_the_map_of_a_checkpoint_is_transformers_map_of_its_model():
    assert compared(4, 0, ("llama", "gpt2")) > 4


@pytest.mark.sweep
def test_200_random_checkpoints_by_four_strategies_have_transformers_maps():
    assert compared(200, 50, ALIKE) > 400


def test_opt_is_filled_in_the_order_in_which_it_computes():
    """We differ: transformers defines OPT's last norm before its layers, and fills so."""
    keys = {"model_type": "opt", "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64,
            "num_attention_heads": 2, "num_hidden_layers": 4, "vocab_size": 50}  # fmt: skip
    model = theirs.on_meta(keys, torch.float32)
    root, ties, _ = ours(model)
    memory = {0: int(root.size * 0.75), 1: root.size}
    wanted = transformers._get_device_map(model, "sequential", dict(memory), None)
    given = device_map(root, "sequential", allowance(memory), ties)
    norm = "model.decoder.final_layer_norm"
    assert wanted[norm] == 0 and given[norm] == 1
    assert {
        name: device for name, device in given.items() if name != norm
    }.items() <= wanted.items()


@pytest.mark.sweep
def test_modules_are_named_as_transformers_names_them():
    for name, case in CASES.items():
        with torch.device("meta"):
            model = case.auto.from_config(case.config())
        raw = json.loads(model.config.to_json_string())
        family = family_of(raw, path="config.json")
        spec = family.spec(HFConfig(raw, path="config.json"))
        modules = dict(model.named_modules())
        for part, module in module_names(family.rules(spec)).items():
            assert module in modules, (name, part, module)


# --- the same numbers ---


def spreads(size: int, folder: Path) -> dict[str, Spread]:
    """Kinds of places for a model of so many bytes; the first fits nothing in memory."""
    return {
        "all on disk": Spread({"": "disk"}, None, folder),
        "cpu and disk": Spread("auto", {"cpu": int(size * 0.6)}, folder, {}),
        "two accelerators, cpu and disk": Spread(
            "auto", {0: int(size * 0.4), 1: int(size * 0.3), "cpu": int(size * 0.3)}, folder,
            PRETENDED,
        ),
        "cpu beside an accelerator": Spread(
            "sequential", {0: int(size * 0.5), "cpu": 2 * size}, folder, PRETENDED
        ),
    }  # fmt: skip


def spread_computes_the_same(checkpoint: Path, folder: Path, dtype: str) -> None:
    whole = load_model(checkpoint, dtype=dtype)
    wanted = logits(whole)
    for kind, spread in spreads(total(whole), folder).items():
        model = load_model(checkpoint, dtype=dtype, device=spread)
        # Equal but for the order of sums, which depends on where in memory a tensor begins.
        torch.testing.assert_close(logits(model), wanted, **CLOSE, msg=lambda m, k=kind: f"{k} {m}")
        away = any(part.kept != "device" for part in placed(model).parts)
        assert away or kind == "cpu beside an accelerator"  # which may be too small for a layer
        assert model.turns is not None and bool(model.turns.peak) == away
        assert not model.turns.resident


@pytest.mark.parametrize("dtype", ["auto", "float64"])
@pytest.mark.parametrize(
    "case", ["llama: grouped", "gemma2: windows and caps", "opt: norms after, narrow embedding"]
)
def test_a_spread_model_gives_the_same_logits(tmp_path, case, dtype):
    checkpoint = saved(peer(CASES[case]), tmp_path / "model")
    dtypes = {"float64": torch.float64}
    spread_computes_the_same(checkpoint, tmp_path / "off", dtypes.get(dtype, dtype))


@pytest.mark.sweep
@pytest.mark.parametrize("case", list(CASES))
def test_a_spread_model_of_any_family_gives_the_same_logits(tmp_path, case):
    checkpoint = saved(peer(CASES[case]), tmp_path / "model")
    spread_computes_the_same(checkpoint, tmp_path / "off", "auto")


def test_a_model_larger_than_the_allowed_memory_writes_the_same_text(world):
    whole = ardor.load(world.base)
    limit = int(total(whole.model) * 0.85)
    lm = ardor.load(world.base, device_map="auto", max_memory={"cpu": limit})
    assert {*lm.device_map.values()} == {"cpu", "disk"}
    assert whole.device_map == {"": "cpu"}
    for prompts in ([PROMPT], [PROMPT, "and then it"]):
        wanted = whole.generate(prompts, max_new_tokens=8)
        given = lm.generate(prompts, max_new_tokens=8)
        assert [g.tokens for g in given] == [w.tokens for w in wanted]
    assert lm.score(PROMPT).logprobs == pytest.approx(whole.score(PROMPT).logprobs, abs=1e-5)


@pytest.mark.parametrize(
    "memory", [{"cpu": 0.4}, {0: 0.3, "cpu": 0.3}, {0: 0.25, "cpu": 2}, {0: 0.3, 1: 0.3}]
)
def test_no_more_is_resident_than_what_stays_and_two_neighbours(tmp_path, memory):
    case = Case("llama", {"num_hidden_layers": 12, "tie_word_embeddings": False})
    checkpoint = saved(peer(case), tmp_path)
    whole = load_model(checkpoint)
    size = total(whole)
    limits = {device: int(share * size) for device, share in memory.items()}
    accelerators = {device: CPU for device in memory if device != "cpu"}
    model = load_model(checkpoint, device=Spread("auto", limits, None, accelerators))
    torch.testing.assert_close(logits(model), logits(whole), **CLOSE)
    sizes = {part.name: total_of(model, part.name) for part in placed(model).parts}
    away = [sizes[part.name] for part in placed(model).parts if part.kept != "device"]
    assert model.turns is not None and model.turns.resident == 0
    neighbours = max(a + b for a, b in zip(away, [*away[1:], 0], strict=True))
    assert max(away) < model.turns.peak <= neighbours  # one is fetched while one computes
    first = next(iter(limits))
    stays = sum(sizes[name] for name in _staying(model, first))
    assert stays + max(away) <= limits[first]
    assert stays + model.turns.peak <= limits[first] + max(away) < size


def _staying(model: Model, device: Any) -> list[str]:
    """The parts that a device holds all the time."""
    names = module_names(model.form.family.rules(model.decoder.spec))  # type: ignore[attr-defined]
    homes = devices_of(placed(model).map, [*names.values()])
    return [part for part, name in names.items() if part and homes[name] == device]


def total_of(model: Model, part: str) -> int:
    module = model.decoder.get_submodule(part)
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("quantization", ["nf4", "nf4-dq"])
def test_quantized_layers_are_kept_elsewhere_too(world, tmp_path, quantization):
    whole = load_model(world.base, quantization=quantization)
    ids = torch.tensor([[5, 9, 31, 7]])
    with torch.inference_mode():
        wanted = whole.decoder.logits(whole.decoder.hidden(ids))
    folder = tmp_path / "off"
    spread = Spread("sequential", {0: int(total(whole) * 0.8)}, folder, PRETENDED)
    for _ in range(2):  # made, and used again
        model = load_model(world.base, quantization=quantization, device=spread)
        assert [part.kept for part in placed(model).parts].count("disk") >= 1
        with torch.inference_mode():
            given = model.decoder.logits(model.decoder.hidden(ids))
        torch.testing.assert_close(given, wanted, **CLOSE)
        assert total(model) == total(whole)


def test_an_adapter_goes_with_the_part_it_is_on(world):
    wanted = ardor.load(world.lora).score(PROMPT).logprobs
    lm = ardor.load(world.lora, device_map={"": "disk"})
    assert lm.score(PROMPT).logprobs == pytest.approx(wanted, abs=1e-5)
    assert lm.model.adapter is not None
    assert ardor.load(world.base).score(PROMPT).logprobs != pytest.approx(wanted, abs=1e-4)


def test_what_crosses_to_another_device_crosses_whole(llama):
    """The meta device computes nothing, but refuses what lies elsewhere."""
    decoder = load_model(llama).decoder
    assert isinstance(decoder, Decoder)
    there = torch.device("meta")
    names = ("embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "lm_head")
    parts = tuple(Part(name, CPU if name < "layers.1" else there) for name in names)
    Placement({}, parts, "", {}).start(decoder)
    cache = decoder.new_cache(rows=2, capacity=30)
    with torch.inference_mode():
        hidden = decoder.hidden(tokens(), cache=cache)
    assert hidden.device == there and decoder.device == CPU
    assert [planes.device.type for planes in cache._layers] == ["cpu", "meta", "meta"]


# --- what is written ---


def written(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_layers_that_are_in_the_checkpoint_as_in_memory_are_read_from_it(llama, tmp_path):
    load_model(llama, device=Spread({"": "disk"}, None, tmp_path / "off"))
    assert not (tmp_path / "off").exists()
    with pytest.raises(ConfigError, match=r"model\.embed_tokens is to be kept on disk, .*give off"):
        load_model(llama, dtype="bfloat16", device=Spread({"": "disk"}))


def test_what_was_written_is_used_again_only_if_whole_and_of_the_same_source(llama, tmp_path):
    folder = tmp_path / "off"
    spread = Spread({"model.layers": "disk", "": "cpu"}, None, folder)
    wanted = logits(load_model(llama, dtype="bfloat16"))

    def loaded(**given: Any) -> dict[str, int]:
        model = load_model(llama, device=spread, **{"dtype": "bfloat16", **given})
        if not given:
            torch.testing.assert_close(logits(model), wanted, **CLOSE)
        return written(folder)

    first = loaded()
    assert [*sorted(first)] == [f"layers.{index}.safetensors" for index in range(3)]
    assert loaded() == first
    victim = folder / "layers.1.safetensors"
    victim.write_bytes(victim.read_bytes()[:-7])  # cut short
    again = loaded()
    changed = {name for name in first if again[name] != first[name]}
    assert changed == {victim.name}
    other = loaded(dtype="float16")  # of another dtype
    assert all(other[name] != again[name] for name in again)
    weights = llama / "model.safetensors"
    weights.touch()  # of a checkpoint that was replaced
    back, touched = loaded(), None
    weights.touch()
    touched = loaded()
    assert all(touched[name] != back[name] for name in back)


def test_a_disk_that_is_full_leaves_nothing_half_written(llama, tmp_path, monkeypatch):
    folder = tmp_path / "off"

    def full(path: Path, tensors: Any) -> None:
        path.write_bytes(b"half")
        raise CheckpointError(f"no space left on the device of {path}")

    monkeypatch.setattr("ardor.files.mapped.write_tensors", full)
    with pytest.raises(CheckpointError, match="no space left on the device"):
        load_model(llama, dtype="bfloat16", device=Spread({"": "disk"}, None, folder))
    assert not written(folder)


def test_a_wrong_index_is_refused_before_anything_is_placed(llama, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "no.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lists no\.safetensors, not found"):
        load_model(tmp_path, device=Spread({"": "disk"}))


# --- what is asked for ---


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"model.layer": "disk", "": 0},
            "'model.layer' is no module .*did you mean 'model.layers'",
        ),
        ({"model.layers.0.mlp": 0, "": "cpu"}, "is inside of model.layers.0, and a layer lies on"),
        ({"model": "cpu"}, "says nothing of lm_head; add it, a module around it, or ''"),
        ({"": 7}, "device_map: 7 is not a device of this machine; it has 0, 1, cpu, disk"),
        ({"": "cuda:2"}, "'cuda:2' is not a device"),
    ],
)
def test_a_map_that_does_not_fit_the_model_is_refused(llama, given, says):
    with pytest.raises(ConfigError, match=says):
        load_model(llama, device=Spread(given, accelerators=PRETENDED))


def test_a_map_names_modules_at_any_level(llama):
    for given, disk in (
        ({"": "cpu", "model.layers.1": "disk"}, ["layers.1"]),
        ({"lm_head": "disk", "model": "cpu"}, ["lm_head"]),
        ({"model.rotary_emb": 0, "": "cpu"}, []),  # a module that transformers has beside
    ):
        model = load_model(llama, device=Spread(given, accelerators=PRETENDED))
        assert [p.name for p in placed(model).parts if p.kept == "disk"] == disk
        assert placed(model).map == given


def test_tied_weights_lie_in_one_place(tmp_path):
    checkpoint = saved(peer(CASES["gemma2: windows and caps"]), tmp_path)
    with pytest.raises(ConfigError, match="lm_head on cpu, but they are tied"):
        given = {"model.embed_tokens": "disk", "": "cpu"}
        load_model(checkpoint, device=Spread(given, accelerators=PRETENDED))


def test_devices_by_their_names(monkeypatch):
    assert requested(None) == requested("cpu") == requested({"": "cpu"}) == CPU
    assert requested("kbit") == CPU or torch.cuda.is_available()
    for strategy in STRATEGIES:
        found = requested(strategy, {"cpu": "1GiB"}, "off")
        assert isinstance(found, Spread) and found.offload_folder == Path("off")
    with pytest.raises(ConfigError, match="max_memory is nothing without device_map=auto"):
        requested("cpu", {0: 1})
    with pytest.raises(ConfigError, match="max_memory limits a strategy"):
        requested({"model": 0, "": "cpu"}, {0: 1})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for name in ("kbit", "cuda"):  # each process its own
        monkeypatch.setattr("ardor.place._device", torch.device)
        assert requested(name) == torch.device("cuda:3")


def test_what_is_free_is_measured():
    found = measure({})
    assert [*found] == ["cpu"] and 0 < found["cpu"] <= available() * 0.95


def test_what_is_kept_elsewhere_takes_no_gradient(llama):
    model = load_model(llama, device=Spread({"": "disk"}))
    model.decoder.requires_grad_(True)
    with pytest.raises(ConfigError, match="embed_tokens is kept on the disk, and a gradient"):
        model.decoder.hidden(tokens())


# --- the command line ---


def test_the_flags_spread_a_model_and_say_so(world, capsys):
    size = total(load_model(world.base))
    arguments = ["generate", str(newest_checkpoint(world.base)), PROMPT, "-n", "4", "-t", "0"]
    assert main([*arguments, "--device-map", "cpu"]) == 0
    wanted = capsys.readouterr().out
    assert main([*arguments, "--device-map", "auto", "--max-memory", f"cpu={size * 7 // 10}"]) == 0
    found = capsys.readouterr()
    assert found.out == wanted
    assert "on disk (auto: " in found.err and "allowed cpu: " in found.err
    assert main([*arguments, "--device-map", '{"": "disk"}']) == 0
    found = capsys.readouterr()
    assert found.out == wanted and "all on disk (as asked)" in found.err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--device-map", "{disk}"], "is no JSON: .*; write names and devices in double quotes"),
        (["--max-memory", "10GiB", "--device-map", "auto"], "'10GiB' has no amount; write it as"),
        (["--max-memory", "cpu=some", "--device-map", "auto"], "'some' is no amount of memory"),
        (["--max-memory", "gpu=1GB", "--device-map", "auto"], "'gpu' is no device; name accel"),
        (
            ["--max-memory", "9=1GB", "--device-map", "auto"],
            "max_memory: 9 is not a device of this",
        ),
    ],
)
def test_a_flag_that_cannot_be_honoured_says_how_to_write_it(world, capsys, flags, says):
    assert main(["generate", str(world.base), PROMPT, *flags]) == 2
    assert re.search(says, capsys.readouterr().err)


# --- memory ---

RSS = """
import sys, torch, ardor
torch.set_num_threads(1)
allowed = int(sys.argv[2])
def resident(kind):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(l for l in lines if l.startswith(kind)).split()[1])
before = resident("VmRSS")
lm = ardor.load(sys.argv[1], device_map="auto", max_memory={"cpu": allowed})
lm.logits([[3, 4, 5]]); lm.logits([[3, 4, 5]])
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
def test_the_memory_of_a_process_stays_near_what_is_allowed(tmp_path):
    config = AutoConfig.for_model(
        "llama", vocab_size=2000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=16,
        num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    size = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path)
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    allowed = size // 3
    command = [sys.executable, "-c", RSS, str(tmp_path)]
    grown = {
        limit: int(subprocess.run([*command, str(limit)], check=True, capture_output=True).stdout)
        for limit in (allowed, 2 * size)
    }
    assert grown[2 * size] > 0.95 * size  # the probe sees what is resident
    assert grown[allowed] < allowed + layer + 32 * 2**20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", ["llama: grouped", "gemma2: windows and caps"])
def test_on_a_gpu_a_spread_model_gives_the_same_logits(tmp_path, case):
    checkpoint = saved(peer(CASES[case]), tmp_path / "model")
    whole = load_model(checkpoint, device="cuda:0")
    wanted, size = logits_on(whole), total(whole)
    for memory in (
        {0: size // 2},
        {0: size // 2, "cpu": size},
        {0: size // 3, "cpu": size // 3},
    ):
        model = load_model(checkpoint, device=Spread("auto", memory, tmp_path / "off"))
        torch.testing.assert_close(logits_on(model), wanted, **CLOSE)


@torch.inference_mode()
def logits_on(model: Model) -> Tensor:
    ids = tokens().to(model.decoder.device)
    return model.decoder.logits(model.decoder.hidden(ids))
