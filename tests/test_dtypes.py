"""In which dtype weights are held and computed with: the same as transformers, and said."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ardor import load as public_load
from ardor import precision
from ardor.arch.decoder import Decoder
from ardor.arch.init import initialise
from ardor.errors import ConfigError
from ardor.families import FAMILIES
from ardor.families.hf_config import HFConfig
from ardor.files import convert
from ardor.files.weights import open_weights
from ardor.load import Native
from ardor.precision import Precision, resolve, training_compute

HALF, WHOLE, SHORT = torch.bfloat16, torch.float32, torch.float16
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
}


def write(directory: Path, *, stored: torch.dtype, said: dict[str, str], **shape: object) -> Path:
    """A random checkpoint with weights in `stored` and the keys `said` in its config.json."""
    raw = SHAPE | shape
    family = FAMILIES["llama"]
    spec = family.spec(HFConfig(raw, path="SHAPE"))
    decoder = Decoder(spec)
    initialise(decoder, torch.Generator().manual_seed(0))
    directory.mkdir(parents=True, exist_ok=True)
    Native(family, spec, family.rules(spec)).write(decoder.to(stored), directory)
    (directory / "config.json").write_text(json.dumps(raw | said))
    return directory


@pytest.mark.parametrize("stored", [WHOLE, HALF, SHORT])
@pytest.mark.parametrize(
    "said", [{}, {"dtype": "bfloat16"}, {"torch_dtype": "float32"}, {"torch_dtype": "float16"},
             {"dtype": "float32", "torch_dtype": "float16"}]
)  # fmt: skip
@pytest.mark.parametrize("asked", ["auto", "bfloat16", torch.float32])
def test_weights_are_in_the_dtype_that_transformers_gives_them(tmp_path, stored, said, asked):
    directory = write(tmp_path / "m", stored=stored, said=said)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=asked)
    ours = public_load(directory, dtype=asked).model
    assert {p.dtype for p in ours.decoder.parameters()} == {theirs.dtype}
    assert ours.precision.weights == theirs.dtype
    for name, tensor in ours.form.rules.to_disk(dict(ours.decoder.named_parameters()).__getitem__):
        assert torch.equal(tensor, theirs.state_dict()[name]), name


def test_a_disagreement_of_config_and_files_is_said(tmp_path):
    directory = write(tmp_path / "m", stored=WHOLE, said={"dtype": "bfloat16"})
    found = public_load(directory).model.precision
    assert found.why.startswith("config.json says bfloat16, though the files hold float32")
    assert not found.as_stored
    assert public_load(directory, dtype="float32").model.precision.why == "as asked"


def test_what_is_no_dtype_in_config_is_refused(tmp_path):
    directory = write(tmp_path / "m", stored=WHOLE, said={"dtype": "floaty"})
    with pytest.raises(ConfigError, match=r"config\.json: dtype 'floaty' is not one of .*remove"):
        public_load(directory)


def test_weights_beside_those_of_the_named_dtype_keep_more_than_transformers_keeps(tmp_path):
    directory = write(tmp_path / "m", stored=HALF, said={"dtype": "bfloat16"})
    file = directory / "model.safetensors"
    norm = torch.full((16,), 1.001)
    save_file(load_file(file) | {"model.norm.weight": norm}, file, metadata={"format": "pt"})
    ours = public_load(directory).model.decoder
    assert torch.equal(ours.norm.weight, norm)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    assert not torch.equal(theirs.model.norm.weight.float(), norm)


@pytest.mark.parametrize(
    ("device", "fast", "stored", "said", "weights", "compute"),
    [
        (CPU, True, HALF, None, HALF, HALF),
        (CPU, False, HALF, None, HALF, WHOLE),
        (CPU, False, WHOLE, HALF, HALF, WHOLE),
        (GPU, True, HALF, None, HALF, HALF),
        (GPU, False, HALF, None, HALF, SHORT),
        (GPU, False, SHORT, None, SHORT, SHORT),
        (CPU, False, SHORT, None, SHORT, SHORT),
        (GPU, False, HALF, WHOLE, WHOLE, WHOLE),
        (CPU, False, WHOLE, None, WHOLE, WHOLE),
    ],
)
def test_bfloat16_is_computed_with_where_it_is_fast(
    monkeypatch, device, fast, stored, said, weights, compute
):
    monkeypatch.setattr(precision, "fast_bfloat16", lambda _: fast)
    found = resolve("auto", stored, device, said)
    assert (found.weights, found.compute) == (weights, compute)
    assert ("no fast bfloat16" in found.why) == (compute != weights)
    assert resolve("bfloat16", stored, device, said) == Precision(HALF, HALF, "as asked")


def test_what_is_trained_is_float32_whatever_computes(monkeypatch):
    for fast in (True, False):
        monkeypatch.setattr(precision, "fast_bfloat16", lambda _, fast=fast: fast)
        for dtype in ("auto", "bfloat16", "float32"):
            assert training_compute(dtype, CPU).weights == WHOLE
        assert training_compute("auto", CPU).compute == (HALF if fast else WHOLE)
    with pytest.raises(ConfigError, match="overflows in training without a loss scaler"):
        training_compute("float16", GPU)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [WHOLE, SHORT, HALF, torch.float64])
def test_a_conversion_by_threads_is_the_conversion(monkeypatch, threads, dtype):
    monkeypatch.setattr(convert, "WORTH_A_THREAD", 1000)
    monkeypatch.setattr(convert.torch, "get_num_threads", lambda: threads)
    g = torch.Generator().manual_seed(0)
    for shape in [(), (0, 3), (5,), (1001, 211), (convert.SERIAL,), (3, convert.SERIAL)]:
        for tensor in (torch.randn(shape, generator=g), torch.randn(shape, generator=g).bfloat16()):
            found = convert.converted(tensor, dtype)
            assert found.dtype == dtype and torch.equal(found, tensor.to(dtype))
    turned = torch.randn(300, 200, generator=g).mT
    assert torch.equal(convert.converted(turned, dtype), turned.to(dtype))


def test_codes_are_not_converted(tmp_path):
    save_file({"codes": torch.arange(4)}, tmp_path / "model.safetensors")
    assert open_weights(tmp_path).read_as("codes", WHOLE, CPU).dtype == torch.int64


PEAK = """
import sys
from ardor.arch.attention import backend_for
import torch
from ardor.load import load_model

def held(key):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[key].split()[0]) * 1024

torch.set_num_threads(2)
before = held("VmHWM")
model = load_model(sys.argv[1], dtype=sys.argv[2])
weights = sum(p.nbytes for p in model.decoder.parameters())
print(held("VmHWM") - before, weights, max(p.nbytes for p in model.decoder.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("stored", "dtype"), [(HALF, "float32"), (WHOLE, "bfloat16")])
def test_converting_on_the_way_in_needs_no_second_copy(tmp_path, sharded, stored, dtype):
    """The peak of resident memory (VmHWM), in which mapped pages of the files count."""
    large = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 8}
    directory = write(tmp_path / "m", stored=stored, said={}, **large)
    if sharded:
        from ardor.files.weights import write_weights

        held = load_file(directory / "model.safetensors")
        write_weights(directory, held, max_shard_bytes=40 << 20)
        assert len(list(directory.glob("model-*-of-*.safetensors"))) > 2
    command = [sys.executable, "-W", "ignore", "-c", PEAK, str(directory), dtype]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak, weights, largest = map(int, answer.split())
    assert weights > 100 << 20
    # 10 MiB: of modules that are imported on the way.
    assert peak <= 1.15 * weights + 2 * largest + (10 << 20)
