"""Rules about what the model does, where a probe has run it."""

import torch

from ardor.doctor.checkpoint import Checkpoint, Findings, Registry
from ardor.doctor.finding import Finding, listed

BEYOND = 0.01  # share of probability on ids without a token
ALMOST = 60_000.0  # of float16's 65,504


def runs(it: Checkpoint) -> Findings:
    """The model runs."""
    if it.probe and it.probe.failed:
        yield Finding("E", "the model cannot be run", it.probe.failed, "see the other findings")


def finite_outputs(it: Checkpoint) -> Findings:
    """Every logit is a finite number, also beside padding."""
    if it.probe and not it.probe.finite:
        what = "some of its logits are NaN or infinite"
        evidence = f"computed in {it.probe.compute}, largest activation {it.probe.largest:.3g}"
        yield Finding("E", what, evidence, "load it in float32 (--dtype), or mend its weights")


def documents_apart(it: Checkpoint) -> Findings:
    """A document behind another one in a row gives the logits that it gives alone."""
    if it.probe and it.probe.packed > it.probe.tolerance:
        what = "documents that are packed in one row see each other"
        evidence = f"logits differ by {it.probe.packed:.2g} of the largest"
        yield Finding(
            "E", what, evidence, "do not pack for this model; load it with eager attention"
        )


def batch_apart(it: Checkpoint) -> Findings:
    """A prompt is answered beside a longer one as it is alone."""
    if it.probe and it.probe.batched > 10 * it.probe.tolerance:
        what = "an answer depends on what else is in the batch"
        evidence = f"log-probabilities differ by {it.probe.batched:.2g} nats"
        yield Finding("E", what, evidence, "answer one prompt at a time")


def left_padding(it: Checkpoint) -> Findings:
    """Padding on the left changes nothing, also where no position_ids are given.

    Of models that transformers runs. A warning: Ardor pads nothing, other programs do.
    """
    probe = it.probe
    if probe and probe.left_padded is not None and probe.left_padded > probe.tolerance:
        what = (
            "padded on the left, with a mask but without position_ids, it computes something else"
        )
        evidence = f"logits differ by {probe.left_padded:.2g} of the largest"
        yield Finding("W", what, evidence, "elsewhere pass position_ids = mask.cumsum(-1) - 1")


def activation_range(it: Checkpoint) -> Findings:
    """No activation is beyond the range of float16."""
    probe = it.probe
    if probe and probe.largest > ALMOST and probe.compute != torch.float16:
        what = "activations are too large for float16"
        evidence = f"the largest is {probe.largest:.3g}, and float16 ends at 65504"
        yield Finding("W", what, evidence, "run it in bfloat16 or float32 only")


def writes_past_end(it: Checkpoint) -> Findings:
    """The model does not go on after a control token, which may be an end that no file names.

    A warning of a model that chats; without a template it has not learnt what they are for.
    """
    passed = (
        [f"{a.passed} after {a.prompt!r}" for a in it.probe.answers if a.passed]
        if (it.probe)
        else []
    )
    if passed:
        what = "the model writes control tokens and goes on"
        fix = "if one of them ends a turn, list it in eos_token_id of generation_config.json"
        yield Finding("I" if it.template is None else "W", what, listed(passed), fix)


def beyond_vocabulary(it: Checkpoint) -> Findings:
    """Ids that the tokenizer lacks are improbable.

    For information: they are never chosen here; elsewhere they can be.
    """
    if it.probe and it.probe.beyond > BEYOND:
        what = f"{it.probe.beyond:.1%} of probability is on ids that no token has"
        evidence = "rows of the embedding beyond the tokenizer's ids"
        yield Finding("I", what, evidence, "elsewhere mask these ids; never shrink the embedding")


RULES: Registry = {
    "runs": runs,
    "finite-outputs": finite_outputs,
    "documents-apart": documents_apart,
    "batch-apart": batch_apart,
    "left-padding": left_padding,
    "activation-range": activation_range,
    "writes-past-end": writes_past_end,
    "beyond-vocabulary": beyond_vocabulary,
}
