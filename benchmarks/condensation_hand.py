"""The loops of the condensation papers, restated in plain torch for the benchmarks: distribution, gradient and trajectory matching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.condensation.problem import Problem
from limbeck.zoo.convnet import ConvNet

CLASSES, PER_CLASS = 10, 10


def dm_loss(network: nn.Module, images: Tensor, problem: Problem, batch: int, real: Callable[[int, int], Tensor]) -> Tensor:
    """One class after the other, as in the released code."""
    embed = lambda x: network.pool(network.stages(network.stem(x)))  # noqa: E731
    loss = torch.zeros(())
    for c in range(CLASSES):
        output_real = embed(real(c, batch)).detach()
        output_syn = embed(images[c * PER_CLASS : (c + 1) * PER_CLASS])
        loss = loss + ((output_real.mean(0) - output_syn.mean(0)) ** 2).sum()
    return loss


def dm_by_hand(problem: Problem, width: int, batch: int, steps: int) -> Tensor:
    """The plain loop; the images at its end."""
    images = problem.initial("real").images.detach().clone().requires_grad_(True)
    optimizer = torch.optim.SGD([images], lr=1.0, momentum=0.5)
    for _ in range(steps):
        network = ConvNet((3, 32, 32), CLASSES, width=width, depth=3).train()
        for parameter in network.parameters():
            parameter.requires_grad = False
        loss = dm_loss(network, images, problem, batch, problem.real)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return images


def gm_loss(network: nn.Module, images: Tensor, problem: Problem, batch: int, real: Callable[[int, int], Tensor]) -> Tensor:
    """Class after class: the gradient that real samples give the network, that of the synthetic ones, one minus cosines of rows."""
    loss = torch.zeros(())
    weights = list(network.parameters())
    for c in range(CLASSES):
        x = real(c, batch)
        wanted = torch.autograd.grad(F.cross_entropy(network(x), torch.full((len(x),), c)), weights)
        mine = images[c * PER_CLASS : (c + 1) * PER_CLASS]
        found = torch.autograd.grad(F.cross_entropy(network(mine), torch.full((len(mine),), c)), weights, create_graph=True)
        for a, b in zip(found, wanted):
            if a.ndim > 1:
                a, b = a.reshape(len(a), -1), b.detach().reshape(len(b), -1)
                loss = loss + (1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + 1e-6)).sum()
    return loss


def gm_by_hand(problem: Problem, width: int, batch: int, steps: int) -> Tensor:
    """The plain loop of DC: two updates of the images for each network, one epoch of the network between them; the images at its end."""
    made = problem.initial("real")
    images, labels = made.images.detach().clone().requires_grad_(True), made.labels
    optimizer = torch.optim.SGD([images], lr=0.1, momentum=0.5)
    for step in range(steps):
        if step % 2 == 0:
            network = ConvNet((3, 32, 32), CLASSES, width=width, depth=3).train()
        loss = gm_loss(network, images, problem, batch, problem.real)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 2 == 0:
            inner = torch.optim.SGD(network.parameters(), lr=0.01)
            order = torch.randperm(len(images))
            inner.zero_grad()
            F.cross_entropy(network(images.detach()[order]), labels[order]).backward()
            inner.step()
    return images


def tm_by_hand(parts: Any, steps: int) -> Tensor:
    """The papers' loop: slices of a flat vector put into the network, gradients with their graph, one step after another."""
    functional, images, labels, start, target = parts
    names, shapes = functional.names, functional.shapes
    weights = [start.detach().requires_grad_(True)]
    rate = torch.tensor(0.01, requires_grad=True)
    for _ in range(steps):
        offset, named = 0, {}
        for name, shape in zip(names, shapes):
            named[name] = weights[-1][offset : offset + shape.numel()].view(shape)
            offset += shape.numel()
        loss = F.cross_entropy(torch.func.functional_call(functional.network, named, (images,)), labels)
        gradient = torch.autograd.grad(loss, weights[-1], create_graph=True)[0]
        weights.append(weights[-1] - rate * gradient)
    loss = F.mse_loss(weights[-1], target, reduction="sum") / F.mse_loss(start, target, reduction="sum")
    images.grad = None
    loss.backward()
    return loss.detach()
