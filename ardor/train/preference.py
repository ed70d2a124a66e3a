"""What preference tuning minimises: losses of pairs of answers, and of answers with a label.

Axes: P pairs, or labelled answers. Sums are over the tokens of an answer, its stop token included.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from ardor.arch.causal import CausalLM
from ardor.arch.experts import Routing
from ardor.data.batches import Batch
from ardor.data.preferences import Judged, Kind
from ardor.loss import LossSum
from ardor.score import document_logprobs
from ardor.train.config import Finetune
from ardor.train.tally import Tally

Nats = Float[Tensor, "P"]


class Pairs(NamedTuple):
    """Log-probabilities of the answers of pairs; those of the reference are 0 where none is."""

    chosen: Nats
    rejected: Nats
    chosen_reference: Nats
    rejected_reference: Nats
    chosen_tokens: Int[Tensor, "P"]
    rejected_tokens: Int[Tensor, "P"]

    @property
    def won(self) -> Nats:
        """How much more probable the chosen answer is than under the reference."""
        return self.chosen - self.chosen_reference

    @property
    def lost(self) -> Nats:
        return self.rejected - self.rejected_reference

    @property
    def chosen_mean(self) -> Nats:
        return self.chosen / self.chosen_tokens

    @property
    def rejected_mean(self) -> Nats:
        return self.rejected / self.rejected_tokens


class Strength(NamedTuple):
    beta: float
    smoothing: float = 0.0  # how many labels are expected to be wrong
    gamma: float = 0.0  # SimPO's target margin of rewards


def dpo(p: Pairs, s: Strength) -> Nats:
    """Rafailov et al. 2023, arXiv:2305.18290, equation 7; hinge, IPO and cDPO differ below."""
    return -logsigmoid(s.beta * (p.won - p.lost))


def cdpo(p: Pairs, s: Strength) -> Nats:
    """Mitchell 2023, "A note on DPO with noisy preferences", equation 3."""
    return (1 - s.smoothing) * dpo(p, s) - s.smoothing * logsigmoid(s.beta * (p.lost - p.won))


def ipo(p: Pairs, s: Strength) -> Nats:
    """Azar et al. 2023, arXiv:2310.12036, equation 17, of means over tokens (TRL: as its authors
    did)."""
    return (p.won / p.chosen_tokens - p.lost / p.rejected_tokens - 1 / (2 * s.beta)) ** 2


def hinge(p: Pairs, s: Strength) -> Nats:
    """Zhao et al. 2023, arXiv:2305.10425, equation 2, with DPO's rewards."""
    return F.relu(1 - s.beta * (p.won - p.lost))


def simpo(p: Pairs, s: Strength) -> Nats:
    """Meng et al. 2024, arXiv:2405.14734, equation 6."""
    return -logsigmoid(s.beta * (p.chosen_mean - p.rejected_mean) - s.gamma)


def orpo(p: Pairs, s: Strength) -> Nats:
    """Hong et al. 2024, arXiv:2403.07691, equations 4, 6 and 7; beta is their lambda."""
    return -p.chosen_mean - s.beta * logsigmoid(
        _log_odds(p.chosen_mean) - _log_odds(p.rejected_mean)
    )


def kto(gain: Nats, liked: Bool[Tensor, "P"], moved: Tensor, s: Strength) -> Nats:
    """Ethayarajh et al. 2024, arXiv:2402.01306, equation 8, without weights; `moved` is z0."""
    return 1 - torch.sigmoid(s.beta * torch.where(liked, gain - moved, moved - gain))


def _log_odds(mean: Nats) -> Nats:
    # expm1 keeps what is left of 1 - p; an answer that is certain has odds that are still finite.
    return mean - torch.log(-torch.expm1(mean).clamp(max=-1e-12))


PAIR_LOSSES: dict[str, Callable[[Pairs, Strength], Nats]] = {
    "dpo": cdpo,  # the same where no label is expected to be wrong
    "cdpo": cdpo,
    "ipo": ipo,
    "hinge": hinge,
    "simpo": simpo,
    "orpo": orpo,
}
WITHOUT_REFERENCE = ("simpo", "orpo")
BETAS = {"dpo": 0.1, "cdpo": 0.1, "ipo": 0.1, "hinge": 0.1, "simpo": 2.0, "orpo": 0.1, "kto": 0.1}


def kind_of(objective: str) -> Kind:
    return "labels" if objective == "kto" else "pairs"


Reference = Callable[[CausalLM, Batch], Tensor]
"""Log-probabilities of a batch's documents under the model as it was before the run."""

LOGGED = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "kl",
)


