"""Ctrl-C while a run is watched."""

import signal
from types import SimpleNamespace

import pytest

from ardor.cli.watch import watch
from ardor.train.run import Run


class Watched(Run):
    """A run of 9 steps that gets Ctrl-C so many times in its second."""

    def __init__(self, folder, signals: int, *, saved: bool):
        self.folder, self.notes, self.resumed, self._signals = folder, (), False, signals
        self.trainer = SimpleNamespace(
            stop_requested=False,
            stopped_early=False,
            finished=False,
            steps=9,
            progress=SimpleNamespace(step=0),
            ranks=SimpleNamespace(first=True, count=1),
        )
        if saved:
            (folder / "checkpoint-1").mkdir()

    def events(self):
        for step in range(1, 10):
            if self.trainer.stop_requested:
                return
            self.trainer.progress.step = step
            for _ in range(self._signals if step == 2 else 0):
                signal.raise_signal(signal.SIGINT)
            yield {"step": step, "kind": "checkpoint", "path": ""}


def told(run) -> str:
    with pytest.raises(KeyboardInterrupt) as stopped:
        watch(run, "lora", verb="finetune")
    return "\n".join(stopped.value.args)


def test_ctrl_c_ends_after_the_step_and_says_how_to_go_on(tmp_path, capsys):
    said = told(Watched(tmp_path, 1, saved=True))
    assert said.startswith("stopped at step 2 of 9; go on from there with\n")
    assert said.endswith(f"finetune --config {tmp_path}/config.yaml --resume")
    assert "stopping after this step (Ctrl-C again: at once)" in capsys.readouterr().err


@pytest.mark.parametrize("saved", [True, False])
def test_ctrl_c_twice_ends_at_once_and_claims_no_checkpoint_that_is_not_there(tmp_path, saved):
    before = signal.getsignal(signal.SIGINT)
    said = told(Watched(tmp_path, 2, saved=saved))
    assert said.startswith("stopped at once")
    assert (f"go on from {tmp_path}/checkpoint-1 with" in said) == saved
    assert ("before a checkpoint was written" in said) != saved
    assert said.endswith("--resume")
    assert signal.getsignal(signal.SIGINT) is before
