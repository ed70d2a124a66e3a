"""Steps of an adapter are PEFT's: from the same start, over the same documents."""

from pathlib import Path

import pytest

from benchmarks import curves

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    made = tmp_path_factory.mktemp("curves")
    return made, curves.base(made, steps=2, rows=40)


@pytest.mark.slow
# Of transformers 5.24, about a name that PEFT 0.21 still asks for.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("method", curves.METHODS)
def test_losses_of_steps_are_those_of_peft(folder: tuple[Path, Path], method: str) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    options = {"folder": str(folder[0]), "method": method, "seed": 0}
    mine = curves.ours(*folder, options, steps=4)
    theirs = curves.peer(options)
    # float32 on both sides, sums in another order.
    assert mine["losses"] == pytest.approx(theirs["losses"], abs=1e-4)
    assert mine["before"] == pytest.approx(theirs["before"], abs=1e-4)
    assert mine["after"] == pytest.approx(theirs["after"], abs=1e-4)
    assert mine["after"] < mine["before"] - 1e-3  # the steps changed something
