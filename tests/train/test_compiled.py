"""torch.compile of the parts that do not depend on where documents end.

In processes of their own: annotations that are checked, as in tests, cannot be compiled.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ardor.arch.causal import CausalLM
from ardor.arch.decoder import Decoder
from ardor.errors import ConfigError
from ardor.train.compiled import compile_parts

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler on this machine"
)
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from torch._dynamo.utils import counters
from ardor.train import finetune
from ardor.train.config import Finetune
torch.set_num_threads(1)
settings, found = json.loads(sys.argv[1]), {}
for compiled in (False, True):
    output = Path(f"{settings['output']}-{compiled}")
    run = finetune.prepare(Finetune(**{**settings, "output": output, "torch_compile": compiled}))
    losses = [e["loss"] for e in run.events() if e["kind"] == "train"]
    graphs = counters["stats"]["unique_graphs"]
    feed_forward = run.trainer.decoder.layers[0].ffn._compiled_call_impl is not None
    found[str(compiled)] = {"losses": losses, "graphs": graphs, "feed_forward": feed_forward}
print(json.dumps(found))
"""


def both(base: Path, pairs: Path, folder: Path, **settings) -> tuple[dict, dict]:
    """What a run finds without and with compiled parts."""
    given = {"model": str(base), "data": str(pairs), "output": str(folder / "run")}
    given |= {"max_steps": 6, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    given |= {"eval_fraction": 0.2, "eval_steps": 3, "learning_rate": 1e-2}
    given |= {"dtype": "float32", **settings}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(given)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return found["False"], found["True"]


@needs_compiler
@pytest.mark.parametrize("again", ["none", pytest.param("selective", marks=pytest.mark.slow)])
def test_ragged_batches_share_a_few_graphs_and_give_the_same_losses(base, pairs, tmp_path, again):
    how = {"method": "full", "gradient_checkpointing": again}
    plain, compiled = both(base("llama"), pairs, tmp_path, **how)
    assert plain["graphs"] == 0 and not plain["feed_forward"]
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert len(compiled["losses"]) == 6 and compiled["losses"][-1] < compiled["losses"][0]
    # Of the norm and of the feed-forward, with gradients and without: for all layers and sizes.
    assert compiled["feed_forward"] and 2 <= compiled["graphs"] <= 8


@needs_compiler
@pytest.mark.parametrize("method", ["qlora", pytest.param("lora", marks=pytest.mark.slow)])
def test_adapters_train_under_it_and_packed_weights_are_left_alone(base, pairs, tmp_path, method):
    plain, compiled = both(base("llama"), pairs, tmp_path, method=method)
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert compiled["feed_forward"] == (method == "lora")


def test_a_model_that_transformers_runs_and_a_machine_without_a_compiler_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="run by transformers"):
        compile_parts(CausalLM.__new__(CausalLM))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    decoder = Decoder.__new__(Decoder)
    torch.nn.Module.__init__(decoder)
    decoder.embed_tokens = torch.nn.Embedding(2, 2)
    with pytest.raises(ConfigError, match="C\\+\\+ compiler"):
        compile_parts(decoder)
