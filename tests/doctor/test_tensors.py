"""One pass in pieces tells what the whole tensor would."""

import math
import subprocess
import sys

import pytest
import torch

from ardor.doctor import tensors
from ardor.files.weights import open_weights, write_weights


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_pieces_are_the_whole(tmp_path, monkeypatch, piece, dtype):
    monkeypatch.setattr(tensors, "PIECE", piece)
    t = torch.randn(2, 11, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    t[0, 4], t[1, 10] = 0.5, 0.0
    t[1, 0, 0], t[1, 1, 2], t[0, 0] = torch.nan, torch.inf, torch.inf
    write_weights(tmp_path, {"t": t, "codes": torch.ones(2, dtype=torch.uint8)})
    files = open_weights(tmp_path)
    found = tensors.measure(files, "t")
    assert found is not None and tensors.measure(files, "codes") is None
    finite = t[t.isfinite()].double().abs().sort().values
    assert (found.nan, found.infinite, found.dtype, found.shape) == (1, 4, dtype, (2, 11, 3))
    assert found.largest == float(finite[-1])
    assert found.rms == pytest.approx(float(finite[:-1].square().mean().sqrt()), rel=1e-5)
    assert (found.constant, found.constant_rows, found.rows) == ((0, 4, 21), 3, 22)
    assert not found.zero


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 1)])
def test_small_shapes(tmp_path, shape):
    write_weights(tmp_path, {"zero": torch.zeros(shape), "one": torch.ones(shape)})
    files = open_weights(tmp_path)
    zero, one = (tensors.measure(files, name) for name in ("zero", "one"))
    assert zero is not None and one is not None
    assert zero.zero and not one.zero
    assert one.largest == 1.0 and one.rms == pytest.approx(float(math.prod(shape) > 1))


def test_memory_is_bounded(tmp_path):
    """A tensor of 128 MiB is looked at in 64 MiB above what torch itself takes."""
    write_weights(tmp_path, {"t": torch.zeros(1 << 26, dtype=torch.bfloat16).view(-1, 4096)})
    script = (
        "import sys, torch\n"
        "from ardor.doctor.tensors import measure\n"
        "from ardor.files.weights import open_weights\n"
        "def anonymous():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(l.split()[1]) for l in lines if l.startswith('RssAnon'))\n"
        "torch.set_num_threads(1)\n"
        "before = anonymous()\n"
        "assert measure(open_weights(sys.argv[1]), 't').zero\n"
        "print(anonymous() - before)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64_000  # KiB
