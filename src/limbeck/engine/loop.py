"""The one training loop. Every method of every wing, every teacher and every baseline is trained here.

The hot path holds no `.item()`, no printing and no file: losses are gathered as tensors and looked at every few dozen steps.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from limbeck import processes
from limbeck.engine import checkpoint, schedule, sharding
from limbeck.engine.agreement import Agreement
from limbeck.engine.callbacks import Callback
from limbeck.engine.clock import Clock
from limbeck.engine.joint import joint_turn
from limbeck.engine.program import Program, placed
from limbeck.engine.watch import SMALL_SHARE, shares, term_norms, uncompiled
from limbeck.errors import UserError

PLAIN = nullcontext()


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM); its state was saved first.

    Attributes:
        step: steps that are done.
        total: steps of the phase.
    """

    def __init__(self, phase: str, step: int, total: int) -> None:
        super().__init__(f"interrupted in {phase} after step {step} of {total}")
        self.phase, self.step, self.total = phase, step, total


@dataclass
class Plan:
    """How the loop should run one phase.

    Attributes:
        training: optimiser settings, see `limbeck.recipe.Training`.
        total: steps to make.
        folder: where its checkpoints go; None keeps none (nothing can be resumed then).
        every_seconds, every_steps, keep: when a checkpoint is written, and how many stay.
        evaluate_every: steps between measurements; 0 for none.
        patience: stop after so many measurements without a better one.
        watch: steps between measurements of the terms' gradients; 0 for none, None to choose.
        log_every: steps between log records; None to choose.
        precision: "no", "bf16" or "fp16" (autocast through Accelerate).
        digest: of the recipe; a checkpoint of another one is refused.
        stop_on_alarm: whether an alarm ends the run.
    """

    training: Any
    total: int
    folder: Path | None = None
    every_seconds: float = 30.0
    every_steps: int | None = None
    keep: int = 2
    evaluate_every: int = 0
    patience: int | None = None
    watch: int | None = None
    log_every: int | None = None
    precision: str = "no"
    digest: str = ""
    stop_on_alarm: bool = False


@dataclass
class Fit:
    """What came of a phase: steps made, training seconds over all sittings, whether it ended early, and warnings."""

    steps: int
    seconds: float
    stopped_early: bool = False
    warnings: list[str] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C (or SIGTERM) into a flag that the loop reads between two steps; the second one is immediate."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return

    def note(number: int, frame: Any) -> None:
        if requested.is_set() and processes.world() == 1:  # a launcher repeats the terminal's Ctrl-C, which is not a second one
            raise KeyboardInterrupt
        requested.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _total(terms: Collection[torch.Tensor]) -> torch.Tensor:
    """The sum of the terms in their order; of many terms in one operation."""
    if len(terms) > 3:
        return torch.stack(list(terms)).sum()
    values = iter(terms)
    return sum(values, next(values))


