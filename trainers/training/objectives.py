"""What a run makes small: the loss of a batch from its hidden states, and what it is a mean over.

Supervised fine-tuning: cross-entropy, a mean over trained tokens. Direct preference optimisation (Rafailov et al. 2023,
https://arxiv.org/abs/2305.18290): a mean over pairs of -log sigmoid(beta * margin), where the margin is how much more
the chosen answer has gained in log-probability over the reference model than the rejected one.
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
    """Of a batch: the summed `loss` [], float32; sums of what the objective calls its `measures` [k]; and with pairs
    the log-probability `logps` of each row's trained tokens [rows]. Only the loss has a gradient."""

    loss: Tensor
    measures: Tensor
    logps: Tensor


class Objective(ABC):
    measures: tuple[str, ...] = ()
    """What is measured besides the loss, by its names in StepMetrics; a mean over the same things."""
    label_smoothing = 0.0
    """That of the output head."""

    @abstractmethod
    def __call__(self, head: HeadLoss, hidden: Tensor, batch: Batch) -> Measured:
        """`hidden` [n, d]: of the batch's trained positions. Without any, a loss of 0 with zero gradients."""


class Supervised(Objective):
    measures = ("token_accuracy",)

    def __init__(self, plan: Plan) -> None:
        self.label_smoothing = plan.loss.kwargs.get("label_smoothing", 0.0)

    def __call__(self, head: HeadLoss, hidden: Tensor, batch: Batch) -> Measured:
        loss, hits = head(hidden, batch.labels)
        return Measured(loss, hits[None], hidden.new_empty(0))


class Preference(Objective):
    """DPO, with label smoothing e as torchtune's DPOLoss has it: with probability e a pair is the wrong way round."""

    measures = ("rewards_chosen", "rewards_rejected", "rewards_accuracy", "rewards_margin")

    def __init__(self, plan: Plan) -> None:
        self.beta = plan.loss.kwargs.get("beta", 0.1)
        self.flipped = plan.loss.kwargs.get("label_smoothing", 0.0)

    def __call__(self, head: HeadLoss, hidden: Tensor, batch: Batch) -> Measured:
        assert batch.reference is not None and batch.places is not None  # noqa: S101, PT018  -- all pairs have them
        of_tokens = head.log_probabilities(hidden, batch.labels)  # [n]
        # Spread over a matrix and summed line by line: the same order of summands, so the same bits, on any device.
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
