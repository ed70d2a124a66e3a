"""One load in this process: `python -m benchmarks.load_worker ours|transformers OPTIONS` (JSON).

Imports are not timed. The peak is VmHWM: everything resident, mapped pages of files included.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

PROMPT = list(range(1, 17))


Side = tuple[Callable[[], Any], Callable[[Any], Any]]  # load a model; have it say one token


def ours(directory: str, dtype: str, threads: int) -> Side:
    import torch

    from ardor.generate.decode import Request, decode
    from ardor.load import load_model

    torch.set_num_threads(threads)

    def first(model: Any) -> Any:
        return list(decode(model.decoder, [PROMPT], Request(max_new_tokens=1)))

    return lambda: load_model(directory, dtype=dtype), first


def transformers(directory: str, dtype: str, threads: int) -> Side:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers import logging as their_logging

    torch.set_num_threads(threads)
    their_logging.set_verbosity_error()
    their_logging.disable_progress_bar()
    ids = torch.tensor([PROMPT])
    # Its modules are imported when a class is first asked for.
    AutoModelForCausalLM.from_config(_tiny(), dtype=torch.float32)

    def first(model: Any) -> Any:
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False)

    return lambda: AutoModelForCausalLM.from_pretrained(directory, dtype=dtype), first


def _tiny() -> Any:
    from transformers import AutoConfig

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return AutoConfig.for_model("llama", **sizes, vocab_size=8, intermediate_size=8)


def memory(key: str) -> int:
    """Bytes, from the kernel's account of this process."""
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines[key].split()[0]) * 1024


def main(side: str, options: dict[str, Any]) -> None:
    load, first = {"ours": ours, "transformers": transformers}[side](**options)
    before = memory("VmRSS")
    began, cpu = time.perf_counter(), time.process_time()
    model = load()
    loaded, cpu = time.perf_counter(), time.process_time() - cpu
    load_peak = memory("VmHWM")
    first(model)
    found = {
        "load_seconds": loaded - began,
        "load_cpu_seconds": cpu,  # of all threads: steadier where others share the cores
        "first_token_seconds": time.perf_counter() - began,
        "imported_bytes": before,
        "load_peak_bytes": load_peak,
        "peak_bytes": memory("VmHWM"),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
