"""kill -9 under every optimizer, adapter, objective and order of data: the run ends as if it never
was."""

import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from ardor.files.runs import BEST, checkpoints, newest_checkpoint
from ardor.files.weights import read_tensors

from ..tiny import sentences, write_rows
from .ends import again, assert_only_whole_checkpoints, assert_same_end
from .forked import Ended, Worker

pytestmark = pytest.mark.sweep

# A step, a held-out loss and a checkpoint each time, so that most moments are within a write.
EVERY = "--max-steps 4 --eval-steps 1 --save-steps 1 --eval-fraction 0.2 --save-total-limit 2 "
EVERY += "--per-device-train-batch-size 3 --dtype float32 --learning-rate 0.01"
LORA = "--lora-r 2 --lora-dropout 0.3 --neftune-noise-alpha 5"
BEST_KEPT = "--load-best-model-at-end --early-stopping-patience 3"
# Matrices of the base have 4096 numbers or more, so that 8 bits are 8 bits.
SIZES = "--vocab-size 280 --hidden-size 32 --intermediate-size 144 --num-hidden-layers 1 "
SIZES += "--num-attention-heads 2 --max-length 48 --dtype float32"

SETTINGS = {
    "adamw": ("texts", "full", "--optim adamw --lr-scheduler-type wsd"),
    "adamw in 8 bits": ("pairs", "full", "--optim adamw_8bit"),
    "adamw in bfloat16": ("pairs", "full", "--optim adamw --master-dtype bfloat16"),
    "adamw elsewhere": ("pairs", "full", f"--optim adamw --offload-optimizer {BEST_KEPT}"),
    "lion": ("pairs", "full", "--optim lion --gradient-accumulation-steps 2"),
    "lion in 8 bits": ("pairs", "full", "--optim lion_8bit --master-dtype bfloat16"),
    "adafactor": (
        "pairs",
        "full",
        "--optim adafactor --optimizer-in-backward --max-grad-norm 0",
    ),
    "muon": ("pairs", "full", "--optim muon --master-dtype bfloat16"),
    "sgd": ("pairs", "full", "--optim sgd --sgd-momentum 0.9 --gradient-checkpointing layers"),
    "schedule-free": (
        "pairs",
        "full",
        "--optim schedule_free_adamw --lr-scheduler-type constant " + BEST_KEPT,
    ),
    "lora": ("pairs", "lora", f"{LORA} {BEST_KEPT} --tokens-per-batch 60"),
    "qlora": ("pairs", "qlora", f"{LORA} --loraplus-lr-ratio 4 --optim adamw_8bit"),
    "dora": ("pairs", "lora", f"{LORA} --use-dora --modules-to-save embed_tokens"),
    "pissa": ("pairs", "lora", f"{LORA} --init-lora-weights pissa"),
    "dpo, reference computed before": (
        "judged",
        "lora",
        f"{LORA} --objective dpo --precompute-ref-log-probs",
    ),
    "dpo, reference asked in each step": (
        "judged",
        "qlora",
        f"{LORA} --objective dpo --no-precompute-ref-log-probs {BEST_KEPT}",
    ),
    "kto": ("judged", "full", "--objective kto"),
    "orpo": ("judged", "lora", f"{LORA} --objective orpo"),
    "packed mixture": (
        "mixture",
        "lora",
        f"{LORA} --tokens-per-batch 60 --gradient-accumulation-steps 2",
    ),
    "similar lengths": ("pairs", "lora", f"{LORA} --train-sampling-strategy group_by_length"),
    "samples drawn": ("pairs", "lora", f"{LORA} --sample-prompts the --sample-tokens 3"),
}


class Files(NamedTuple):
    base: Path
    data: dict[str, list[str]]


@pytest.fixture(scope="module")
def files(worker, texts, pairs, tmp_path_factory) -> Files:
    folder = tmp_path_factory.mktemp("files")
    ended = worker.run(
        ["train", str(texts), "-o", str(folder / "base"), *f"{SIZES} --max-steps 1".split()]
    )
    assert ended.code == 0, ended.said
    columns = zip(sentences(12, 3), sentences(12, 4), sentences(12, 5), strict=True)
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in columns]
    judged = write_rows(folder / "judged.jsonl", rows)
    data = {"texts": [texts], "pairs": [pairs], "judged": [judged]}
    data["mixture"] = [f"{pairs},weight=3", f"{texts},weight=1"]
    return Files(folder / "base", {name: [*map(str, found)] for name, found in data.items()})