def _mean(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over those that have it."""
    names = dict.fromkeys(name for own in figures for name in own)
    return {name: sum(own[name] for own in figures if name in own) / sum(name in own for own in figures) for name in names}


class Loop:
    """Drives one program through one phase.

    Args:
        program: what is trained.
        plan: how.
        phase: its name in the log ("teacher", "student", "baseline", ...).
        callbacks: who is told.
    """

    def __init__(self, program: Program, plan: Plan, phase: str = "student", callbacks: Sequence[Callback] = ()) -> None:
        self.program, self.plan, self.phase, self.callbacks = program, plan, phase, list(callbacks)
        self.clock = Clock(0, program.steps_per_epoch, plan.total)
        self.optimizers = program.optimizers()
        self.accelerator = self._accelerator()
        self.world = processes.world()
        self._turns: dict[str, Any] = {}
        self.log_every = plan.log_every or max(1, min(50, plan.total // 40))
        watch = plan.watch if plan.watch is not None else max(50, min(100, plan.total // 2), plan.total // 40)
        self.watch_every = math.ceil(watch / self.log_every) * self.log_every
        self.outcome = Fit(0, 0.0)
        self.best: float | None = None
        self.without_better = 0
        self._recent: list[tuple[int, dict[str, torch.Tensor], Any]] = []
        self._norms: dict[str, float] = {}

    def _accelerator(self) -> Any:
        """Accelerate's object where it has work to do (mixed precision), else None: the plain path then costs nothing."""
        if self.plan.precision == "no":
            return None
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)  # precision is fixed in a process-wide singleton; each phase sets its own
        on_cpu = all(p.device.type == "cpu" for m in self.program.modules().values() for p in m.parameters())
        accelerator = Accelerator(mixed_precision=self.plan.precision, cpu=on_cpu)
        self.optimizers = {name: accelerator.prepare_optimizer(optimizer) for name, optimizer in self.optimizers.items()}
        return accelerator

    # ---- one step ----

    def _step(self, batch: Any) -> None:
        clock, program, accelerator = self.clock, self.program, self.accelerator
        step, count = clock.step, self.plan.training.accumulate
        gathered: dict[str, torch.Tensor] = {}
        watched = self.watch_every and (step == 0 or (step + 1) % self.watch_every == 0) and not processes.sharding()
        for turn in program.turns(clock):
            optimizer = self.optimizers.get(turn)
            losses = program.losses if self.world == 1 or optimizer is None else self._jointly(turn)
            parts = (batch,) if count == 1 and self.world == 1 else program.parts(batch, count)
            for part in parts:
                if self.world > 1 and optimizer is not None:
                    losses.last = part is parts[-1]
                looked_at = watched and optimizer is not None and part is parts[0]
                with uncompiled() if looked_at else PLAIN, PLAIN if accelerator is None else accelerator.autocast():
                    terms = losses(turn, part, clock)
                if looked_at:
                    self._norms |= term_norms(terms, [p for group in optimizer.param_groups for p in group["params"]])
                loss = _total(terms.values())
                if optimizer is not None:
                    if not (loss.requires_grad if self.world == 1 else losses.reached(step, loss)):
                        raise UserError(
                            f"the loss of the turn {turn} has no gradient (terms: {', '.join(terms)})",
                            "the student has no trainable weight on the way to its output, or the method detaches it",
                        )
                    if count > 1:
                        loss = loss / count
                    if accelerator is None:
                        loss.backward()
                    else:
                        accelerator.backward(loss)
                for name, value in terms.items():
                    value = value.detach()
                    if count > 1:
                        value = value / count
                    gathered[name] = gathered[name] + value if name in gathered else value
            if optimizer is not None:
                self._update(optimizer, step)
        program.after_step(clock)
        self._recent.append((step, gathered, getattr(batch, "index", None)))
        clock.step = step + 1

    def _jointly(self, turn: str) -> Any:
        """The losses of a turn through which gradients are averaged over all processes."""
        if turn not in self._turns:
            self._turns[turn] = joint_turn(self.program, self.optimizers[turn])
        return self._turns[turn]

    def _update(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        training, accelerator = self.plan.training, self.accelerator
        rate = schedule.factor(training, step, self.plan.total)
        for group, base in self._rates[id(optimizer)]:
            group["lr"] = base * rate
        if training.clip is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            if accelerator is None or processes.sharding():
                sharding.clip_gradients(parameters, training.clip)
            else:
                accelerator.clip_grad_norm_(parameters, training.clip)
        optimizer.step()
        # a turn's backward pass may reach parameters of another turn (bilevel, adversarial): every gradient is dropped
        for other in self.optimizers.values():
            if accelerator is None:  # what zero_grad does, without the profiler's record of it
                for group in other.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None
            else:
                other.zero_grad(set_to_none=True)

    # ---- what happens between steps ----

    def _tell(self, record: dict[str, Any]) -> None:
        for callback in self.callbacks:
            callback.log(record)

    def _alarm(self, text: str) -> None:
        if text in self.outcome.alarms:
            return
        self.outcome.alarms.append(text)
        self._tell({"phase": self.phase, "step": self.clock.step, "alarm": text})
        if self.plan.stop_on_alarm:
            raise UserError(
                f"stopped at step {self.clock.step} of {self.phase} by an alarm: {text}",
                "look at log.jsonl; set stop_on_alarm=false to go on",
            )

    def _flush(self) -> None:
        """Look at the losses gathered since the last time: NaN guard, log record, alarms."""
        if not self._recent:
            return
        names = list(dict.fromkeys(name for _, terms, _ in self._recent for name in terms))
        rows = {name: torch.stack([terms[name] for _, terms, _ in self._recent if name in terms]).float() for name in names}
        means = _mean(processes.every({name: float(values.mean()) for name, values in rows.items()}))
        if not all(math.isfinite(value) for value in means.values()):
            self._not_finite()
        now = time.perf_counter()
        steps = len(self._recent)
        samples = self.world * sum(len(index) if index is not None else 0 for _, _, index in self._recent)
        spent = max(now - self._flushed_at, 1e-9)
        terms: dict[str, dict[str, float]] = {name: {"value": value} for name, value in means.items()}
        if self._norms:
            parts = shares(self._norms)
            for name, norm in self._norms.items():
                if not math.isfinite(norm):
                    self._alarm(f"the gradient of {name} is not finite")
                    continue
                terms.setdefault(name, {})
                terms[name] |= {"norm": norm, "share": parts[name]}
                if parts[name] < SMALL_SHARE and len(parts) > 1 and self.clock.step > self.plan.total // 4:
                    self._alarm(f"the term {name} makes less than {SMALL_SHARE:.0%} of the update")
        first = next(iter(self.optimizers.values()), None)
        record: dict[str, Any] = {
            "phase": self.phase,
            "step": self.clock.step,
            "epoch": round(self.clock.step / self.clock.steps_per_epoch, 4),
            "seconds": round(self.outcome.seconds + now - self._started_at, 3),
            "loss": sum(means.values()),
            "terms": terms,
            "rate": round((samples or steps) / spent, 1),
        }
        if first is not None:
            record["lr"] = first.param_groups[0]["lr"]
        self._recent, self._norms, self._flushed_at = [], {}, now
        self._tell(record)
        for text in processes.told(self.program.vitals()):
            self._alarm(text)

    def _not_finite(self) -> None:
        """Name the first loss that is not finite, on whichever process it was.

        Raises:
            UserError: always.
        """
        found = next((text for text in processes.every(self._first_not_finite()) if text), "a mean of the losses is not finite")
        _, good, _ = checkpoint.latest(self.plan.folder) if self.plan.folder else (None, None, None)
        raise UserError(found, f"last good checkpoint: {good or 'none yet'}; try a lower learning rate, or training.clip=1")

    def _first_not_finite(self) -> str | None:
        for step, terms, index in self._recent:
            bad = [name for name, value in terms.items() if not bool(torch.isfinite(value))]
            if not bad:
                continue
            kind = "NaN" if bool(torch.isnan(terms[bad[0]])) else "infinite"
            where = f"samples {index.tolist()[:16]}{' ...' if len(index) > 16 else ''}" if index is not None else "unknown samples"
            return f"the loss turned {kind} in {self.phase} at step {step}: term {', '.join(bad)}, {where}"
        return None

    def _measure(self) -> None:
        processes.level_buffers(list(self.program.modules().values()))
        metrics = processes.told(self.program.evaluate())
        self.program.train()
        if not metrics:
            return
        self._tell({"phase": self.phase, "step": self.clock.step, "metrics": metrics})
        for text in processes.told(self.program.vitals()):
            self._alarm(text)
        if self.plan.patience:
            name, higher = self.program.primary  # type: ignore[attr-defined]
            value = metrics[name] if higher else -metrics[name]
            if self.best is None or value > self.best:
                self.best, self.without_better = value, 0
            else:
                self.without_better += 1
                self.outcome.stopped_early = self.without_better >= self.plan.patience

    def _bad_weight(self) -> str | None:
        for name, module in self.program.modules().items():
            for path, value in module.named_parameters():
                if not bool(torch.isfinite(sharding.local(value)).all()):
                    return f"{name}.{path}"
        return None

    def _save(self, done: bool = False) -> None:
        if self.plan.folder is None:
            return
        self._flush()
        bad = next((name for name in processes.every(self._bad_weight()) if name), None)
        if bad is not None:
            raise UserError(
                f"the weight {bad} is not finite after step {self.clock.step} of {self.phase}",
                "try a lower learning rate, or training.clip=1",
            )
        processes.level_buffers(list(self.program.modules().values()))
        seconds = self.outcome.seconds + time.perf_counter() - self._started_at
        state = {
            "step": self.clock.step,
            "modules": sharding.whole({name: module.state_dict() for name, module in self.program.modules().items()}),
            "optimizers": sharding.whole({name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}),
            "memory": self.program.memory(),
            "random": checkpoint.random_state(),
            "engine": {
                "best": self.best,
                "without_better": self.without_better,
                "seconds": seconds,
                "alarms": self.outcome.alarms,
                "stopped_early": self.outcome.stopped_early,
            },
            "digest": self.plan.digest,
            "done": done,
        }
        if self.world > 1:  # what each process knows alone; a checkpoint of one process has no such entry
            memory = placed(state["memory"], torch.device("cpu"))
            state["processes"] = processes.every({"memory": memory, "random": state["random"]})
        folder, step = self.plan.folder, self.clock.step
        processes.first(lambda: checkpoint.save(folder, step, state, self.plan.keep))
        self._saved_at = time.perf_counter()

    def _restore(self) -> bool:
        """Go back to the newest whole checkpoint; returns whether the phase was already done."""
        if self.plan.folder is None:
            return False
        state, path, warnings = checkpoint.latest(self.plan.folder)
        self.outcome.warnings += warnings
        if state is None:
            return False
        if state["digest"] != self.plan.digest:
            raise UserError(
                f"{path} belongs to another recipe or to other data", "resume with the recipe of that folder, or choose another --out"
            )
        for name, module in self.program.modules().items():
            sharding.load_weights(module, state["modules"][name])
        for name, optimizer in self.optimizers.items():
            sharding.load_optimizer(optimizer, state["optimizers"][name])
        own = checkpoint.of_process(state, processes.rank(), self.world)
        self.program.restore(own["memory"])
        if own["random"] is not None:
            checkpoint.restore_random_state(own["random"])
        engine = state["engine"]
        self.best, self.without_better = engine["best"], engine["without_better"]
        self.outcome.seconds, self.outcome.alarms = engine["seconds"], list(engine["alarms"])
        self.outcome.stopped_early = engine["stopped_early"]
        self.clock.step = state["step"]
        return bool(state["done"])

    # ---- the whole phase ----

    def run(self) -> Fit:
        """Train until the plan is fulfilled; goes on from the newest checkpoint in the plan's folder, if there is one.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM, once the state is saved.
            UserError: a loss turned NaN, an alarm with `stop_on_alarm`, or the checkpoints cannot be used.
        """
        plan, clock, program = self.plan, self.clock, self.program
        # base rates are read before a restore, which brings back rates that the schedule had already scaled
        bases = {name: [group["lr"] for group in optimizer.param_groups] for name, optimizer in self.optimizers.items()}
        self._started_at = self._flushed_at = self._saved_at = time.perf_counter()
        done = self._restore()
        self._rates = {id(o): list(zip(o.param_groups, bases[name])) for name, o in self.optimizers.items()}
        for callback in self.callbacks:
            callback.start(self.phase, clock.step, plan.total)
        if not done:
            with _stop_requests() as requested:
                program.train()
                self._agreed = Agreement()
                while clock.step < plan.total and not self.outcome.stopped_early:
                    self._epoch(requested)
                stop = self._agreed.close()
            self._flush()
            self._save(done=True)
            if stop:
                raise Interrupted(self.phase, clock.step, plan.total)
        for callback in self.callbacks:
            callback.finish(self.phase)
        self.outcome.steps = clock.step
        if not done:
            self.outcome.seconds += time.perf_counter() - self._started_at
        return self.outcome

    def _epoch(self, requested: threading.Event) -> None:
        plan, clock, agreed = self.plan, self.clock, self._agreed
        ticked = time.perf_counter()
        for batch in self.program.batches(clock.epoch, clock.step % clock.steps_per_epoch):
            self._step(batch)
            step = clock.step
            if step % self.log_every == 0 or step == 1:
                self._flush()
            if plan.evaluate_every and (step % plan.evaluate_every == 0 or step == plan.total):
                self._measure()
            now = time.perf_counter()
            if now - ticked > 0.1:
                ticked = now
                for callback in self.callbacks:
                    callback.tick(step)
            stop, save = agreed(requested.is_set(), now - self._saved_at > plan.every_seconds)
            if stop:
                self._save()
                raise Interrupted(self.phase, step, plan.total)
            if save or (plan.every_steps and step % plan.every_steps == 0):
                self._save()
            if step >= plan.total or self.outcome.stopped_early:
                return
