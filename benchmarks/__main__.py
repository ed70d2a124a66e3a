"""`python -m benchmarks decode|prefill|train|load`: us and a peer in turn, and the ratio."""

import argparse
import json
import os

from benchmarks import loading
from benchmarks.duel import duel
from benchmarks.shapes import MODELS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("task", choices=["decode", "prefill", "train", "load"])
    parser.add_argument(
        "--model", choices=list(MODELS), default="tinyllama", help="of what is read"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--quantization", choices=["none", "nf4", "nf4-dq", "fp4", "int8"], default="none"
    )
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds (median)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--new-tokens", type=int, default=32, help="decode: tokens a round")
    parser.add_argument("--compile", action="store_true", help="train: torch.compile on both sides")
    args = parser.parse_args()
    options = {"dtype": args.dtype, "threads": args.threads}
    if args.task == "train":
        options["compiled"] = args.compile
    else:
        options["model"] = args.model
    if args.task == "decode":
        options["new_tokens"] = args.new_tokens
    if args.task == "load":
        options["quantization"] = args.quantization
        print(json.dumps(loading.duel(args.rounds, options), indent=2))
        return
    print(json.dumps(duel(args.task, args.rounds, options), indent=2))


if __name__ == "__main__":
    main()
