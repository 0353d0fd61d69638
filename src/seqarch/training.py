"""`fit`: the one training loop of the book."""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import seed_everything
from ._nested import map_tensors, tensors_of

Loss = Callable[..., Any]
Data = Iterable | Callable[[int, torch.Generator], Any]
SCHEDULES = ("constant", "linear", "cosine")


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the message names the step and the batch."""


@dataclass
class History:
    """What a run measured, as a tidy table: one row per step and metric."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, step: int, **metrics: float) -> None:
        """Append one row per metric."""
        self.rows += [{"step": step, "metric": name, "value": float(value)} for name, value in metrics.items()]

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Return the steps and the values of one metric, ready to plot."""
        rows = [r for r in self.rows if r["metric"] == metric]
        if not rows:
            known = sorted({r["metric"] for r in self.rows})
            raise KeyError(f"expected one of the metrics {known}, got {metric!r}")
        return [r["step"] for r in rows], [r["value"] for r in rows]

    def last(self, metric: str) -> float:
        """Return the metric's newest value."""
        return self.series(metric)[1][-1]

    def best(self, metric: str, mode: str = "min") -> float:
        """Return the smallest (or, with ``mode="max"``, largest) value of the metric."""
        return (min if mode == "min" else max)(self.series(metric)[1])

    def to_frame(self):
        """Return the rows as a pandas DataFrame (step, metric, value)."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=["step", "metric", "value"])

    def __repr__(self) -> str:
        """One line: the last value of every metric."""
        names = dict.fromkeys(r["metric"] for r in self.rows)
        return "History(" + ", ".join(f"{n}={self.last(n):.4g}" for n in names) + ")"


def fit(
    model: nn.Module,
    loss: Loss,
    data: Data,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    lr: float = 1e-3,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    weight_decay: float = 0.0,
    schedule: str = "constant",
    warmup: int = 0,
    final_lr: float = 0.0,
    clip: float | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    eval_every: int | None = None,
    monitor: str | None = None,
    mode: str = "min",
    patience: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    carry: bool = False,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
    progress: bool = True,
    desc: str = "",
) -> History:
    """Train `model` in place and return the history of its loss and metrics.

    Args:
        model: any module. Moved to `device`; left in the mode (train or eval) in which it came.
        loss: ``loss(model, batch)`` returning a scalar, or ``(scalar, {"name": value})`` to record more. With
            ``carry=True``, ``loss(model, batch, state)`` returning ``(scalar, state)``: the state (None at first;
            a tensor or nested tuples, lists, dicts of them) reaches the next step detached: truncated
            backpropagation through time.
        data: an iterable of batches, started again whenever it ends, or a function ``data(step, generator)`` that
            makes batch number `step` with the seeded generator. Batches are tensors or nested containers of them.
        steps, epochs: how long; give one. An epoch is one pass over a sized iterable.
        lr: the highest learning rate. `warmup` steps rise to it linearly; then `schedule` (``"constant"``,
            ``"linear"``, ``"cosine"``) falls to ``final_lr * lr`` at the last step.
        optimizer: a function from parameters to an optimiser; None is AdamW with `lr` and `weight_decay`.
        clip: largest global L2 norm of the gradient; its norm before clipping is recorded as ``grad_norm``.
        evaluate: ``evaluate(model)`` returning named numbers; called in eval mode without gradients every
            `eval_every` steps (None: once, at the end) and after the last step.
        monitor, mode, patience: stop when the metric `monitor` has not improved (``mode="min"`` or ``"max"``) for
            `patience` evaluations; the weights of its best evaluation are put back at the end.
        seed: seeds the global generators and the generator of `data`.
        device: None is where the model's parameters are.
        autocast: a dtype for mixed precision (bfloat16, or float16 with loss scaling).
        checkpoint, checkpoint_every: a file that receives everything needed to go on, every so many steps and at
            the end, always written whole. If it exists when `fit` starts, training resumes from it.
        progress: show a bar; `desc` is its label.

    Under ``torchrun`` (or any initialised process group) the model is trained as DistributedDataParallel: the same
    call in every process, gradients averaged. Give each process its own part of the data; rank 0 alone shows the
    bar, writes the checkpoint and keeps a full history.

    Raises:
        ValueError: contradictory arguments, or data without batches.
        NonFiniteLossError: the loss is NaN or infinite, naming step and batch.
    """
    total = _total_steps(steps, epochs, data)
    if schedule not in SCHEDULES:
        raise ValueError(f"expected schedule to be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if mode not in ("min", "max"):
        raise ValueError(f"expected mode to be 'min' or 'max', got {mode!r}")
    if patience is not None and (monitor is None or evaluate is None):
        raise ValueError("expected patience to come with evaluate and monitor, got patience alone")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("expected a model with trainable parameters, got none")

    seed_everything(seed)
    rank, world = _join_process_group()
    if device is None:
        device = torch.device("cuda", rank) if world > 1 and torch.cuda.is_available() else parameters[0].device
    device = torch.device(device)
    model.to(device)
    was_training = model.training
    model.train()
    runner = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    # Each process draws its own batches; with one process the seed is the caller's.
    generator = torch.Generator().manual_seed(seed + rank)

    fused = all(p.is_floating_point() for p in parameters)  # one call for all parameters; not for complex ones
    make = optimizer or (lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=weight_decay, fused=fused))
    opt = make(parameters)
    lr_schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: _lr_factor(s, total, schedule, warmup, final_lr))
    scaler = torch.amp.GradScaler(device.type, enabled=autocast is torch.float16 and device.type == "cuda")
    run = _Run(model, opt, lr_schedule, scaler, generator, History())
    if checkpoint is not None and Path(checkpoint).exists():
        run.load(Path(checkpoint), device)

    bar = tqdm(total=total, initial=run.step, desc=desc, disable=not progress or rank > 0 or _storing(), leave=False)
    batches = _batches(data, run.step, generator)
    while run.step < total and not run.stopped:
        batch = _to(next(batches), device)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            result = loss(runner, batch, run.state) if carry else loss(runner, batch)
        value, extra = result if isinstance(result, tuple) else (result, {})
        if carry:
            run.state, extra = _detach(extra), {}
        if not torch.isfinite(value):
            raise NonFiniteLossError(
                f"the loss is {value.item()} at step {run.step} on batch {_describe(batch)}: lower lr, set clip, or check "
                "the batch for NaN"
            )
        opt.zero_grad(set_to_none=True)
        scaler.scale(value).backward()
        if clip is not None:
            scaler.unscale_(opt)
            extra = {**extra, "grad_norm": nn.utils.clip_grad_norm_(parameters, clip)}
        scaler.step(opt)
        scaler.update()
        lr_schedule.step()
        run.history.add(run.step, loss=value.item(), **{k: float(v) for k, v in extra.items()})
        run.step += 1
        bar.update()
        if evaluate is not None and (run.step == total or (eval_every and run.step % eval_every == 0)):
            _evaluate(run, evaluate, monitor, mode, patience)
        # every process takes part in loading, so all of them must agree on when the file is there: rank 0 writes it
        if checkpoint is not None and rank == 0:
            if run.step == total or run.stopped or (checkpoint_every and run.step % checkpoint_every == 0):
                run.save(Path(checkpoint))
        bar.set_postfix_str(f"loss {value.item():.3f}", refresh=False)
    bar.close()
    if run.best_weights is not None and patience is not None:
        model.load_state_dict(run.best_weights)
    model.train(was_training)
    if world > 1:
        dist.barrier()
    return run.history


def progress_bar(items: Iterable, desc: str = "") -> Iterable:
    """Iterate with a bar that vanishes when it is done and never reaches a stored notebook."""
    return tqdm(items, desc=desc, leave=False, disable=_storing())


def _storing() -> bool:
    """Whether a chapter runs to be stored (`make execute`), where a bar would only be removed again."""
    return os.environ.get("TQDM_DISABLE", "0") not in ("", "0")


@dataclass
class _Run:
    """Everything that changes while training: what a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    generator: torch.Generator
    history: History
    step: int = 0
    state: Any = None
    best: float | None = None
    best_weights: dict[str, Tensor] | None = None
    bad_evaluations: int = 0
    stopped: bool = False

    _PARTS = ("model", "optimizer", "schedule", "scaler")
    _VALUES = ("step", "state", "best", "best_weights", "bad_evaluations", "stopped")

    def save(self, path: Path) -> None:
        """Write the checkpoint beside its place and move it there: a crash leaves the old file or the new one."""
        content = {name: getattr(self, name).state_dict() for name in self._PARTS}
        content |= {name: getattr(self, name) for name in self._VALUES}
        content |= {
            "rows": self.history.rows,
            "generator": self.generator.get_state(),
            "rng": torch.get_rng_state(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(content, file)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def load(self, path: Path, device: torch.device) -> None:
        """Continue from a checkpoint."""
        try:
            content = torch.load(path, map_location=device, weights_only=True)
            for name in self._PARTS:
                getattr(self, name).load_state_dict(content[name])
        except Exception as problem:
            raise ValueError(
                f"expected {path} to be a checkpoint of this model and optimiser, got: {problem}. Move it away to start anew"
            ) from problem
        for name in self._VALUES:
            setattr(self, name, content[name])
        self.history.rows = content["rows"]
        self.generator.set_state(content["generator"].cpu())
        torch.set_rng_state(content["rng"].cpu())


def _total_steps(steps: int | None, epochs: int | None, data: Data) -> int:
    if (steps is None) == (epochs is None):
        raise ValueError(f"expected either steps or epochs, got steps={steps} and epochs={epochs}")
    if steps is not None:
        if steps < 1:
            raise ValueError(f"expected steps >= 1, got {steps}")
        return steps
    if callable(data) or not hasattr(data, "__len__"):
        raise ValueError("expected epochs with data of known length (a list or a DataLoader), got data without len()")
    if len(data) == 0 or epochs < 1:
        raise ValueError(f"expected epochs >= 1 over at least one batch, got {epochs} epochs over {len(data)} batches")
    return epochs * len(data)


def _lr_factor(step: int, total: int, schedule: str, warmup: int, final: float) -> float:
    """The learning rate of a step as a fraction of lr."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    fall = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return final + (1 - final) * fall


def _batches(data: Data, start: int, generator: torch.Generator) -> Iterator[Any]:
    """Endless batches from `data`; on resuming, an iterable is advanced to where it was."""
    if callable(data):
        for step in itertools.count(start):
            yield data(step, generator)
    seen = 0
    while True:
        empty = True
        for batch in data:
            empty = False
            if seen >= start:
                yield batch
            seen += 1
        if empty:
            raise ValueError("expected data with at least one batch, got none (a generator can be read only once)")


def _evaluate(run: _Run, evaluate: Callable, monitor: str | None, mode: str, patience: int | None) -> None:
    run.model.eval()
    with torch.no_grad():
        metrics = {k: float(v) for k, v in evaluate(run.model).items()}
    run.model.train()
    run.history.add(run.step, **metrics)
    if monitor is None:
        return
    if monitor not in metrics:
        raise ValueError(f"expected evaluate to return {monitor!r} for monitor, got {sorted(metrics)}")
    value = metrics[monitor]
    better = run.best is None or (value < run.best if mode == "min" else value > run.best)
    if better:
        run.best, run.bad_evaluations = value, 0
        run.best_weights = {k: v.detach().clone() for k, v in run.model.state_dict().items()}
    else:
        run.bad_evaluations += 1
        run.stopped = patience is not None and run.bad_evaluations >= patience


def _join_process_group() -> tuple[int, int]:
    """Rank and number of processes; starts the group when torchrun has announced one."""
    if not dist.is_available():
        return 0, 1
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _to(batch: Any, device: torch.device) -> Any:
    return map_tensors(lambda t: t.to(device, non_blocking=True), batch)


def _detach(state: Any) -> Any:
    return map_tensors(torch.Tensor.detach, state)


def _describe(batch: Any) -> str:
    """Shapes of a batch, and where it holds NaN."""
    shapes = [
        f"{tuple(t.shape)}{' with NaN' if t.is_floating_point() and t.isnan().any() else ''}" for t in tensors_of(batch)
    ]
    return ", ".join(shapes) or type(batch).__name__
