"""Rules about the folder of a run: what training did, and whether it is the run of this model."""

import math
from pathlib import Path
from statistics import median

from ardor.adapters.peft_layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ardor.doctor.checkpoint import TOKENIZER, Checkpoint, Findings, Registry
from ardor.doctor.finding import Finding, listed, many
from ardor.errors import ArdorError
from ardor.files.runs import chosen_checkpoint
from ardor.files.weights import WeightFiles, open_file, open_weights
from ardor.load import CONFIG
from ardor.text.chat import ChatTemplate
from ardor.text.tokenizer import Tokenizer

SPIKE = 2.0  # times the median of the steps before, and a nat above it
BEFORE = 16  # steps that a spike is held against
WORSE = 1.1  # times the best held-out loss
MOST_ANSWERS = 0.9  # that should end by themselves


def run_files(it: Checkpoint) -> Findings:
    """The run's config.yaml and metrics.jsonl can be read, and there is a checkpoint."""
    if it.run and it.run.problems:
        fix = "give the folder of a run; a damaged line is of a process that was killed"
        yield Finding("E", "the run cannot be read", listed(it.run.problems, 3), fix)
    elif it.run and not it.run.checkpoints:
        fix = "go on with --resume: there is nothing to load yet"
        yield Finding("W", "the run has no checkpoint", str(it.run.path), fix)


def run_finite(it: Checkpoint) -> Findings:
    """Every loss and gradient of the run is a finite number."""
    if it.run is None:
        return
    wrong = [
        f"{key} at step {step}"
        for kind, key in (("train", "loss"), ("train", "grad_norm"), ("eval", "loss"))
        for step, value in it.run.series(kind, key)
        if not math.isfinite(value)
    ]
    if wrong:
        what = f"{many(len(wrong), 'value')} of the run that are NaN or infinite"
        fix = "begin again with a lower learning_rate, or with dtype float32"
        yield Finding("E", what, listed(wrong), fix)


def run_spikes(it: Checkpoint) -> Findings:
    """The training loss does not jump."""
    if it.run is None:
        return
    losses = [(s, v) for s, v in it.run.series("train", "loss") if math.isfinite(v)]
    spikes = []
    for i in range(BEFORE, len(losses)):
        usual = median(value for _, value in losses[i - BEFORE : i])
        step, value = losses[i]
        if value > max(SPIKE * usual, usual + 1.0):
            spikes.append(f"step {step}: {value:.3g} after {usual:.3g}")
    if spikes:
        fix = "look at the rows of these steps, lower learning_rate, or clip more (max_grad_norm)"
        yield Finding("W", f"{many(len(spikes), 'jump')} of the loss", listed(spikes, 3), fix)


def run_heldout(it: Checkpoint) -> Findings:
    """The held-out loss ends near its best, and answers end by themselves."""
    if it.run is None:
        return
    losses = [(s, v) for s, v in it.run.series("eval", "loss") if math.isfinite(v)]
    if losses:
        step, best = min(losses, key=lambda pair: pair[1])
        if losses[-1][1] > WORSE * best:
            what = "the held-out loss rose again: the model learnt its training data by heart"
            evidence = f"{best:.4g} at step {step}, {losses[-1][1]:.4g} at step {losses[-1][0]}"
            yield Finding("W", what, evidence, "train for fewer steps, or at a lower rate")
    rates = it.run.series("eval", "stop_rate")
    if rates and rates[-1][1] < MOST_ANSWERS:
        what = f"{1 - rates[-1][1]:.0%} of the answers to held-out prompts do not end"
        fix = "train longer, and look for answers without an end in the data (--data)"
        yield Finding("W", what, f"stop_rate {rates[-1][1]:.3g} at step {rates[-1][0]}", fix)


