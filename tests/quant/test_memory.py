"""Quantized as they arrive: the whole model in full is never in memory."""

import json
import subprocess
import sys

import pytest
import torch

from ardor.arch.decoder import Decoder
from ardor.families.hf_config import HFConfig
from ardor.families.llama import LLAMA
from ardor.files.json import write_json
from ardor.files.weights import write_weights

CONFIG = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 64,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
    "dtype": "bfloat16",
}
SLACK = 24 << 20  # what any first run of code takes
PROBE = """
import json, sys
import ardor.lm
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
ardor.load(sys.argv[1], quantization=sys.argv[2])  # twice: for what the first run takes
before = resident()
lm = ardor.load(sys.argv[3], quantization=sys.argv[2])
held = [*lm.model.decoder.parameters(), *lm.model.decoder.buffers()]
print(json.dumps([resident() - before, sum(t.nbytes for t in held)]))
"""


def checkpoint(folder, layers):
    config = {**CONFIG, "num_hidden_layers": layers}
    spec = LLAMA.spec(HFConfig(config, path="config.json"))
    decoder = Decoder(spec).to(torch.bfloat16)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter)
    state = dict(decoder.named_parameters())
    pairs = LLAMA.rules(spec).to_disk(lambda name: state[name].detach())
    write_weights(folder, pairs, max_shard_bytes=40 << 20)
    write_json(folder / "config.json", config)
    return sum(parameter.nbytes for parameter in decoder.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_peak_memory_is_that_of_the_final_weights(tmp_path, quantization):
    checkpoint(tmp_path / "small", 1)
    full = checkpoint(tmp_path / "large", 6)
    command = [sys.executable, "-c", PROBE, *map(str, (tmp_path / "small", quantization))]
    found = subprocess.run(
        [*command, str(tmp_path / "large")], capture_output=True, text=True, check=True
    )
    peak, weights = json.loads(found.stdout.splitlines()[-1])
    largest = 1024 * 4096 * 2
    bound = 1.15 * weights + largest + SLACK
    assert peak < bound
    if quantization == "nf4":
        assert full > bound  # the model in full would not have passed
