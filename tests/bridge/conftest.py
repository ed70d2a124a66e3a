"""Small models that only transformers can run: of its own classes, and of code in a repository."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ardor.text.tokenizer import Tokenizer

from ..tiny import sentences

CONFIGURATION = """
from pathlib import Path
from transformers import PretrainedConfig

Path({marker!r}).write_text("configuration")

class OddConfig(PretrainedConfig):
    model_type = "odd"

    def __init__(self, vocab_size=1, width=16, depth=2, n_positions=48, dropout=0.0, **rest):
        self.vocab_size, self.width, self.depth = vocab_size, width, depth
        self.n_positions, self.dropout = n_positions, dropout
        super().__init__(**rest)
"""

LAYERS = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width, index, dropout):
        super().__init__()
        self.index, self.norm = index, nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, cache):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        if cache is not None:
            k, v = (t[:, 0] for t in cache.update(k[:, None], v[:, None], self.index))
        T, S = q.shape[1], k.shape[1]
        allowed = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        scores = (q @ k.transpose(-1, -2)).masked_fill(~allowed, float("-inf"))
        return x + self.dropout(self.out((scores / q.shape[-1] ** 0.5).softmax(-1) @ v))
"""

MODELING = """
import sys
from pathlib import Path
import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from .configuration_odd import OddConfig
from .layers_odd import Block

Path({marker!r}).write_text("modeling")
print("the code runs", file=sys.stderr)

class OddForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.places = nn.Embedding(config.n_positions, config.width)
        blocks = (Block(config.width, i, config.dropout) for i in range(config.depth))
        self.blocks = nn.ModuleList(blocks)
        self.unembed = nn.Linear(config.width, config.vocab_size, bias=False)
        self.table = None
        self.post_init()

    def get_input_embeddings(self):
        return self.tokens

    def get_output_embeddings(self):
        return self.unembed

    def forward(self, input_ids, past_key_values=None, attention_mask=None, use_cache=None, **_):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if not use_cache:
            past_key_values = None
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if self.table is None:  # kept from the first call, as rotations often are
            self.table = torch.linspace(0.5, 1.5, self.config.width, device=input_ids.device)
        x = self.tokens(input_ids)
        x = x + self.places(torch.arange(past, past + input_ids.shape[1], device=x.device))
        x = x * self.table.to(x.dtype)
        for block in self.blocks:
            x = block(x, past_key_values)
        logits = torch.tanh(self.unembed(x) / 8) * 8  # what no head of ours would do
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
"""

AUTO_MAP = {
    "AutoConfig": "configuration_odd.OddConfig",
    "AutoModelForCausalLM": "modeling_odd.OddForCausalLM",
    "AutoTokenizer": ["tokenization_odd.OddTokenizer", None],
}


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    """Models this small only lose by sharing, and lose much where the cores are shared too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="package")
def _own_module_cache(tmp_path_factory):
    """Where transformers copies code to before it runs it: not the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", list(sys.path))
        yield


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(sentences(30), vocab_size=280)


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: 0.4 * torch.randn(shape, generator=g) for name, shape in shapes.items()}


def write_odd(
    path: Path, tokenizer: Tokenizer, edit: Callable[[str], str] = str, **changes: Any
) -> Path:
    """A repository with its own code, which leaves a file `ran` beside itself when it is run."""
    path.mkdir(parents=True, exist_ok=True)
    marker, width, rows = str(path.parent / f"{path.name}-ran"), 16, tokenizer.vocab_rows + 3
    (path / "configuration_odd.py").write_text(CONFIGURATION.format(marker=marker))
    (path / "modeling_odd.py").write_text(edit(MODELING.format(marker=marker)))
    (path / "layers_odd.py").write_text(LAYERS)
    (path / "unrelated.py").write_text("raise SystemExit\n")
    config = {"model_type": "odd", "vocab_size": rows, "width": width, "depth": 2}
    config |= {"n_positions": 48, "dtype": "float32", "auto_map": AUTO_MAP} | changes
    (path / "config.json").write_text(json.dumps(config, indent=2))
    shapes: dict[str, tuple[int, ...]] = {
        "tokens.weight": (rows, width),
        "places.weight": (48, width),
        "unembed.weight": (rows, width),
    }
    for i in range(2):
        shapes |= {
            f"blocks.{i}.{name}": shape
            for name, shape in {
                "norm.weight": (width,),
                "norm.bias": (width,),
                "qkv.weight": (3 * width, width),
                "qkv.bias": (3 * width,),
                "out.weight": (width, width),
                "out.bias": (width,),
            }.items()
        }
    save_file(random_state(shapes), path / "model.safetensors", {"format": "pt"})
    tokenizer.save(path, None)
    return path


def ran(path: Path) -> bool:
    """Whether the code of a repository was run."""
    return path.with_name(f"{path.name}-ran").exists()


@pytest.fixture(scope="session")
def odd(tokenizer, tmp_path_factory) -> Path:
    """Shared: only for reading, and for tests that do not ask whether its code ran."""
    return write_odd(tmp_path_factory.mktemp("shared") / "odd", tokenizer)


NATIVE: dict[str, dict[str, Any]] = {
    "gpt_neo": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 4}
    | {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 48},
    "xglm": {"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 2}
    | {"max_position_embeddings": 48},
    "codegen": {"n_positions": 48, "n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 2},
    "biogpt": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"intermediate_size": 24, "max_position_embeddings": 48},
    "openai-gpt": {"n_positions": 48, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "mamba2": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "num_heads": 4}
    | {"head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "rwkv": {"context_length": 48, "hidden_size": 16, "num_hidden_layers": 4, "rescale_every": 2},
    "helium": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24},
    "glm4_moe": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"num_key_value_heads": 2, "intermediate_size": 24, "n_routed_experts": 4, "head_dim": 8}
    | {"num_experts_per_tok": 2, "moe_intermediate_size": 8},
    "bert": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"intermediate_size": 24, "max_position_embeddings": 48},
}


def write_native(path: Path, tokenizer: Tokenizer, kind: str, **changes: Any) -> Path:
    """A model of one of transformers' own classes that we do not implement."""
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    given = NATIVE[kind] | special | {"vocab_size": tokenizer.vocab_rows + 3} | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(path)
    (path / "generation_config.json").unlink()
    tokenizer.save(path, None)
    return path


def theirs(path: Path, **given: Any) -> Any:
    """The model as transformers itself loads it."""
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **given).eval()


def greedy(model: Any, ids: list[int], count: int, known: int) -> list[int]:
    """transformers' own continuation, without a cache, of tokens that the tokenizer has."""
    row = torch.tensor([ids])
    found = model.generate(
        row,
        attention_mask=torch.ones_like(row),
        max_new_tokens=count,
        do_sample=False,
        use_cache=False,
        eos_token_id=None,
        pad_token_id=0,
        # Nor is the padding token ever generated, the second of the last four.
        suppress_tokens=[known - 3, *range(known, model.config.vocab_size)],
    )
    return found[0, len(ids) :].tolist()