def run_moved(it: Checkpoint) -> Findings:
    """What the run trained has moved, and its gradients are not zero.

    Of adapters B begins at zero, and of a full fine-tune every matrix at the base's.
    """
    run = it.run
    if run is None:
        return
    norms = run.series("train", "grad_norm")
    if norms and all(value == 0 for _, value in norms):
        what, fix = "every gradient of the run is zero", "nothing was learnt: check what is trained"
        yield Finding("E", what, f"grad_norm 0 at all {len(norms)} logged steps", fix)
    if not run.checkpoints:
        return
    newest = run.checkpoints[-1]
    try:
        still = _unmoved(newest, run.settings.get("model"))
    except ArdorError as error:
        yield Finding("E", "the newest checkpoint cannot be read", str(error), "resume the run")
        return
    if still:
        what = f"{many(len(still), 'matrix', 'matrices')} that training has not moved"
        fix = "check the learning rate and what is trained; below a step of its dtype nothing moves"
        yield Finding("W", what, f"{listed(still, 3)} in {newest.name}", fix)


def run_model(it: Checkpoint) -> Findings:
    """The run's tokenizer and chat template are those of the model it is looked at beside."""
    if it.run is None or not it.run.checkpoints or it.tokenizer is None:
        return
    newest = it.run.checkpoints[-1]
    if newest == it.path or not (newest / TOKENIZER).exists():
        return
    try:
        tokenizer = Tokenizer.from_directory(newest)
        template = ChatTemplate.from_directory(newest)
    except ArdorError as error:
        yield Finding("E", "the run's tokenizer cannot be read", str(error), "resume the run")
        return
    text = "Hello, world! 123\n" + "".join(it.tokenizer.added)
    ids = [one.encode_template(text) for one in (it.tokenizer, tokenizer)]
    if ids[0] != ids[1]:
        what = "the run's tokenizer is not the model's: the same text is other ids"
        at = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), 0)
        fix = "use the tokenizer in the run's checkpoint with what it trained"
        yield Finding("E", what, f"{ids[0][at : at + 4]} and {ids[1][at : at + 4]}", fix)
    ours, theirs = it.template, template
    if theirs is not None and (ours is None or ours.fingerprint != theirs.fingerprint):
        had = "no template" if ours is None else f"{ours.name}, {ours.fingerprint[:12]}"
        what = "the run was trained on another chat template than the model's own"
        fix = "prompt what it trained with the template in its checkpoint"
        level = "I" if ours is None else "W"
        yield Finding(level, what, f"model: {had}; run: {theirs.fingerprint[:12]}", fix)


def run_exceptions(it: Checkpoint) -> Findings:
    """No rule of doctor was set aside for the run."""
    if it.run and (allowed := it.run.settings.get("allow")):
        what = "rules of doctor were set aside for this run"
        yield Finding("I", what, listed([*allowed]), "none, if that was meant")


def _unmoved(newest: Path, model: object) -> list[str]:
    """Matrices that are as training found them."""
    if (newest / ADAPTER_CONFIG).exists():
        files = open_file(newest / ADAPTER_WEIGHTS)
        return [
            n for n in files.names() if n.endswith(".lora_B.weight") and not files.read(n).any()
        ]
    base = Path(model) if isinstance(model, str) else None
    if base is None or not base.is_dir():
        return []
    home = base if (base / CONFIG).exists() else chosen_checkpoint(base)
    if home is None or not (home / CONFIG).exists():
        return []
    return [*_same(open_weights(newest), open_weights(home))]


def _same(new: WeightFiles, old: WeightFiles) -> list[str]:
    names = [n for n in new.names() if n in old.names() and len(new.shape(n)) > 1]
    return [
        n
        for n in names
        if new.shape(n) == old.shape(n) and bool((new.read(n) == old.read(n)).all())
    ]


RULES: Registry = {
    "run-files": run_files,
    "run-finite": run_finite,
    "run-spikes": run_spikes,
    "run-heldout": run_heldout,
    "run-moved": run_moved,
    "run-model": run_model,
    "run-exceptions": run_exceptions,
}
