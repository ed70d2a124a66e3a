"""Names, settings and machines into plans."""

import json
from dataclasses import replace

import pytest

from ardor.errors import ArdorError, ConfigError
from ardor.memory.estimate import estimate
from ardor.memory.machine import Machine, this_machine
from ardor.outline import beside, outline, rearranged
from ardor.plan import Settings, described, known, make_plan, use_of
from ardor.train.presets import PRESETS

from .tiny import make_world, write_rows

GIB = 2**30
HERE = Machine((), 16 * GIB)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_a_machine_is_described():
    assert described("2x24GiB", "128GiB") == Machine(
        (24 * GIB,) * 2, 128 * GIB, "the described machine"
    )
    assert described("80GiB, 2x24GiB", "1GiB").gpus == (80 * GIB, 24 * GIB, 24 * GIB)
    assert described("none", "1GiB").gpus == ()
    assert described(None, None).ram > GIB
    with pytest.raises(ConfigError, match="twox24GiB"):
        described("twox24GiB", "1GiB")
    with pytest.raises(ConfigError, match="ram"):
        described(None, "much")


def test_presets_configs_runs_and_adapters_are_known(world, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(PRESETS["llama-15m"].config | {"torch_dtype": "bfloat16"}))
    found = known(str(config))
    assert found.spec == known("llama-15m").spec
    assert (found.stored, known("llama-15m").stored) == ("bfloat16", "float32")
    base = known(str(world.base))
    assert base.spec == known(str(world.lora)).spec == known(str(world.qlora)).spec
    assert (base.quantization, known(str(world.qlora)).quantization) == (None, "nf4")
    assert known(str(world.base / "model.yaml")).spec == base.spec


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ArdorError, match="holds no config.json"):
        known(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="'bert' is not implemented"):
        outline(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "nf5", "method": "qlora"}, "nf5"),
        ({"quantization": "nf4", "method": "lora"}, "is for method qlora"),
        ({"dtype": "int3"}, "int3"),
        ({"purpose": "generate", "max_length": 4096}, "more than the 256 positions"),
        ({"init_lora_weights": "pizza"}, "'pizza' is not known; choose one of default"),
        ({"init_lora_weights": "loftq"}, "loftq is for method qlora, and method is lora"),
        ({"init_lora_weights": "olora", "method": "qlora"}, "for method lora, and method is qlora"),
        ({"use_dora": True, "method": "full"}, "has no adapters"),
        ({"use_dora": True, "purpose": "train"}, "train with method full has no adapters"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        use_of(known("llama-15m"), Settings(**settings), HERE)


@pytest.mark.parametrize(
    ("changes", "term", "share"),
    [
        ({"optim": "lion"}, "optimizer", (0.49, 0.51)),
        ({"optim": "adamw_8bit"}, "optimizer", (0.25, 0.6)),  # tables keep 32 bits
        ({"optim": "sgd"}, "optimizer", (0.0, 0.0)),
        ({"master_dtype": "bfloat16"}, "weights", (0.49, 0.51)),
        ({"gradient_checkpointing": "layers"}, "activations", (0.0, 0.5)),
        ({"optimizer_in_backward": True}, "gradients", (0.0, 0.6)),
    ],
)
def test_what_saves_memory_in_training_is_planned(changes, term, share):
    def bytes(**settings) -> int:
        use = use_of(
            known("llama-110m"), Settings(method="full", dtype="float32", **settings), HERE
        )
        moments = estimate(known("llama-110m").spec, use).moments
        return max((t.bytes for m in moments for t in m.terms if t.name == term), default=0)

    low, high = share
    assert low <= bytes(**changes) / bytes() <= high


def test_weights_that_lie_otherwise_in_the_file_are_copied():
    assert rearranged(known("llama-15m")) == 0
    gpt2 = known("gpt2-124m")  # transposed, every map of its layers
    assert rearranged(gpt2) == 12 * 12 * 768 * 768
    assert beside(gpt2, "float32", "lora") == 4 * rearranged(gpt2)
    assert beside(gpt2, "bfloat16", "lora") == 0  # all is copied, and no page stays


def test_a_plan_of_a_large_model_on_small_gpus_spreads_it():
    settings = Settings(purpose="generate", dtype="bfloat16", gpus="2x12GiB", ram="64GiB")
    plan = make_plan("llama-3.1-8b", settings)
    assert not plan.asked.fits and plan.cheapest is not None and plan.cheapest.place == "gpus"
    places = plan.device_map
    assert places is not None and {*places.values()} == {0, 1}
    order = list(places.values())
    assert order == sorted(order)  # one border
    assert make_plan("llama-3.1-8b", Settings(gpus="80GiB", ram="1GiB")).device_map == {"": 0}


@pytest.mark.parametrize(
    ("said", "format", "opaque"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq", False),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4", False),
        ({"load_in_8bit": True}, "llm-int8", False),
        ({"quant_method": "fp8"}, None, True),
        (None, None, False),
    ],
)
def test_packed_checkpoints_are_known_by_their_config(said, format, opaque, tmp_path):
    raw = PRESETS["llama-15m"].config | ({} if said is None else {"quantization_config": said})
    (tmp_path / "config.json").write_text(json.dumps(raw))
    found = outline(tmp_path)
    assert (found.quantization, found.opaque) == (format, opaque)


