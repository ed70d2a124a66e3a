"""Quantized models through files: on the way in, as transformers saves them, and back."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import ardor
from ardor.adapters.merge import merge
from ardor.errors import CheckpointError, ConfigError
from ardor.files.json import read_json, write_json
from ardor.quant.experts import QuantizedExperts
from ardor.quant.formats import FORMATS
from ardor.quant.linear import QuantizedLinear

from ..parity.peer import Case, contents, logits, peer, saved, tokens

SIZES = {
    "vocab_size": 53,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA = Case("llama", sizes=SIZES)
# Queries, keys and values in one matrix; and heads within it; and one that is [in, out].
PHI3 = Case("phi3", sizes=SIZES)
FEWER = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
NEOX = Case("gpt_neox", sizes=FEWER)
GPT2 = Case(
    "gpt2",
    {"n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    sizes={key: value for key, value in FEWER.items() if key != "intermediate_size"},
)
TIED = Case("llama", {"tie_word_embeddings": True}, sizes=SIZES)
CASES = {"llama": LLAMA, "phi3": PHI3, "gpt_neox": NEOX, "gpt2": GPT2, "tied": TIED}
THEIRS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "llm-int8": {"load_in_8bit": True},
}
# Of all logits. Theirs rounds activations to float16 before 8 bits, so that some codes differ by
# one step, which is all that 8 bits change: that product itself is compared in test_bnb8.
CLOSE = dict.fromkeys(THEIRS, 1e-05) | {"llm-int8": 0.04}


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


# bitsandbytes compiles one of its CPU fallbacks, which takes longer than all of these tests.
pytestmark = [
    pytest.mark.usefixtures("eager"),
    pytest.mark.filterwarnings("ignore"),  # of bitsandbytes' own
]


@pytest.fixture
def eager():
    with torch.compiler.set_stance("force_eager"):
        yield


def dense(folder, case=LLAMA, dtype=torch.bfloat16):
    return saved(peer(case).to(dtype), folder)


def theirs(folder, **keys):
    config = BitsAndBytesConfig(**keys) if keys else None
    extra = {"quantization_config": config} if config else {}
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **extra
    ).eval()


def exact(model, format):
    """Logits without the bfloat16 kernel that bitsandbytes takes for 4 bits in evaluation."""
    return logits(model.train(format != "llm-int8"), tokens())


def quantized(lm):
    kinds = (QuantizedLinear, QuantizedExperts)
    return {n: m for n, m in lm.model.decoder.named_modules() if isinstance(m, kinds)}


@pytest.mark.parametrize("format", THEIRS)
@pytest.mark.parametrize("case", CASES)
def test_what_transformers_saves_is_read_and_saved_bitwise(tmp_path, case, format):
    dense(tmp_path / "dense", CASES[case])
    model = theirs(tmp_path / "dense", **THEIRS[format])
    saved(model, tmp_path / "theirs")  # before it runs, which repacks it for the processor
    expected = exact(model, format)
    lm = ardor.load(tmp_path / "theirs", dtype="float32")
    assert quantized(lm) and lm.model.quantization == format
    assert distance(lm.logits(tokens()), expected) < CLOSE[format]
    plain = ardor.load(tmp_path / "dense", dtype="float32").logits(tokens())
    assert distance(plain, expected) > 0.01  # the probe sees the rounding
    ardor.load(tmp_path / "theirs").save(tmp_path / "ours")
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    section = [
        read_json(tmp_path / n / "config.json")["quantization_config"] for n in ("ours", "theirs")
    ]
    assert section[0] == section[1]


@pytest.mark.parametrize("format", THEIRS)
@pytest.mark.parametrize("case", CASES)
def test_what_is_quantized_here_transformers_loads_with_the_same_logits(tmp_path, case, format):
    dense(tmp_path / "dense", CASES[case], torch.float32)
    lm = ardor.load(tmp_path / "dense", quantization=format)
    lm.save(tmp_path / "ours")
    model = theirs(tmp_path / "ours")
    kinds = {type(m).__name__ for m in model.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"}
    again = ardor.load(tmp_path / "ours", dtype="float32")
    assert distance(again.logits(tokens()), exact(model, format)) < CLOSE[format]
    # The bytes of weights are those of bitsandbytes on the same checkpoint.
    saved(
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense",
            dtype=torch.float32,
            quantization_config=BitsAndBytesConfig(**THEIRS[format]),
        ),
        tmp_path / "theirs",
    )
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_goes_through_files(tmp_path, format):
    dense(tmp_path / "dense", PHI3)
    lm = ardor.load(tmp_path / "dense", quantization=format)
    lm.save(tmp_path / "q")
    again = ardor.load(tmp_path / "q")
    assert again.model.quantization == format
    assert torch.equal(again.logits(tokens()), lm.logits(tokens()))
    again.save(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "q")
    size = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("dense", "q")]
    assert size[1] < 0.9 * size[0]


def test_transformers_refuses_our_own_format(tmp_path):
    dense(tmp_path / "dense")
    for format in ("int4-g64", "int8-g64"):
        ardor.load(tmp_path / "dense", quantization=format).save(tmp_path / "q")
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            theirs(tmp_path / "q")


@pytest.mark.parametrize("format", ["nf4", "llm-int8", "int4-g32"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_quantized_one_by_one_and_routers_are_not(tmp_path, family, format):
    keys = {
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    }[family]
    case = Case(family, {**keys, "head_dim": 16}, sizes=SIZES)
    dense(tmp_path / "dense", case)
    plain = ardor.load(tmp_path / "dense", dtype="float32").logits(tokens())
    lm = ardor.load(tmp_path / "dense", dtype="float32", quantization=format)
    held = quantized(lm)
    assert {"layers.0.ffn.experts.up_proj", "layers.1.mixer.q_proj"} <= {*held}
    assert not any("router" in name for name in held)
    found = lm.logits(tokens())
    assert 1e-3 < (found - plain).abs().mean() < 0.5 * plain.std()
    expert = held["layers.0.ffn.experts.up_proj"]
    x = torch.randn(3, 64)
    expected = x @ expert.weight(2).dequantize(torch.float32).T
    close = {"rtol": 0.05, "atol": 0.1} if format == "llm-int8" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(expert.of(2, x), expected, **close)


def test_experts_that_are_one_tensor_are_saved_by_no_format(tmp_path):
    case = Case("gpt_oss", {"head_dim": 16, "num_local_experts": 4}, sizes=SIZES)
    dense(tmp_path / "dense", case)
    lm = ardor.load(tmp_path / "dense", quantization="nf4")
    assert lm.logits(tokens()).isfinite().all()
    with pytest.raises(ConfigError, match=r"holds all experts in one tensor.*skip_modules"):
        lm.save(tmp_path / "q")
    assert not (tmp_path / "q").exists()
    skip = {"format": "nf4", "skip_modules": ["experts"]}
    lm = ardor.load(tmp_path / "dense", quantization=skip)
    lm.save(tmp_path / "q")
    assert torch.equal(ardor.load(tmp_path / "q").logits(tokens()), lm.logits(tokens()))


@pytest.mark.parametrize(
    "skip", [["self_attn"], ["mixer"], ["model.layers.0.self_attn", "layers.1.mixer"]]
)
def test_the_skip_list_adds_to_the_head_under_either_name(tmp_path, skip):
    dense(tmp_path / "dense", dtype=torch.float32)
    given = {**THEIRS["nf4"], "llm_int8_skip_modules": skip}
    lm = ardor.load(tmp_path / "dense", quantization=given)
    assert {*quantized(lm)} == {
        f"layers.{i}.ffn.{n}_proj" for i in (0, 1) for n in ("gate", "up", "down")
    }
    lm.save(tmp_path / "q")
    model = theirs(tmp_path / "q")
    kinds = {n: type(m).__name__ for n, m in model.named_modules()}
    assert kinds["lm_head"] == kinds["model.layers.1.self_attn.q_proj"] == "Linear"
    assert kinds["model.layers.1.mlp.up_proj"] == "Linear4bit"
    torch.testing.assert_close(
        ardor.load(tmp_path / "q", dtype="float32").logits(tokens()),
        exact(model, "nf4"),
        rtol=1e-4,
        atol=1e-4,
    )


def test_names_match_by_whole_parts(tmp_path):
    dense(tmp_path / "dense")
    with pytest.raises(ConfigError, match=r"skip entry 'proj' matches no module; did you mean"):
        ardor.load(tmp_path / "dense", quantization={"format": "nf4", "skip_modules": ["proj"]})


def test_the_compute_dtype_is_that_of_the_config(tmp_path):
    dense(tmp_path / "dense")
    for given in ("float32", torch.float32):
        config = {**THEIRS["nf4"], "bnb_4bit_compute_dtype": given}
        lm = ardor.load(tmp_path / "dense", quantization=config)
        assert lm.model.decoder.compute == torch.float32
        assert lm.model.precision.why == "as the quantization asks"
        assert lm.model.decoder.embed_tokens.weight.dtype == torch.bfloat16


def test_a_bitsandbytes_config_object_and_a_file_say_the_same(tmp_path):
    dense(tmp_path / "dense")
    expected = ardor.load(tmp_path / "dense", quantization="nf4-dq", dtype="float32")
    (tmp_path / "q.yaml").write_text(
        "load_in_4bit: true\nbnb_4bit_quant_type: nf4\nbnb_4bit_use_double_quant: true\n"
    )
    config = BitsAndBytesConfig(**THEIRS["nf4-dq"])
    for given in (
        {"quantization_config": config},
        {"quantization": config},
        {"quantization": str(tmp_path / "q.yaml")},
    ):
        found = ardor.load(tmp_path / "dense", dtype="float32", **given)
        assert found.model.quantization == "nf4-dq"
        assert torch.equal(found.logits(tokens()), expected.logits(tokens()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"}, "unknown key .*did you mean"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "give exactly one of them"),
        ({"llm_int8_threshold": 5.0}, "give exactly one of them"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "is not implemented"),
        ({"load_in_8bit": True, "llm_int8_threshold": "x"}, "is not a number of at least 0"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, "is neither nf4 nor fp4"),
        ({"load_in_4bit": True, "llm_int8_skip_modules": 3}, "is not a list of names"),
        ({"quant_method": "hqq"}, "quant_method='hqq': that cannot be made here"),
        ({"format": "int8", "bnb_4bit_compute_dtype": "int8"}, "dtype 'int8' is not one of"),
        (7, "is neither a name nor a set of settings"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_by_name(tmp_path, given, message):
    dense(tmp_path / "dense")
    with pytest.raises(ConfigError, match=message):
        ardor.load(tmp_path / "dense", quantization=given)


def test_two_ways_to_ask_are_refused_if_they_differ(tmp_path):
    dense(tmp_path / "dense")
    for given, message in (
        ({"load_in_4bit": True, "load_in_8bit": True}, "are both set"),
        ({"quantization": "nf4", "quantization_config": "nf4"}, "are the same; give one"),
        ({"quantization": "nf4", "load_in_8bit": True}, "load_in_8bit and quantization='nf4' diff"),
    ):
        with pytest.raises(ConfigError, match=message):
            ardor.load(tmp_path / "dense", **given)


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path):
    dense(tmp_path / "dense")
    ardor.load(tmp_path / "dense", quantization="nf4").save(tmp_path / "q")
    assert ardor.load(tmp_path / "q", load_in_4bit=True).model.quantization == "nf4"
    with pytest.raises(ConfigError, match="is quantized already, as nf4; leave quantization out"):
        ardor.load(tmp_path / "q", quantization="int8")


def test_a_missing_or_misplaced_packed_tensor_is_named(tmp_path):
    dense(tmp_path / "dense")
    ardor.load(tmp_path / "dense", quantization="nf4").save(tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in whole.items() if k != f"{name}.absmax"}, file)
    with pytest.raises(CheckpointError, match=rf"{name} is not a complete NF4 .*weight.absmax"):
        ardor.load(tmp_path / "q")
    moved = {
        k.replace("model.layers.1.mlp.up_proj", "lm_head") if k.startswith(name) else k: v
        for k, v in whole.items()
        if k != "lm_head.weight"
    }
    save_file(moved | {name: torch.zeros(128, 64)}, file)
    with pytest.raises(CheckpointError, match=r"lm_head.weight (is quantized|gives)"):
        ardor.load(tmp_path / "q")


def test_a_threshold_and_a_skip_list_are_remembered_by_an_adapter(tmp_path):
    dense(tmp_path / "dense")
    given = {"load_in_8bit": True, "llm_int8_threshold": 3.0, "llm_int8_skip_modules": ["o_proj"]}
    lm = ardor.load(tmp_path / "dense", quantization=given)
    record = lm.model.quantizing.record()
    again = ardor.load(tmp_path / "dense", quantization=record)
    assert again.model.quantizing == lm.model.quantizing
    assert torch.equal(again.logits(tokens()), lm.logits(tokens()))
    lm.save(tmp_path / "q")
    held = quantized(ardor.load(tmp_path / "q"))
    assert next(iter(held.values())).quantized.threshold == 3.0


@pytest.mark.parametrize("format", FORMATS)
def test_a_step_of_lora_on_every_format_moves_the_loss(tmp_path, format):
    from ardor.adapters.lora import LoraConfig, add_lora, lora_parameters

    dense(tmp_path / "dense", PHI3)
    lm = ardor.load(tmp_path / "dense", quantization=format, dtype="float32")
    add_lora(lm.model.decoder, LoraConfig(r=2), generator=torch.Generator().manual_seed(0))
    before = {
        n: m.base.quantized.storage
        for n, m in lm.model.decoder.named_modules()
        if hasattr(m, "base")
    }
    copies = {n: {k: t.clone() for k, t in s.items()} for n, s in before.items()}
    optimizer = torch.optim.Adam(lora_parameters(lm.model.decoder), lr=1e-2)
    losses, ids = [], tokens()
    for _ in range(4):
        decoder = lm.model.decoder
        out = decoder.logits(decoder.hidden(ids))[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(out, ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    for name, storage in copies.items():
        assert all(torch.equal(before[name][key], tensor) for key, tensor in storage.items())
    merge(lm.model.decoder)
    assert not quantized(lm)


@pytest.mark.parametrize("format", ["nf4-dq", "llm-int8", "int4-g32"])
def test_the_doctor_understands_a_quantized_checkpoint(tmp_path, format):
    dense(tmp_path / "dense", PHI3)
    ardor.load(tmp_path / "dense", quantization=format).save(tmp_path / "q")
    reports = [ardor.doctor(tmp_path / name).findings for name in ("dense", "q")]
    before, after = ({found.rule for found in findings} for findings in reports)
    assert after <= before


def test_the_doctor_names_a_quantization_that_is_not_read(tmp_path):
    dense(tmp_path / "dense")
    config = read_json(tmp_path / "dense" / "config.json")
    section = {"quant_method": "gptq", "bits": 3, "group_size": 32}
    write_json(tmp_path / "dense" / "config.json", config | {"quantization_config": section})
    findings = ardor.doctor(tmp_path / "dense").findings
    assert any("bits=3 is not read" in found.evidence for found in findings)