@pytest.fixture(scope="module")
def whole(
    worker, files, tmp_path_factory
) -> Callable[[str], tuple[Callable[[Path], list[str]], Path, Ended]]:
    """(the command, its folder, how it ended) of settings whose run nobody killed; once each."""
    made: dict[str, tuple[Callable[[Path], list[str]], Path, Ended]] = {}

    def run(name: str) -> tuple[Callable[[Path], list[str]], Path, Ended]:
        if name in made:
            return made[name]
        data, method, more = SETTINGS.get(name, ("texts", "full", ""))

        def args(run: Path) -> list[str]:
            if name == "from scratch":
                asked = f"{SIZES} --max-steps 3 --eval-fraction 0.2 --save-steps 1".split()
                return ["train", *files.data[data], "-o", str(run), *asked]
            asked = f"{EVERY} {more} --method {method}".split()
            return ["finetune", str(files.base), *files.data[data], "-o", str(run), *asked]

        folder = tmp_path_factory.mktemp("whole") / "run"
        ended = worker.run(args(folder))
        assert ended.code == 0, ended.said
        # The next run of the same data finds the tokens that this one has kept elsewhere. (What is
        # removed with its folder has a name only.)
        own = [one for one in ended.changes if not one.startswith("/") or str(folder) in one]
        made[name] = args, folder, ended._replace(changes=tuple(own))
        return made[name]

    return run


def killed_twice(
    worker: Worker, args: list[str], run: Path, changes: int, chosen: random.Random
) -> None:
    """Kill a run at a change of a file, and then the one that goes on with it; let the third be."""
    for _ in range(2):
        ended = worker.run(again(run, args), at=chosen.randint(1, changes))
        assert ended.code in (0, -signal.SIGKILL), ended.said  # 0: little was left to do
        assert_only_whole_checkpoints(run)
    ended = worker.run(again(run, args))
    assert ended.code == 0, ended.said


