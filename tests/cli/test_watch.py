"""Ctrl-C while a run is watched."""

import signal
from types import SimpleNamespace

import pytest

from ardor.cli.watch import watch


def watched(folder, signals: int, *, saved: bool):
    """A run of 9 steps that gets Ctrl-C so many times in its second."""
    progress = SimpleNamespace(step=0)
    trainer = SimpleNamespace(
        stop_requested=False,
        stopped_early=False,
        finished=False,
        steps=9,
        progress=progress,
        ranks=SimpleNamespace(first=True),
    )
    if saved:
        (folder / "checkpoint-1").mkdir()

    def events():
        while not trainer.stop_requested:
            progress.step += 1
            if progress.step == 2:
                for _ in range(signals):
                    signal.raise_signal(signal.SIGINT)
            yield {"step": progress.step, "kind": "checkpoint", "path": ""}

    return SimpleNamespace(folder=folder, trainer=trainer, notes=(), resumed=False, events=events)


def told(run) -> str:
    with pytest.raises(KeyboardInterrupt) as stopped:
        watch(run, "lora", verb="finetune")
    return "\n".join(stopped.value.args)


def test_ctrl_c_ends_after_the_step_and_says_how_to_go_on(tmp_path, capsys):
    said = told(watched(tmp_path, 1, saved=True))
    assert said.startswith("stopped at step 2 of 9; go on from there with\n")
    assert said.endswith(f"finetune --config {tmp_path}/config.yaml --resume")
    assert "stopping after this step (Ctrl-C again: at once)" in capsys.readouterr().err


@pytest.mark.parametrize("saved", [True, False])
def test_ctrl_c_twice_ends_at_once_and_claims_no_checkpoint_that_is_not_there(tmp_path, saved):
    said = told(watched(tmp_path, 2, saved=saved))
    assert said.startswith("stopped at once")
    assert (f"go on from {tmp_path}/checkpoint-1 with" in said) == saved
    assert ("before a checkpoint was written" in said) != saved
    assert said.endswith("--resume")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # as it was
