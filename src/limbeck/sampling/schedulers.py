"""Schedulers of the diffusers library and this package's noise processes, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.diffusion import EDM, Denoiser, Discrete, Flow, Process
from limbeck.errors import UserError
from limbeck.zoo.diffusers_door import library

PREDICTIONS = {"epsilon": "noise", "v_prediction": "v", "sample": "x0"}
"""Names of diffusers for what a network predicts, and this package's."""

VARIANCE_PRESERVING = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "LCMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
)
SCHEDULERS = (*VARIANCE_PRESERVING, "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler")
"""Schedulers whose noise process is understood."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, at most 300 characters."""
    return ((str(error) or type(error).__name__).strip().splitlines() or [""])[0][:300]


def meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """The noise process, the kind of prediction, and how a network is told the time, from a scheduler's configuration.

    Steps n = 0..N-1 of a DDPM schedule are told as they are (times between whole steps as fractions); flows are told
    t * num_train_timesteps; networks of EDM are told log(sigma) / 4. A flow's resolution-dependent shift (`use_dynamic_shifting`) changes
    only a sampler's grid and is not looked at.

    Args:
        config: as in scheduler_config.json, with `_class_name`.

    Returns:
        "process", "prediction", "code", "sigma_data" for a `Denoiser`, and "time_scale" for a `DiffusersNetwork`.

    Raises:
        UserError: a scheduler or a kind of prediction that is not supported, or noise that hides the data wholly at the last step.
    """
    name = str(config.get("_class_name"))
    if name not in SCHEDULERS:
        raise UserError(f"the scheduler {name} is not supported", f"supported are {', '.join(SCHEDULERS)}")
    try:
        scheduler = getattr(library(), name).from_config({k: v for k, v in config.items() if k != "_class_name"})
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"diffusers cannot make this {name}: {first_line(error)}", "check scheduler_config.json") from None
    own = scheduler.config
    if name == "FlowMatchEulerDiscreteScheduler":
        return _meant(Flow(float(own.shift)), "velocity", time_scale=float(own.num_train_timesteps))
    kind = own.prediction_type
    if name == "EDMEulerScheduler":
        if kind != "epsilon":
            raise UserError(f"an EDMEulerScheduler with prediction_type {kind!r} is not supported", "only 'epsilon' is")
        process = EDM(float(own.sigma_min), float(own.sigma_max))
        return _meant(process, "edm", code="log", sigma_data=float(own.sigma_data))
    if kind not in PREDICTIONS:
        raise UserError(f"a {name} with prediction_type {kind!r} is not supported", f"supported are {', '.join(PREDICTIONS)}")
    products = tuple(float(p) for p in scheduler.alphas_cumprod)
    if own.get("rescale_betas_zero_snr") or min(products) <= 0:
        raise UserError(
            "at this schedule's last step nothing is left of the data (alphas_cumprod reaches 0, rescale_betas_zero_snr)",
            "a discrete process needs some signal at every step; give a model trained without rescaled betas",
        )
    return _meant(Discrete(products), PREDICTIONS[kind])


def _meant(process: Process, prediction: str, time_scale: float = 1.0, code: str = "time", sigma_data: float = 0.5) -> dict[str, Any]:
    return {"process": process, "prediction": prediction, "time_scale": time_scale, "code": code, "sigma_data": sigma_data}


def scheduler_for(denoiser: Denoiser, sampler: str = "renoise") -> Any:
    """The scheduler of diffusers with which few steps of this denoiser are right.

    Re-noising generators ("renoise": consistency and distribution-matching students) of a DDPM process get an LCMScheduler whose timesteps
    for n steps are this package's uniform ones, for others a trailing DDIMScheduler; a flow gets a FlowMatchEulerDiscreteScheduler
    (with `stochastic_sampling` where it re-noises); an EDM network gets an EDMEulerScheduler, which is the nearest one and re-noises
    nothing, so that only one step is the same. diffusers ends a flow's default grid near 0.001 instead of spreading the
    steps evenly: call the pipeline with `sigmas=[1.0, 0.75, 0.5, 0.25]` for four.

    Raises:
        UserError: diffusers has no scheduler for the process or the prediction.
    """
    diffusers = library()
    process, again = denoiser.own, sampler == "renoise"
    if isinstance(process, Flow) and denoiser.prediction == "velocity":
        steps = int(getattr(denoiser.network, "time_scale", 1000))
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps, shift=process.shift, stochastic_sampling=again)
    if isinstance(process, EDM) and denoiser.prediction == "edm":
        return diffusers.EDMEulerScheduler(sigma_min=process.lowest, sigma_max=process.highest, sigma_data=denoiser.sigma_data)
    names = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if not isinstance(process, Discrete) or denoiser.prediction not in names:
        raise UserError(
            f"diffusers has no scheduler for {denoiser.prediction!r} prediction under the process {process.name!r}",
            "a pipeline is written for ddpm with noise, v or x0, for flow with velocity and for edm with edm",
        )
    products = process.products
    betas = [1 - p / before for before, p in zip((1.0, *products), products)]
    common = {"num_train_timesteps": len(products), "trained_betas": betas, "prediction_type": names[denoiser.prediction]}
    common |= {"clip_sample": False, "set_alpha_to_one": True}
    if again:
        return diffusers.LCMScheduler(**common, original_inference_steps=len(products))
    return diffusers.DDIMScheduler(**common, timestep_spacing="trailing")
