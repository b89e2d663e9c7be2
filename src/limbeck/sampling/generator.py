"""The artifact of this wing: a network, its process, and how to draw pictures from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck import storage
from limbeck.diffusion import SAMPLERS, Denoiser, evaluations, sample
from limbeck.diffusion.samplers import Source
from limbeck.errors import MISFITS, UserError, unknown
from limbeck.outcome import Artifact
from limbeck.places import user_path

FORMAT = "limbeck-generator/1"
NOTE = "generator.json"


class Generator(Artifact):
    """Draws pictures from noise.

    Args:
        denoiser: the network and what its numbers mean.
        shape: `(C, H, W)`.
        sampler: a name of `limbeck.diffusion.SAMPLERS`.
        options: of the sampler; `grid` and `start` (a position in [0, 1]) choose its times.
        base: a many-step model that takes the first part of the way (hybrid sampling); None for none.
        classes: names of the classes.
        clip: keep pictures in [-1, 1]; False for latents.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        shape: tuple[int, ...],
        *,
        sampler: str = "renoise",
        options: dict[str, Any] | None = None,
        base: Denoiser | None = None,
        classes: tuple[str, ...] = (),
        clip: bool = True,
    ) -> None:
        if sampler not in SAMPLERS:
            raise unknown("sampler", sampler, SAMPLERS)
        self.denoiser, self.shape, self.sampler, self.base = denoiser, tuple(shape), sampler, base
        self.options, self.classes, self.clip = dict(options or {}), tuple(classes), clip
        denoiser.network.eval()

    @property
    def device(self) -> torch.device:
        """Where its network is."""
        return next(self.denoiser.network.parameters()).device

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        return f"Generator({type(self.denoiser.network).__name__}, {shape}, {self.denoiser.process.name}, sampler {self.sampler!r})"

    def times(self, steps: int) -> Tensor:
        """`(steps + 1,)` times that it visits."""
        start = self.options.get("start")
        process = self.denoiser.process
        first = None if start is None else float(process.at(torch.tensor(float(start), dtype=torch.float64)))
        return process.times(steps, self.options.get("grid", "uniform"), first)

    @torch.no_grad()
    def from_noise(self, noise: Tensor, labels: Tensor | None = None, steps: int = 1, rng: Source = None) -> Tensor:
        """`(B, C, H, W)` pictures in about [-1, 1] from standard normal noise.

        Args:
            labels: `(B,)` classes. rng: of the noise that a stochastic sampler adds.
        """
        own = {k: v for k, v in self.options.items() if k not in ("start", "grid", "base_steps", "replaced")}
        times = self.times(steps)
        if "start" in self.options:  # a generator that begins inside the process begins at sigma z, without a mean part
            process, first = self.denoiser.process, times[:1]
            noise = noise * float(process.sigma(first) / process.scale(first))
        if self.base is not None:
            from limbeck.sampling.hybrid import hybrid_sample

            return hybrid_sample(self.base, self.denoiser, noise, labels, times, self.sampler, rng, self.options)
        return sample(self.denoiser, noise, labels, sampler=self.sampler, times=times, rng=rng, **own)

    def compile(self, **options: Any) -> Generator:
        """Run its network through torch.compile from now on (the first call of each shape takes long); returns itself.

        Args:
            options: of torch.compile (`backend`, `mode`).

        Raises:
            UserError: torch cannot compile here (no C++ compiler, say).
        """
        try:
            self.denoiser.network.compile(**options)
            self.from_noise(torch.zeros(2, *self.shape, device=self.device), self._example(2), self._fewest())
        except Exception as error:  # whatever a compiler may say
            raise UserError(
                f"torch.compile failed: {str(error).splitlines()[0][:200]}", "leave compile out, or install a C++ compiler"
            ) from None
        return self

    def _fewest(self) -> int:
        """The least number of steps that it can make."""
        return 1 if self.base is None else int(self.options.get("replaced", 1)) + 1

    def _example(self, count: int) -> Tensor | None:
        return torch.zeros(count, dtype=torch.long, device=self.device) if self.denoiser.classes else None

    def sample(self, count: int, steps: int = 1, seed: int = 0, labels: Tensor | list[int] | int | None = None, batch: int = 512) -> Tensor:
        """`(count, C, H, W)` pictures in [-1, 1] on the CPU, the same for the same seed whatever the batch.

        Args:
            labels: one class for all, one for each, or None: all classes in turn.

        Raises:
            UserError: a class that it does not know, or labels for an unconditional network.
        """
        if count < 1:
            raise UserError(f"{count} pictures were asked for", "ask for at least 1")
        wanted = self._labels(count, labels)
        parts = []
        for first in range(0, count, batch):
            here = slice(first, min(first + batch, count))
            # one stream of noise a picture, so that the batch size changes nothing
            rng = [torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63) for number in range(here.start, here.stop)]
            noise = torch.stack([torch.randn(self.shape, generator=g) for g in rng]).to(self.device)
            own = None if wanted is None else wanted[here].to(self.device)
            drawn = self.from_noise(noise, own, steps, rng=rng)
            parts.append((drawn.clamp(-1, 1) if self.clip else drawn).cpu())
        return torch.cat(parts)

    def _labels(self, count: int, labels: Tensor | list[int] | int | None) -> Tensor | None:
        classes = self.denoiser.classes
        if not classes:
            if labels is not None:
                raise UserError("this generator has no classes to choose from", "leave the class out")
            return None
        if labels is None:
            return torch.arange(count) % classes
        wanted = torch.as_tensor(labels).reshape(-1).expand(count) if isinstance(labels, int) else torch.as_tensor(labels)
        if len(wanted) != count:
            raise UserError(f"{len(wanted)} classes were given for {count} pictures", "give one for each, or a single one")
        if int(wanted.min()) < 0 or int(wanted.max()) >= classes:
            raise UserError(f"class {int(wanted.max())} is unknown", f"this generator knows the classes 0 to {classes - 1}")
        return wanted

    def calls(self, steps: int) -> int:
        """Network evaluations a picture."""
        before = self.denoiser.calls, 0 if self.base is None else self.base.calls
        labels = self._example(1)
        if self.base is None:
            return evaluations(self.sampler, steps, self.denoiser.guidance.acts)
        self.from_noise(torch.zeros(1, *self.shape, device=self.device), labels, steps)
        made = self.denoiser.calls - before[0] + self.base.calls - before[1]
        self.denoiser.calls, self.base.calls = before
        return made

    # ---- on disk ----

    def save(self, folder: str | Path, card: str = "", extra: dict[str, Any] | None = None) -> None:
        """Write network and note; a network of diffusers is also a pipeline folder (see docs/sampling.md)."""
        from limbeck.zoo import save_model

        folder = Path(folder)
        save_model(self.denoiser.network, folder, card=card, extra=extra)
        if hasattr(self.denoiser.network, "source"):  # a DiffusersNetwork
            from limbeck.sampling.pipelines import save_pipeline

            try:
                save_pipeline(self.denoiser, folder / "pipeline", sampler=self.sampler)
            except UserError as error:  # diffusers has no scheduler for every process; the network is saved in any case
                storage.write_text(folder / "no-pipeline.txt", f"No pipeline of diffusers could be written: {error.message}\n")
        note: dict[str, Any] = {
            "format": FORMAT,
            "shape": list(self.shape),
            "sampler": self.sampler,
            "options": self.options,
            "classes": list(self.classes),
            "clip": self.clip,
            "denoiser": self.denoiser.facts(),
        }
        if self.base is not None:
            save_model(self.base.network, folder / "base")
            note["base"] = self.base.facts()
        storage.write_json(folder / NOTE, note)