class PairObjective:
    """Losses of (chosen, rejected) pairs; a step divides them by how many pairs it has."""

    in_nats = False

    def __init__(self, config: Finetune, reference: Reference | None):
        self.loss_of, self.reference = PAIR_LOSSES[config.objective], reference
        self.strength, self.mean = strength(config), reference is None
        self.tally = Tally(LOGGED)

    def begin(self, decoder: CausalLM, batches: list[Batch]) -> int:
        self.tally = Tally(LOGGED)
        return sum(len(batch.lengths) // 2 for batch in batches)

    def loss(self, decoder: CausalLM, batch: Batch, routings: list[Routing] | None) -> LossSum:
        found_reference = None if self.reference is None else self.reference(decoder, batch)
        found = document_logprobs(decoder, batch, routings, accumulate=True)
        reference = torch.zeros_like(found.sums) if found_reference is None else found_reference
        sums, known, tokens = found.sums, reference, found.targets
        pairs = Pairs(sums[::2], sums[1::2], known[::2], known[1::2], tokens[::2], tokens[1::2])
        losses = self.loss_of(pairs, self.strength)
        won, lost = (
            (pairs.chosen_mean, pairs.rejected_mean) if self.mean else (pairs.won, pairs.lost)
        )
        won, lost = self.strength.beta * won, self.strength.beta * lost
        self.tally.add(
            {
                "rewards/chosen": won,
                "rewards/rejected": lost,
                "rewards/margins": won - lost,
                "rewards/accuracies": (won > lost).float(),
                "logps/chosen": pairs.chosen,
                "logps/rejected": pairs.rejected,
            }
        )
        return LossSum(losses.sum(), torch.tensor(len(losses), device=losses.device))


class LabelObjective:
    """KTO. How far the model has moved is measured over all answers of a step, before it."""

    in_nats = False

    def __init__(self, config: Finetune, data: Judged, reference: Reference):
        self.data, self.reference, self.strength = data, reference, strength(config)
        self.weights = config.undesirable_weight or 1.0, config.desirable_weight or 1.0
        self.tally, self.moved = Tally(LOGGED), torch.zeros(())
        self._known: dict[tuple[int, ...], Tensor] = {}  # of the step, by a batch's examples

    def begin(self, decoder: CausalLM, batches: list[Batch]) -> int:
        self.tally = Tally(LOGGED)
        self._known = {batch.examples: self.reference(decoder, batch) for batch in batches}
        gains = [self._elsewhere(decoder, batch) for batch in batches]
        self.moved = torch.cat(gains).mean().clamp(min=0)
        return sum(len(batch.lengths) // 2 for batch in batches)

    def _elsewhere(self, decoder: CausalLM, batch: Batch) -> Nats:
        """The gains of the answers to other prompts."""
        training = decoder.training
        decoder.eval()
        with torch.no_grad():
            found = document_logprobs(decoder, half(batch, 1)).sums
        decoder.train(training)
        return found - self._known[batch.examples][1::2]

    def loss(self, decoder: CausalLM, batch: Batch, routings: list[Routing] | None) -> LossSum:
        known = self._known[batch.examples][::2]
        found = document_logprobs(decoder, half(batch, 0), routings, accumulate=True).sums
        flags = [self.data.likes(index) for index in batch.examples[::2]]
        liked = torch.tensor(flags, device=found.device)
        gain, beta = found - known, self.strength.beta
        bad, good = self.weights
        losses = torch.where(liked, good, bad) * kto(gain, liked, self.moved, self.strength)
        self.tally.add(
            {
                "rewards/chosen": beta * gain[liked],
                "rewards/rejected": beta * gain[~liked],
                "rewards/accuracies": ((gain > self.moved) == liked).float(),
                "logps/chosen": found[liked],
                "logps/rejected": found[~liked],
                "kl": self.moved[None],
            }
        )
        return LossSum(losses.sum(), torch.tensor(len(losses), device=losses.device))


def strength(config: Finetune) -> Strength:
    smoothing, gamma = config.label_smoothing, config.simpo_gamma
    if smoothing is None:
        smoothing = 0.1 if config.objective == "cdpo" else 0.0
    beta = config.beta or BETAS[config.objective]
    return Strength(beta, smoothing, 1.0 if gamma is None else gamma)


def half(batch: Batch, which: int) -> Batch:
    """Every example's first (0) or second (1) document."""
    lengths = list(batch.lengths)
    tokens, targets = batch.tokens[0].split(lengths), batch.targets[0].split(lengths)
    return Batch(
        torch.cat(tokens[which::2])[None],
        torch.cat(targets[which::2])[None],
        batch.lengths[which::2],
        batch.examples[which::2],
    )
