"""`python -m benchmarks TASK`: us and a peer in turn, in one run, and the ratio.

load: seconds and peak of memory, a fresh process for each; offload: tokens/s with all layers on
disk; offload-load: how often a second it can be loaded so; encode: MB/s of data, to packed batches;
lora, qlora: seconds a step and peak; entropy: seconds and peak of a loss over large vocabularies.
"""

import argparse
import json
import os

from benchmarks import entropy, load_quantized, tune
from benchmarks.duel import duel
from benchmarks.encode import KINDS, encode_duel
from benchmarks.load import load_duel
from benchmarks.shapes import MODELS

OFFLOAD = ("offload", "offload-load")
TUNE = ("lora", "qlora")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    tasks = ["decode", "prefill", "train", "load", "encode", "entropy", *OFFLOAD, *TUNE]
    parser.add_argument("task", choices=tasks)
    parser.add_argument(
        "--model", choices=list(MODELS), default="tinyllama", help="of what is read"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--quantization",
        choices=["none", "nf4", "nf4-dq", "fp4", "int8"],
        default="none",
        help="load: quantized on the way in, by us and by bitsandbytes",
    )
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds (median)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--new-tokens", type=int, default=32, help="decode: tokens a round")
    parser.add_argument("--compile", action="store_true", help="train: torch.compile on both sides")
    parser.add_argument("--kind", choices=KINDS, default="text", help="encode: what the rows are")
    parser.add_argument("--megabytes", type=int, default=100, help="encode: size of the file")
    args = parser.parse_args()
    if args.task == "encode":
        given = {"megabytes": args.megabytes, "vocab": 16000, "max_length": 1024, "folder": None}
        print(json.dumps(encode_duel(args.kind, args.rounds, given), indent=2))
        return
    options = {"dtype": args.dtype, "threads": args.threads}
    if args.task == "load" and args.quantization != "none":
        given = options | {"model": args.model, "quantization": args.quantization}
        print(json.dumps(load_quantized.duel(args.rounds, given), indent=2))
        return
    if args.task == "load":
        print(json.dumps(load_duel(args.model, args.rounds, options), indent=2))
        return
    if args.task in TUNE:
        given = {"task": args.task, "model": args.model, "threads": args.threads, "steps": 3}
        print(json.dumps(tune.duel(args.rounds, given), indent=2))
        return
    if args.task == "entropy":
        print(json.dumps(entropy.duel(args.rounds, options), indent=2))
        return
    if args.task == "train":
        options["compiled"] = args.compile
    else:
        options["model"] = args.model
    if args.task == "decode":
        options["new_tokens"] = args.new_tokens
    if args.task in OFFLOAD:
        from benchmarks.checkpoint import checkpoint  # later: the others need no torch here

        options["checkpoint"] = str(checkpoint(args.model, args.dtype))
    print(json.dumps(duel(args.task, args.rounds, options), indent=2))


if __name__ == "__main__":
    main()
