"""Ardor's side of a duel: `python -m benchmarks.ours TASK OPTIONS` (options as JSON)."""

import json
import sys
from collections.abc import Callable, Mapping

import torch

from ardor.arch.decoder import Decoder
from ardor.arch.init import initialise
from ardor.data.batches import Batch
from ardor.families import FAMILIES
from ardor.families.hf_config import HFConfig
from ardor.generate.decode import Request, decode
from ardor.load import load_model
from ardor.loss import IGNORE
from ardor.place import Spread
from ardor.precision import dtype_of
from ardor.score import document_loss
from ardor.train.compiled import compile_parts
from ardor.train.config import Optimisation
from ardor.train.optim import Optimizer, trainable
from benchmarks import shapes
from benchmarks.worker import after_the_first, serve, timed


def _decoder(shape: Mapping[str, object], compute: torch.dtype) -> Decoder:
    family = FAMILIES[str(shape["model_type"])]
    spec = family.spec(HFConfig(dict(shape), path="benchmarks/shapes.py"))
    decoder = Decoder(spec, compute=compute)
    initialise(decoder, torch.Generator().manual_seed(0))
    return decoder


def train(dtype: str, compiled: bool) -> Callable[[], tuple[int, float]]:
    """One optimizer step over a batch of whole rows."""
    decoder = _decoder(shapes.TRAIN, dtype_of(dtype))
    if compiled:
        compile_parts(decoder)
    parameters = trainable(decoder)
    optimizer = Optimizer(parameters, Optimisation(adam_beta2=0.999, weight_decay=0.01))
    optimizer.set_rate(shapes.LEARNING_RATE)
    rows = torch.randint(0, shapes.TRAIN["vocab_size"], (shapes.BATCH, shapes.LENGTH))
    targets = torch.cat([rows[:, 1:], torch.full((shapes.BATCH, 1), IGNORE)], 1)
    batch = Batch(
        rows.reshape(1, -1),
        targets.reshape(1, -1),
        (shapes.LENGTH,) * shapes.BATCH,
        tuple(range(shapes.BATCH)),
    )

    def step() -> int:
        loss = document_loss(decoder, batch)
        (loss.nats / int(loss.targets)).backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), shapes.MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return rows.numel()

    return timed(step)


def _read(model: str, dtype: str) -> Decoder:
    decoder = _decoder(shapes.MODELS[model], dtype_of(dtype))
    return decoder.to(dtype_of(dtype)).requires_grad_(False)


def generate(model: str, dtype: str, new_tokens: int) -> Callable[[], tuple[int, float]]:
    """Greedy decoding after one prompt."""
    decoder = _read(model, dtype)
    prompt = list(range(1, shapes.DECODE_PROMPT + 1))

    def rounds() -> tuple[int, float]:
        return after_the_first(decode(decoder, [prompt], Request(max_new_tokens=new_tokens)))

    return rounds


def prefill(model: str, dtype: str) -> Callable[[], tuple[int, float]]:
    """A prompt up to its first token."""
    decoder = _read(model, dtype)
    prompt = list(range(1, shapes.PREFILL_PROMPT + 1))

    def first() -> int:
        assert len(list(decode(decoder, [prompt], Request(max_new_tokens=1)))) == 1
        return len(prompt)

    return timed(first)


def _offloaded(checkpoint: str) -> Decoder:
    decoder = load_model(checkpoint, device=Spread(shapes.OFFLOAD)).decoder
    assert isinstance(decoder, Decoder)
    return decoder


def offload(model: str, dtype: str, checkpoint: str) -> Callable[[], tuple[int, float]]:
    """One token of a model whose layers are on disk."""
    decoder = _offloaded(checkpoint)
    prompt = list(range(1, shapes.OFFLOAD_PROMPT + 1))
    return timed(lambda: len(list(decode(decoder, [prompt], Request(max_new_tokens=1)))))


def offload_load(model: str, dtype: str, checkpoint: str) -> Callable[[], tuple[int, float]]:
    """Loading it, up to where it can be given a prompt."""
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
    rounds = TASKS[task](**options)  # type: ignore[operator]
    serve(rounds, about=f"ardor, torch {torch.__version__}")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
