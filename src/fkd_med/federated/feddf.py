"""FedDF: the global student learns, on public images, what the clients' models say together."""

from __future__ import annotations

import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable

from fkd_med.federated.public_learning import approach, check_steps, mean_answers, minibatches
from fkd_med.federated.server_distillation import ServerDistillation, ServerWork
from fkd_med.losses.tensors import check_temperature


class FedDF(ServerDistillation):
    """Distil the ensemble of a round's clients into the aggregated student, on public images without masks.

    Lin, Kong, Stich and Jaggi, "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS 2020,
    Algorithm 1 (models of one architecture) and AVGLOGITS: from the weighted mean of the clients' weights,
    ``x <- x - eta d/dx KL(softmax(1/|S| sum_k f(x_k, d)), softmax(f(x, d)))`` for some steps on minibatches d, the
    rate annealed by a cosine to 0. The divergence is averaged over pixels. BatchNorm's statistics stay the averaged
    ones; dropout is off. The ensemble is asked once per round, about the images the steps will use: in memory are 4
    bytes x K x H x W for each of these (0.26 MB at 256 px and one logit), and one client's model at a time.

    Args:
        steps: optimizer steps per round; up to 10,000 with early stopping in the paper.
        batch_size: public images per step; 128 in the paper, of 32 pixels.
        temperature: softens both sides, above 0; the loss is multiplied by its square. 1 in the paper.
        optimizer: called with the student's parameters, afresh in every round; Adam with rate 0.001 in the paper.

    Raises:
        ConfigError: a setting out of its range.
    """

    def __init__(
        self,
        steps: int = 200,
        batch_size: int = 16,
        temperature: float = 1.0,
        optimizer: OptimizerCallable = torch.optim.Adam,
    ) -> None:
        check_steps(self, steps=steps, batch_size=batch_size)
        check_temperature(temperature)
        self.steps, self.batch_size, self.temperature, self.optimizer = steps, batch_size, temperature, optimizer

    def distil(self, work: ServerWork) -> dict[str, float]:
        """Train the student towards the clients' mean logits; return the divergence of the first and last step."""
        steps, reporter = 1 if work.around.is_trial else self.steps, work.around.reporter
        everything = np.arange(len(work.images))
        batches = minibatches(everything, self.batch_size, steps, work.seed, "FedDF", work.round)
        used = np.unique(np.concatenate(batches))
        targets = mean_answers(work.models(), work.images, used, self.batch_size, work.around)
        optimizer = self.optimizer(p for p in work.student.parameters() if p.requires_grad)

        def show(step: int) -> None:
            if reporter is not None:
                reporter.show(f"round {work.round} · distillation on the server · step {step}/{steps}")

        losses = approach(
            work.student, work.images, targets, batches, optimizer, self.temperature, work.around, show
        )  # fmt: skip
        return {"kl_first": losses[0], "kl_last": losses[-1]}
