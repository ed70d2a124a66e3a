"""transformers' side of a duel, at its best: fused AdamW, sdpa, autocast where it is faster.

Runs in the peers' own environment (make bench-peers); it imports nothing of ours but the shapes.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

from benchmarks import shapes
from benchmarks.worker import serve, timed


def _model(shape: dict[str, Any], attn: str) -> Any:
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**shape), dtype=torch.float32, attn_implementation=attn
    )


def train(dtype: str, compiled: bool) -> Callable[[], tuple[int, float]]:
    model = _model(shapes.TRAIN, "sdpa")
    model.train()
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=shapes.LEARNING_RATE, weight_decay=0.01, fused=True
    )
    rows = torch.randint(0, shapes.TRAIN["vocab_size"], (shapes.BATCH, shapes.LENGTH))

    def step() -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = forward(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), shapes.MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return rows.numel()

    return timed(step)


class Clock(StoppingCriteria):
    """Stops nothing; remembers when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)


def _read(model: str, dtype: str) -> Any:
    """The model at its best here: sdpa where it has that, and its default code for experts."""
    attn = "eager" if model == "gemma2" else "sdpa"  # there is no soft cap in its sdpa
    return _model(shapes.MODELS[model], attn).to(getattr(torch, dtype)).eval()


def _generate(model: Any, prompt: torch.Tensor, new_tokens: int, clock: Clock) -> None:
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )


def generate(model: str, dtype: str, new_tokens: int) -> Callable[[], tuple[int, float]]:
    held = _read(model, dtype)
    prompt = torch.arange(1, shapes.DECODE_PROMPT + 1)[None]

    @torch.inference_mode()
    def rounds() -> tuple[int, float]:
        clock = Clock()
        _generate(held, prompt, new_tokens, clock)
        return len(clock.times) - 1, clock.times[-1] - clock.times[0]

    return rounds


def prefill(model: str, dtype: str) -> Callable[[], tuple[int, float]]:
    held = _read(model, dtype)
    prompt = torch.arange(1, shapes.PREFILL_PROMPT + 1)[None]

    @torch.inference_mode()
    def first() -> int:
        _generate(held, prompt, 1, Clock())
        return prompt.numel()

    return timed(first)


def _offloaded(checkpoint: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype="auto",
        device_map=dict(shapes.OFFLOAD),
        offload_folder=f"{checkpoint}-off",
    ).eval()


def offload(model: str, dtype: str, checkpoint: str) -> Callable[[], tuple[int, float]]:
    held = _offloaded(checkpoint)
    prompt = torch.arange(1, shapes.OFFLOAD_PROMPT + 1)[None]

    @torch.inference_mode()
    def token() -> int:
        _generate(held, prompt, 1, Clock())
        return 1

    return timed(token)


def offload_load(model: str, dtype: str, checkpoint: str) -> Callable[[], tuple[int, float]]:
    return timed(lambda: int(_offloaded(checkpoint) is not None))


TASKS = {
    "train": train,
    "decode": generate,
    "prefill": prefill,
    "offload": offload,
    "offload-load": offload_load,
}


def main(task: str, options: dict[str, object]) -> None:
    torch.set_num_threads(int(options.pop("threads")))  # type: ignore[call-overload]
    transformers.logging.set_verbosity_error()
    rounds = TASKS[task](**options)  # type: ignore[operator]
    serve(rounds, about=f"transformers {transformers.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