@pytest.mark.parametrize("name", SETTINGS)
def test_a_killed_run_ends_as_if_it_never_was_whatever_its_settings(worker, whole, tmp_path, name):
    args, folder, ended = whole(name)
    run, chosen = tmp_path / "run", random.Random(name)
    killed_twice(worker, args(run), run, len(ended.changes), chosen)
    assert_same_end(run, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_runs_of_all_settings_killed_at_many_moments(worker, whole, tmp_path, name):
    args, folder, ended = whole(name)
    for seed in range(10):
        run = tmp_path / str(seed)
        killed_twice(worker, args(run), run, len(ended.changes), random.Random(f"{name} {seed}"))
        assert_same_end(run, folder)


def test_what_was_killed_was_what_its_name_says(whole):
    for name in ("adamw in 8 bits", "lion in 8 bits"):
        state = read_tensors(checkpoints(whole(name)[1])[-1] / "trainer.safetensors")
        assert any(str(tensor.dtype) == "torch.uint8" for tensor in state.values())
    folder = whole("adamw elsewhere")[1]
    assert (folder / BEST).exists()
    assert (whole("dpo, reference computed before")[1] / "reference.safetensors").exists()
    assert not (whole("dpo, reference asked in each step")[1] / "reference.safetensors").exists()


# --- within the write of a checkpoint, and of what a run begins with ---

# Those whose checkpoints are made of other files, or by other code. Lion, Adafactor and SGD keep
# tensors by name as AdamW does; the order of data, and how a batch is filled, are numbers in
# trainer.json; PiSSA, ORPO and samples write no file that LoRA and DPO do not.
WRITTEN = {
    "adamw in 8 bits": "full disk",  # codes, written by the library
    "adamw in bfloat16": "Ctrl-C twice",  # with a generator's state
    "adamw elsewhere": "full disk",  # and the best checkpoint, which stays
    "muon": "SIGTERM",  # two optimizers
    "schedule-free": "Ctrl-C twice",  # other weights while they are written
    "lora": "SIGTERM",  # an adapter, and the best checkpoint
    "qlora": "full disk",
    "dora": "Ctrl-C twice",  # magnitudes, and a whole module
    "dpo, reference computed before": "full disk",
    "dpo, reference asked in each step": "SIGTERM",
    "kto": "Ctrl-C twice",
    "packed mixture": "full disk",  # the place in several parts
}
CODES = {"kill": (-signal.SIGKILL,), "full disk": (2,), "Ctrl-C twice": (130,), "SIGTERM": (130,)}


def disturbed(worker: Worker, args: list[str], run: Path, at: int, event: str) -> Ended:
    """A run to which `event` happens at a change of a file; what it left is whole, and told."""
    ended = worker.run(args, at=at, event=event)
    assert ended.code in CODES[event], ended.said
    assert "Traceback" not in ended.said
    if event == "full disk":
        assert "error: no space left on the device of" in ended.said
    assert_only_whole_checkpoints(run)
    if event != "kill":  # who can tidies up
        assert not [path.name for path in run.iterdir() if path.name.startswith(".")]
    return ended


def moments_of(changes: Sequence[str]) -> tuple[list[int], list[int]]:
    """The places, from 1, of the changes by which checkpoint-2 comes to be, and of those by which
    what was written beside it goes, and later itself: with the same name."""
    # What it takes the place of is put aside, and then it is renamed, which is the end of it.
    whole = next(i for i, path in enumerate(changes, 1) if ".checkpoint-2.replaced" in path) + 1
    assert ".checkpoint-2.partial" in changes[whole - 1]
    places = [i for i, path in enumerate(changes, 1) if ".checkpoint-2.partial" in path]
    return [i for i in places if i <= whole], [i for i in places if i > whole]


def within_a_write(worker: Worker, whole, name: str, folder: Path, events: list[str], of: int):
    """Let events happen at moments of the write of checkpoint-2 and go on, each in a new run."""
    args, reference, ended = whole(name)
    moments, _ = moments_of(ended.changes)
    assert len(moments) > 8
    for event in events:
        for at in random.Random(f"{name} {event}").sample(moments, min(of, len(moments))):
            run = folder / f"{event} at {at}"
            disturbed(worker, args(run), run, at, event)
            steps = [path.name for path in checkpoints(run)]
            # Whoever is asked to stop finishes the step, which another checkpoint then holds; and
            # what is left at the last moment is to rename it, which takes no room.
            whole_too = event == "SIGTERM" or (event == "full disk" and at == moments[-1])
            assert steps == ["checkpoint-1"] + ["checkpoint-2"] * whole_too, (event, at, moments)
            ended = worker.run(again(run, args(run)))
            assert ended.code == 0, ended.said
            assert_same_end(run, reference)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_happens_within_the_write_of_a_checkpoint_loses_nothing(worker, whole, tmp_path, name):
    within_a_write(worker, whole, name, tmp_path, ["kill", WRITTEN[name]], of=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_whatever_happens_within_the_write_of_a_checkpoint(worker, whole, tmp_path, name):
    within_a_write(worker, whole, name, tmp_path, [*CODES], of=4)


@pytest.mark.parametrize("event", CODES)
@pytest.mark.parametrize("name", ["lora", pytest.param("muon", marks=pytest.mark.slow)])
def test_what_happens_while_an_old_checkpoint_goes_loses_nothing(
    worker, whole, tmp_path, name, event
):
    args, reference, ended = whole(name)
    _, moments = moments_of(ended.changes)
    for at in moments:
        run = tmp_path / str(at)
        ended = worker.run(args(run), at=at, event=event)
        newest = newest_checkpoint(run)
        assert newest is not None
        # The last step is done, and written: whoever asks it to stop, or takes its room, is late.
        late = newest.name == "checkpoint-4" and event in ("SIGTERM", "full disk")
        assert ended.code in (*CODES[event], *(0,) * late), ended.said
        assert_only_whole_checkpoints(run)
        ended = worker.run(again(run, args(run)))
        assert ended.code == 0, ended.said
        assert_same_end(run, reference)


BEGUN = ("lora", "dpo, reference computed before", "kto", "from scratch")


def begun_on_a_full_disk(
    worker: Worker, whole, name: str, folder: Path, moments: int | None
) -> None:
    """A disk that is full at moments before the first step: the same command begins the run."""
    args, reference, ended = whole(name)
    first = next(i for i, path in enumerate(ended.changes, 1) if "checkpoint-1" in path)
    chosen = range(1, first)
    if moments is not None:
        chosen = random.Random(name).sample(chosen, moments)
    for at in chosen:
        run = folder / str(at)
        ended = worker.run(args(run), at=at, event="full disk")
        assert ended.code == 2 and "Traceback" not in ended.said, ended.said
        assert "error: no space left on the device of" in ended.said
        begun = (run / "config.yaml").exists()
        assert ("then go on from the newest checkpoint with" in ended.said) <= begun
        ended = worker.run(again(run, args(run)))
        assert ended.code == 0, ended.said
        assert_same_end(run, reference)


@pytest.mark.parametrize("name", BEGUN)
def test_a_run_that_found_a_full_disk_begins_with_the_same_command(worker, whole, tmp_path, name):
    begun_on_a_full_disk(worker, whole, name, tmp_path, moments=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", BEGUN)
def test_a_disk_is_full_at_any_moment_of_a_beginning(worker, whole, tmp_path, name):
    begun_on_a_full_disk(worker, whole, name, tmp_path, moments=None)
