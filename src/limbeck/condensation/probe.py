"""How good a network's features are: a linear classifier on top of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from limbeck.condensation.problem import Problem
from limbeck.signals import Reader


def probe(
    network: nn.Module,
    problem: Problem,
    train: tuple[Tensor, Tensor],
    others: Sequence[tuple[Tensor, Tensor]],
    classes: Sequence[int],
    chunk: int = 1024,
) -> list[float]:
    """Accuracies of a logistic regression on the frozen embedding (scikit-learn's, on standardised features).

    Args:
        network: its embedding is read in evaluation mode.
        problem: whose training samples are read.
        train: positions `(N,)` of training samples and their classes.
        others: standardised samples and classes of each split to be measured.
        classes: only samples of these are used.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    reader = Reader(network.eval(), ("embedding",), grad=False, stop_early=True)
    wanted = torch.tensor(list(classes))
    positions, labels = train
    keep = torch.isin(labels, wanted)
    positions, labels = positions[keep], labels[keep]
    features = torch.cat([reader(problem.at(index)).embedding for index in positions.split(chunk)])
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    classifier.fit(features.double().cpu().numpy(), labels.numpy())
    found = []
    for x, y in others:
        keep = torch.isin(y.cpu(), wanted)
        z = torch.cat([reader(part).embedding for part in x[keep.to(x.device)].split(chunk)])
        found.append(float(classifier.score(z.double().cpu().numpy(), y.cpu()[keep].numpy())))
    return found
