"""Sampling with two models: a many-step one takes the first part of the way, a few-step one the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from limbeck.diffusion import Denoiser, expand
from limbeck.diffusion.samplers import SAMPLERS, Source, ddim_step
from limbeck.errors import UserError


def switch(base_times: Tensor, base: Denoiser, times: Tensor, few: Denoiser, replaced: int) -> int:
    """How many base steps are made: up to the base time whose noise level is nearest to that of the few-step time number `replaced`.

    At least one, because with none the few-step model would be handed pure noise as if it were half done.

    Raises:
        UserError: there is no such step.
    """
    if not 1 <= replaced < len(times) - 1:
        raise UserError(
            f"{replaced} of {len(times) - 1} steps cannot be replaced",
            "leave at least one step to the distilled model, and replace at least one",
        )
    level = few.process.angle(times[replaced : replaced + 1])
    gaps = (base.process.angle(base_times) - level).abs()
    return max(1, int(gaps[:-1].argmin()))


@torch.no_grad()
def hybrid_sample(
    base: Denoiser,
    few: Denoiser,
    noise: Tensor,
    labels: Tensor | None,
    times: Tensor,
    sampler: str,
    rng: Source,
    options: Mapping[str, Any],
) -> Tensor:
    """`(B, ...)` samples: DDIM steps of `base`, then the last steps of `few`; states move between processes by equal noise level.

    Args:
        noise: `(B, ...)`. times: of the few-step sampler. sampler: its name.
        options: `base_steps` of the whole base schedule, `replaced` steps of the few-step one, and what its sampler takes.
    """
    first = base.process.times(int(options.get("base_steps", 20)), str(options.get("grid", "uniform"))).to(noise.device, noise.dtype)
    times = times.to(noise.device, noise.dtype)
    replaced = int(options.get("replaced", 1))
    made = switch(first, base, times, few, replaced)
    x = expand(base.process.scale(first[:1]), noise) * noise
    for number in range(made):
        t, s = first[number].expand(len(x)), first[number + 1].expand(len(x))
        x = ddim_step(base.process, *base.parts(x, t, labels), s)
    reached = few.process.time_at(base.process.angle(first[made : made + 1]))
    x = x * expand(few.process.scale(reached) / base.process.scale(first[made : made + 1]), x)
    later = times[replaced + 1 :]
    rest = torch.cat([reached, later[later < reached]])  # coarse base steps may have passed some of them
    own = {k: v for k, v in options.items() if k == "eta"}
    return SAMPLERS[sampler](few, x, rest, labels, rng, own, lambda t, x0: None)