def test_adapters_on_packed_weights_are_planned_as_qlora(tmp_path):
    raw = PRESETS["llama-15m"].config | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    use = use_of(outline(tmp_path), Settings(), HERE)
    assert (use.method, use.quantization) == ("qlora", "gptq")
    aliased = use_of(known("llama-15m"), Settings(purpose="generate", quantization="int8"), HERE)
    assert aliased.quantization == "llm-int8"


ADAPTERS = (
    {},
    {"use_dora": True},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "olora", "use_dora": True},
    {"init_lora_weights": "eva"},
    {"method": "qlora"},
    {"method": "qlora", "init_lora_weights": "loftq"},
    {"method": "qlora", "kbit_upcast": "peft", "dtype": "bfloat16"},
)


@pytest.mark.parametrize("settings", ADAPTERS, ids=str)
def test_a_plan_and_the_run_it_plans_foretell_the_same_bytes(settings, world, tmp_path):
    """Where every example is as long as the plan says, and nothing is held out."""
    from ardor.train.config import Finetune
    from ardor.train.finetune import prepare

    text = " ".join(["the cat sat on the mat and saw one dog"] * 60)
    data = write_rows(tmp_path / "long.jsonl", [{"text": text}] * 8)
    run = prepare(
        Finetune(
            model=str(world.base),
            data=str(data),
            output=tmp_path / "run",
            max_length=48,
            over_length="truncate_left",
            per_device_train_batch_size=2,
            max_steps=1,
            eval_fraction=0.0,
            train_sampling_strategy="sequential",
            lora_r=4,
            **settings,
        )
    )
    planned = Settings(max_length=48, batch_size=2, lora_r=4, **settings)
    model = known(str(world.base))
    asked = estimate(model.spec, use_of(model, planned, this_machine()))
    assert run.predicted == asked.bytes
    plain = replace(planned, use_dora=False, init_lora_weights="default", lora_r=1)
    plain = replace(plain, kbit_upcast="none")
    assert estimate(model.spec, use_of(model, plain, this_machine())).bytes != asked.bytes


def test_what_becomes_float32_is_planned_and_is_the_first_thing_to_leave():
    def planned(**changes):
        settings = Settings(method="qlora", gpus="none", ram="4GiB", max_length=128, batch_size=1)
        return make_plan("gemma-2-2b", replace(settings, **changes))

    plain, peft = planned(), planned(kbit_upcast="peft")
    table = 2 * 256000 * 2304  # twice the bytes of the embedding, which is the head
    assert peft.asked.needed - plain.asked.needed > table
    assert plain.asked.fits and not peft.asked.fits and peft.cheapest is not None
    assert peft.cheapest.changes == ("--kbit-upcast norms",)


def test_on_packed_weights_a_plan_begins_plainly_instead_of_from_the_full_ones():
    settings = Settings(init_lora_weights="pissa", gpus="none", ram="3GiB", max_length=128)
    found = make_plan("tinyllama-1.1b", settings).cheapest
    assert found is not None and found.use.method == "qlora" and not found.use.offset
    assert "--init-lora-weights default" in found.changes
