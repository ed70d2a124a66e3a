"""transformers' side of a duel, at its best: fused AdamW, sdpa, autocast where it is faster.

Runs in the peers' own environment (make bench-peers); it imports nothing of ours but the shapes.
"""

import json
import sys
from collections.abc import Callable

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import shapes
from benchmarks.worker import serve


def train(dtype: str, compiled: bool) -> Callable[[], int]:
    model = LlamaForCausalLM(LlamaConfig(**shapes.TRAIN))
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

    return step


def generate(dtype: str, new_tokens: int) -> Callable[[], int]:
    model = LlamaForCausalLM(LlamaConfig(**shapes.DECODE)).to(getattr(torch, dtype)).eval()
    prompt = torch.arange(1, shapes.PROMPT + 1)[None]
    mask = torch.ones_like(prompt)

    @torch.inference_mode()
    def run() -> int:
        out = model.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return out.shape[1] - prompt.shape[1]

    return run


def main(task: str, options: dict[str, object]) -> None:
    torch.set_num_threads(int(options.pop("threads")))  # type: ignore[call-overload]
    transformers.logging.set_verbosity_error()
    rounds = {"train": train, "decode": generate}[task](**options)  # type: ignore[operator]
    serve(rounds, about=f"transformers {transformers.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
