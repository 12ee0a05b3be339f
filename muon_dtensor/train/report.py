"""Progress of a run on the terminal, and its report as one HTML page."""

import base64
import html
import io
import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import TrainerCallback

from muon_dtensor import Muon
from muon_dtensor.train.job import TrainConfig

CURVES = (
    ("loss", "training loss (nats per token)"),
    ("eval_loss", "test loss (nats per token)"),
    ("grad_norm", "norm of all gradients"),
    ("learning_rate", "learning rate of the matrices"),
    ("tokens_per_second", "tokens per second"),
)
"""Logged values that a report draws, with the labels of their axes."""


class Progress(TrainerCallback):  # type: ignore[misc]
    """Shows loss, tokens/s, learning rate, gradient norm, memory and remaining time on rank 0.

    A progress bar on a terminal; else one line for each logged step.
    """

    def __init__(self, config: TrainConfig, trainer: Any) -> None:
        self._config, self._trainer = config, trainer
        self._bar: Bar | None = None
        self._time, self._tokens, self._step = 0.0, 0.0, 0
        self.optimizer_seconds: list[float] = []
        self.step_seconds: list[float] = []
        self._step_start = self._optimizer_start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._time, self._step = time.perf_counter(), state.global_step
        self._tokens = self._num_tokens()
        if not state.is_world_process_zero:
            return
        print(_optimizer(self._trainer).plan.headline(), flush=True)
        console = Console()
        if console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, TextColumn("{task.description}"), console=console)
            self._bar.add_task("", total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step_start = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._optimizer_start = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.optimizer_seconds.append(time.perf_counter() - self._optimizer_start)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_seconds.append(time.perf_counter() - self._step_start)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] = {}, **_: Any
    ) -> None:
        if "loss" in logs:
            tokens, now = self._num_tokens(), time.perf_counter()
            rate = (tokens - self._tokens) / max(now - self._time, 1e-9)
            remaining = state.max_steps - state.global_step
            seconds = (now - self._time) / max(state.global_step - self._step, 1) * remaining
            self._tokens, self._time, self._step = tokens, now, state.global_step
            state.log_history[-1]["tokens_per_second"] = rate
            text = (
                f"loss {logs['loss']:.4f}  {rate:,.0f} tokens/s  lr {logs['learning_rate']:.3g}  "
                f"grad norm {logs.get('grad_norm', 0):.3g}  {memory_text()}  "
                f"{_duration(seconds)} left"
            )
        elif any(name.startswith("eval_") for name in logs):
            values = {n: v for n, v in logs.items() if n not in ("epoch", "eval_tokens")}
            text = "  ".join(f"{n.removeprefix('eval_')} {v:.4g}" for n, v in values.items())
        else:
            return
        if not state.is_world_process_zero:
            return
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=text)
        else:
            print(f"step {state.global_step}/{state.max_steps}  {text}", flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _num_tokens(self) -> float:
        """Return the number of tokens that all ranks have seen."""
        trainer = self._trainer
        seen = getattr(trainer, "_total_train_tokens", None)
        return float(trainer.state.num_input_tokens_seen if seen is None else seen)


def memory_text() -> str:
    """Return the peak memory of this process, on the GPU if there is one."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU"
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{peak / 2**30:.2f} GiB"


def write_report(folder: Path, config: TrainConfig, trainer: Any, seconds: float) -> None:
    """Write report.html: curves, final metrics, answers, the optimizer's plan, timings, config.

    Also writes timings.json: the seconds of each training step in this process, and of
    `optimizer.step()` in them.

    Args:
        folder: of the run; answers.jsonl is read from it, if there is one.
        config: of the run.
        trainer: after training.
        seconds: of this process in training.
    """
    history = trainer.state.log_history
    progress = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Progress))
    metrics = json.loads((folder / "metrics.json").read_text())
    sections = [
        ("Metrics", _table(("metric", "value"), [(n, f"{v:.6g}") for n, v in metrics.items()]))
    ]
    sections.append(("Curves", "".join(_curves(history))))
    if (folder / "answers.jsonl").exists():
        lines = (folder / "answers.jsonl").read_text().splitlines()[:8]
        rows = [json.loads(line) for line in lines]
        cells = [(row["prompt"], row["answer"], row["reference"]) for row in rows]
        sections.append(("Answers", _table(("prompt", "answer", "reference"), cells)))
    total = sum(progress.step_seconds)
    timings = [
        ("all, with loading and evaluation", _duration(seconds)),
        ("training steps in this process", _duration(total)),
        ("of them, optimizer.step()", _duration(sum(progress.optimizer_seconds))),
        ("peak memory of rank 0", memory_text()),
    ]
    sections.append(("Timings", _table(("what", "value"), timings)))
    seconds_by_step = {"step": progress.step_seconds, "optimizer": progress.optimizer_seconds}
    (folder / "timings.json").write_text(json.dumps(seconds_by_step))
    plan = _optimizer(trainer).plan
    sections.append(("Plan of the optimizer", f"<pre>{html.escape(str(plan))}</pre>"))
    text = html.escape(json.dumps(config.to_dict(), indent=1))
    sections.append(("Config", f"<pre>{text}</pre>"))
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections)
    style = (
        "body{font-family:sans-serif;max-width:70em;margin:2em auto}"
        "td,th{border:1px solid #ccc;padding:.3em;text-align:left;vertical-align:top}"
        "table{border-collapse:collapse}pre{background:#f4f4f4;padding:1em;overflow:auto}"
    )
    title = html.escape(f"{config.task}: {config.output}")
    (folder / "report.html").write_text(
        f"<!doctype html><meta charset='utf-8'><title>{title}</title><style>{style}</style>"
        f"<h1>{title}</h1>{body}"
    )


def _curves(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return an image element for each logged value."""
    from matplotlib.figure import Figure

    images = []
    for name, label in CURVES:
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if not points:
            continue
        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*points, strict=True), marker=".")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        image = io.BytesIO()
        figure.savefig(image, format="png")
        data = base64.b64encode(image.getvalue()).decode()
        images.append(f"<img alt='{label}' src='data:image/png;base64,{data}'>")
    return images


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)

    lines = [line(header, "th"), *(line(row, "td") for row in rows)]
    return "<table>" + "".join(f"<tr>{text}</tr>" for text in lines) + "</table>"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02}:{rest:02.0f}" if hours else f"{minutes}:{rest:04.1f}"


def _optimizer(trainer: Any) -> Muon:
    optimizer: Muon = trainer.muon
    return optimizer
