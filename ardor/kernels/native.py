"""C functions beside this file, compiled for this very machine on first use, if it can compile.

Nothing depends on them: without a compiler every caller takes its other path. The library has no
OpenMP of its own: it uses the threads that PyTorch has loaded, as two pools would fight for cores.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

HEADERS = ("gate.h", "scalar.h")
SOURCES = (
    "attention.c",
    "entropy.c",
    "flash.c",
    "gate.c",
    "matvec.c",
    "mlp.c",
    "norm.c",
    "quantize.c",
    "rotate.c",
    "thin.c",
)
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fPIC")
# Equal to torch to the last bit, so that no product may be fused into a sum.
EXACT = {"quantize.c": ("-ffp-contract=off",)}
OFF = "ARDOR_NO_NATIVE"  # set in the environment: never compile

# Every function's arguments: p a pointer, n an int64, f a float, i an int; and what it returns, if
# anything. Told once, so that a call converts plain ints without asking what they are.
SIGNATURES = {
    "matvec_bfloat16": "ppppnni",
    "rms_norm_{}": "ppppnnfi",
    "rms_norm_late_bfloat16": "ppppnnfi",
    "rms_norm_backward_{}": "ppppppnni",
    "rms_norm_backward_late_bfloat16": "ppppppnni",
    "silu_gate_{}": "pppni",
    "silu_gate_backward_{}": "pppppni",
    "gelu_gate_{}": "pppni",
    "gelu_gate_backward_{}": "pppppni",
    "attend_last_scratch": "nnn>n",
    "attend_last_{}": "pppppppppnnnnnnnnffi",
    "cross_entropy_{}": "ppppppnnnni",
    "flash_scratch": "nn>n",
    "flash_forward": "ppppppppnnnnnnnffi",
    "flash_backward": "ppppppppppppnnnnnnnffi",
    "gated_mlp_scratch": "nnn>n",
    "gated_mlp": "pppppppppnnnii",
    "quantize_4bit_{}": "pppppni",
    "quantize_rows_{}": "ppppnni",
    "dequantize_4bit_{}": "ppppni",
    "rotate_{}": "ppppnnnnnnnnfi",
    "thin_dots": "pppnnnfi",
    "thin_add": "pppppnnnfi",
    "thin_outer": "ppppnnnfi",
}
TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float, "i": ctypes.c_int}
NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}  # dtypes that `{}` stands for

ALONE = 1 << 15  # elements of work that one thread does sooner than it wakes the others


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they cannot be had. Built once per machine and cached.

    About a second the first time, then a file in the user's cache directory.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if os.environ.get(OFF) or sys.platform != "linux" or compiler is None:
        return None
    here = Path(__file__).parent
    texts = [(here / name).read_text(encoding="utf-8") for name in (*HEADERS, *SOURCES)]
    # -march=native makes the file this processor's own, and a home may be shared by several.
    identity = "\0".join([*texts, *FLAGS, str(EXACT), compiler, platform.machine(), _processor()])
    name = f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    path = _cache() / name
    try:
        if not path.exists():
            _build(compiler, [here / source for source in SOURCES], path)
        return _declared(ctypes.CDLL(str(path)))
    except (OSError, subprocess.SubprocessError):
        return None


def available(x: Tensor) -> bool:
    """Whether the compiled functions can take a tensor like x, here and now."""
    compiling = torch.compiler.is_compiling()  # then the torch path is traced and fused
    return x.device.type == "cpu" and x.dtype in NAMES and not compiling and library() is not None


def threads(work: int) -> int:
    """How many threads for so many elements: PyTorch's own number, or one if they are few."""
    return torch.get_num_threads() if work > ALONE else 1


def _declared(functions: ctypes.CDLL) -> ctypes.CDLL:
    for template, signature in SIGNATURES.items():
        letters, _, result = signature.partition(">")
        for name in {template.format(dtype) for dtype in NAMES.values()}:
            if not hasattr(functions, name):  # flash.c is for some processors only
                continue
            function = getattr(functions, name)
            function.argtypes = [TYPES[letter] for letter in letters]
            function.restype = TYPES.get(result)
    return functions


def _build(compiler: str, sources: list[Path], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        objects = [str(Path(place, f"{source.stem}.o")) for source in sources]
        for source, target in zip(sources, objects, strict=True):
            flags = (*FLAGS, *EXACT.get(source.name, ()))
            _run([compiler, *flags, "-c", str(source), "-o", target])
        built = Path(place, path.name)
        # Linked without -fopenmp: its symbols are found in the runtime that PyTorch has loaded.
        _run([compiler, "-shared", *objects, "-o", str(built)])
        os.replace(built, path)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ardor" / "kernels"


def _processor() -> str:
    """What tells processors apart: the model's name and its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
