"""`ardor VERB ...`: finds the verb, and turns whatever happens into one message and an exit code.

0 success, 2 a mistake the user can correct, 1 a bug of ours, 130 interrupted, 141 closed pipe.
`ardor doctor` answers 0, 1 or 2 by itself: clean, warnings, errors; `ardor plan` too: it fits, fits
with changes, fits in no way.
"""

import errno
import json
import os
import sys
import traceback
import warnings
from difflib import get_close_matches
from importlib import import_module

from ardor import __version__
from ardor.errors import ArdorError, ConfigError
from ardor.memory.products import bound_products

# Verb -> its module (with `Config` and `run(config) -> int`), and its line in the help.
VERBS = {
    "quickstart": ("ardor.cli.quickstart", "the whole job on this machine, offline, in 5 minutes"),
    "download": ("ardor.cli.download", "fetch a model from the hub, as far as it is needed"),
    "train": ("ardor.cli.train", "train a model and its tokenizer from scratch"),
    "finetune": ("ardor.cli.finetune", "tune a model on your data: full, LoRA or QLoRA"),
    "preview": (
        "ardor.cli.preview",
        "your data as the model will be trained on it, token by token",
    ),
    "generate": ("ardor.cli.generate", "continue a prompt"),
    "chat": ("ardor.cli.chat", "talk with a model or a run"),
    "score": ("ardor.cli.score", "loss, perplexity and bits per byte of a text"),
    "plan": ("ardor.cli.plan", "what a model takes in memory, whether it fits, and what would"),
    "quantize": ("ardor.cli.quantize", "write a checkpoint in 4 or 8 bits, and what that costs"),
    "merge": ("ardor.cli.merge", "fold a run's adapter into its base, and what that costs"),
    "doctor": ("ardor.cli.doctor", "what is wrong with a checkpoint, and what to do about it"),
}

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns the exit code; nothing but a killed process leaves another way."""
    args = sys.argv[1:] if argv is None else argv
    _open_closed_streams()
    bound_products()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = _dispatch(args)
            sys.stdout.flush()  # a closed pipe shows here, not while the interpreter shuts down
            return code
        except SystemExit as request:
            return request.code if isinstance(request.code, int) else 0
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except KeyboardInterrupt as error:
            hints = [*map(str, error.args), *getattr(error, "__notes__", ())]
            print("\n" + "\n".join(["interrupted", *hints]), file=sys.stderr)
            return 130
        except Exception as error:  # noqa: BLE001 (the one place where every error ends)
            return _report(error, as_json="--json" in args)


def _open_closed_streams() -> None:
    """A shell's `<&-` or `>&-` leaves None, which nobody who reads or prints reckons with."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (open to the end)


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if args[0] in ("-V", "--version", "version"):
        print(f"ardor {__version__}")
        return 0
    verb = args[0]
    if verb not in VERBS:
        close = get_close_matches(verb, VERBS, n=1, cutoff=0.5)
        hint = f"did you mean `ardor {close[0]}`?" if close else f"known: {', '.join(VERBS)}."
        kind = "flag" if verb.startswith("-") else "verb"
        raise ConfigError(f"unknown {kind} {verb!r}; {hint} The verb comes first.")
    from ardor.cli.config import parse  # later: `ardor --help` needs no parser

    module = import_module(VERBS[verb][0])
    return module.run(parse(module.Config, args[1:], verb))


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {line}" for verb, (_, line) in VERBS.items())
    return f"""\
Usage: ardor VERB [MODEL] [DATA] [--flags] [--config FILE.yaml]

Decoder-only language models: load, fine-tune, generate and score.

{verbs}

`ardor VERB --help` shows a verb's settings. --json prints for machines, --version the version.
Start with `ardor quickstart`."""


def _report(error: Exception, *, as_json: bool) -> int:
    """Print `error` for a person or a machine; 2 if the user can act on it, else 1."""
    message = _remedy(error)
    if message is not None:
        message = "\n".join([message, *getattr(error, "__notes__", ())])
    code = 1 if message is None else 2
    trace = "" if message else "".join(traceback.format_exception(error))
    if as_json:
        kind = type(error).__name__
        shown = {"error": kind, "message": message or str(error), "exit_code": code}
        print(json.dumps(shown | ({"traceback": trace} if trace else {})), file=sys.stderr)
    elif message:
        print(f"error: {message}", file=sys.stderr)
    else:
        version = f"ardor {__version__}, Python {sys.version.split()[0]}, {sys.platform}"
        print(
            f"{trace}\nthis is a bug in ardor, not a mistake of yours: {type(error).__name__}."
            f"\nPlease report it with the lines above, your command, and: {version}",
            file=sys.stderr,
        )
    return code


def _remedy(error: Exception) -> str | None:
    """What the user can do about `error`, or None when it is our bug."""
    if isinstance(error, ArdorError):
        return str(error)
    cause: BaseException | None = error
    while cause is not None:
        # torch and safetensors report a full disk with exceptions of their own.
        full = isinstance(cause, OSError) and cause.errno in FULL_DISK
        if full or "No space left on device" in str(cause):
            return (
                f"the disk is full: {cause}. What was already written is whole; "
                "free some space, or write to another disk, and run the same command again"
            )
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, OSError) and error.errno in FORBIDDEN:
        return f"not allowed: {error}. Choose a place that you may write to, or mend its rights"
    return None


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)
