"""The noise process, what a network says under it, and samplers: shared by every wing that has to do with diffusion or flow models."""

from limbeck.diffusion.denoiser import Denoiser, Guidance
from limbeck.diffusion.exact import Mixture, exact_denoiser
from limbeck.diffusion.process import PREDICTIONS, Process, expand
from limbeck.diffusion.processes import EDM, Cosine, Discrete, Flow, Trig, make_process
from limbeck.diffusion.samplers import SAMPLERS, evaluations, sample

__all__ = [
    "EDM",
    "PREDICTIONS",
    "SAMPLERS",
    "Cosine",
    "Denoiser",
    "Discrete",
    "Flow",
    "Guidance",
    "Mixture",
    "Process",
    "Trig",
    "evaluations",
    "exact_denoiser",
    "expand",
    "make_process",
    "sample",
]
