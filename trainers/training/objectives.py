"""The objectives: the loss of a batch from its hidden states.

- Supervised fine-tuning: cross-entropy, averaged over trained tokens.
- Direct preference optimisation (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290): -log sigmoid(beta * margin),
  averaged over pairs. The margin is the log-probability that the chosen answer has gained over the reference model,
  minus that which the rejected answer has gained.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from trainers.planning.plan import Plan
from trainers.training.collate import Batch
from trainers.training.loss import HeadLoss


class Measured(NamedTuple):
    """The results of a batch: the summed `loss` [], float32; the sums of the objective's `measures` [k], float64; and
    for pairs the log-probabilities `logps` [rows] of the rows' trained tokens. Only the loss has a gradient."""

    loss: Tensor
    measures: Tensor
    logps: Tensor


class Objective(ABC):
    """The loss that a run minimises."""

    measures: tuple[str, ...] = ()
    """What is measured besides the loss, by the names in StepMetrics. Averaged as the loss is."""
    label_smoothing = 0.0
    """Label smoothing in the output head."""

    @abstractmethod
    def __call__(self, head: HeadLoss, hidden: Tensor, batch: Batch) -> Measured:
        """`hidden` [n, d] are the hidden states of the batch's trained positions. If there are none, the loss is 0 with
        zero gradients."""


class Supervised(Objective):
    """Cross-entropy of the trained tokens."""

    measures = ("token_accuracy",)

    def __init__(self, plan: Plan) -> None:
        self.label_smoothing = plan.loss.kwargs.get("label_smoothing", 0.0)

    def __call__(self, head: HeadLoss, hidden: Tensor, batch: Batch) -> Measured:
        loss, hits = head(hidden, batch.labels)
        return Measured(loss, hits[None], hidden.new_empty(0))


class Preference(Objective):
    """DPO. Label smoothing e is that of torchtune's DPOLoss: it assumes that a pair is the wrong way round with
    probability e."""

    measures = ("rewards_chosen", "rewards_rejected", "rewards_accuracy", "rewards_margin")

    def __init__(self, plan: Plan) -> None:
        self.beta = plan.loss.kwargs.get("beta", 0.1)
        self.flipped = plan.loss.kwargs.get("label_smoothing", 0.0)

    def __call__(self, head: HeadLoss, hidden: Tensor, batch: Batch) -> Measured:
        assert batch.reference is not None and batch.places is not None  # noqa: S101, PT018  -- all pairs have them
        of_tokens = head.log_probabilities(hidden, batch.labels)  # [n]
        # Spread over a matrix and summed row by row: a fixed order of summation, so the same bits in every run, also on
        # CUDA.
        rows = len(batch.reference)
        spread = of_tokens.new_zeros(rows * batch.longest).scatter(0, batch.places, of_tokens)
        logps = spread.view(rows, batch.longest).sum(dim=1)  # chosen and rejected in turn
        rewards = self.beta * (logps - batch.reference)
        chosen, rejected = rewards[0::2], rewards[1::2]  # [pairs]
        margin = chosen - rejected
        losses = -functional.logsigmoid(margin) * (1 - self.flipped) - functional.logsigmoid(-margin) * self.flipped
        measures = [chosen.sum(), rejected.sum(), (margin > 0).sum(), margin.sum()]
        return Measured(losses.sum(), torch.stack([m.detach().double() for m in measures]), logps.detach())


def objective_of(plan: Plan) -> Objective:
    return Preference(plan) if plan.pairs else Supervised(plan)