def is_generator(path: str | Path) -> bool:
    """Whether a folder holds a generator, or a run that made one."""
    path = Path(path)
    return (path / NOTE).is_file() or (path / "generator" / NOTE).is_file()


def load_generator(folder: str | Path, device: torch.device | str = "cpu") -> Generator:
    """Open the generator of a run, or its folder.

    Raises:
        UserError: there is none, or its note or weights cannot be read.
    """
    from limbeck.zoo import load_model

    folder = user_path(folder)
    if (folder / "generator" / NOTE).is_file():
        folder = folder / "generator"
    if not (folder / NOTE).is_file():
        raise UserError(
            f"{folder} holds no generator: it has no {NOTE}", "give the folder of a run of the sampling wing, or its generator/"
        )
    try:
        note = json.loads((folder / NOTE).read_text("utf-8"))
        if note["format"] != FORMAT:
            raise UserError(f"{folder / NOTE} says format {note['format']!r}, not {FORMAT!r}", "give a folder that limbeck wrote")
        facts, shape, options = dict(note["denoiser"]), tuple(int(n) for n in note["shape"]), dict(note["options"])
        sampler, classes, base = str(note["sampler"]), tuple(map(str, note["classes"])), note.get("base")
        clip = bool(note.get("clip", True))
        network = load_model(folder).to(device).eval()
        denoiser = Denoiser.from_facts(network, facts)
        other = None if base is None else Denoiser.from_facts(load_model(folder / "base").to(device).eval(), dict(base))
    except (OSError, *MISFITS) as error:
        raise UserError(f"{folder / NOTE} is not the note of a generator: {error}", "restore or remake the folder") from None
    return Generator(denoiser, shape, sampler=sampler, options=options, base=other, classes=classes, clip=clip)
