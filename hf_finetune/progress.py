"""What a person sees while a run is going on: a live bar on a terminal, one line per evaluation everywhere.

Results go to stdout and the bar to stderr, so that a redirected run leaves a short readable log.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hf_finetune.models.anatomy import HEAD

REFRESH_SECONDS = 0.1
SMOOTHING = 0.95


class Progress:
    """Shows how far a run is; a context manager around the loop.

    No thread draws: the bar is redrawn from `step`, at most ten times a second, so that worker processes
    forked in between can inherit no lock.
    """

    def __init__(
        self,
        total_steps: int | None,
        *,
        metric: str | None = None,
        quiet: bool = False,
        is_main: bool = True,
        console: Console | None = None,
    ) -> None:
        """Prepare to show `total_steps` optimizer steps (None: not known).

        Args:
            metric: the monitored one, shown first; the first reported when None.
            quiet: show nothing at all.
            is_main: whether this is the main process; the others show nothing.
            console: where to draw the bar; stderr, when that is a terminal, if None.
        """
        self.total_steps = total_steps
        self._metric = metric
        self._silent = quiet or not is_main
        if console is None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            console = Console(stderr=True)
        self._console = console if console is not None and console.is_terminal else None
        self._live: Live | None = None
        self._drawn = self._started = time.monotonic()
        self._step = 0
        self._first_step: int | None = None
        self._epoch, self._phase, self._doing = 0.0, "", ""
        self._loss: float | None = None
        self._loss_weight = 0.0
        self._lrs: Mapping[str, float] = {}
        self._samples_per_second: float | None = None
        self._last: float | None = None
        self._best: float | None = None

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        if self._console is not None and not self._silent:
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                # What others print goes above the bar; a redirected stdout stays redirected.
                redirect_stdout=sys.stdout.isatty(),
                vertical_overflow="crop",
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def step(
        self,
        *,
        step: int,
        epoch: float,
        phase: str,
        loss: float | None = None,
        lrs: Mapping[str, float] | None = None,
        samples_per_second: float | None = None,
    ) -> None:
        """Take in one optimizer step; what is None stays as it was (a loss may stay on the device)."""
        if self._silent:
            return
        if self._first_step is None:
            self._first_step = step - 1
        self._step, self._epoch, self._phase, self._doing = step, epoch, phase, ""
        if loss is not None:
            self._loss_weight = SMOOTHING * self._loss_weight + (1 - SMOOTHING)
            share = (1 - SMOOTHING) / self._loss_weight
            self._loss = loss if self._loss is None else self._loss + share * (loss - self._loss)
        if lrs is not None:
            self._lrs = lrs
        if samples_per_second is not None:
            self._samples_per_second = samples_per_second
        self._redraw()

    def doing(self, what: str) -> None:
        """Show what takes the time until the next step, such as `evaluating 3/40`; on a live bar only."""
        self._doing = what
        self._redraw()

    def evaluated(
        self, *, step: int, epoch: float, loss: float | None, metrics: Mapping[str, float], is_best: bool
    ) -> None:
        """Print the line of one evaluation."""
        metric = self._metric if self._metric in metrics else next(iter(metrics), None)
        self._last = metrics[metric] if metric is not None else None
        if is_best:
            self._best = self._last
        if self._silent:
            return
        total = f"/{self.total_steps}" if self.total_steps else ""
        train = f" (train {_number(self._loss)})" if self._loss is not None else ""
        others = [name for name in metrics if name != metric]
        cells = [
            f"epoch {epoch:>5.4g}",
            f"step {step:>{len(str(self.total_steps or 0))}}{total}",
            f"loss {_number(loss)}{train}",
            *(
                f"{name} {_number(metrics[name])}"
                for name in ([metric] if metric is not None else []) + others
            ),
        ]
        line = "  ".join(
            cells + ([f"[{self._phase}]"] if self._phase else []) + (["* best"] if is_best else [])
        )
        self.say(line, style="bold green" if is_best else "")
        self._doing = ""
        self._redraw(now=True)

    def say(self, text: str, style: str = "") -> None:
        """Print a line to stdout, above the bar where there is one."""
        if self._silent:
            return
        if self._live is not None and sys.stdout.isatty():
            self._live.console.print(Text(text, style=style), soft_wrap=True)
        else:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    def _redraw(self, now: bool = False) -> None:
        if self._live is None:
            return
        instant = time.monotonic()
        if now or instant - self._drawn >= REFRESH_SECONDS:
            self._drawn = instant
            self._live.update(self._picture(instant), refresh=True)

    def _picture(self, instant: float) -> Group:
        """Two lines: the bar with its times, and the figures, as many as the width holds."""
        width = self._live.console.width if self._live is not None else 80
        elapsed = instant - self._started
        done = self._step - (self._first_step or 0)
        left = elapsed / done * (self.total_steps - self._step) if done and self.total_steps else None
        times = _clock(elapsed) + (f" < {_clock(left)}" if left is not None else "")
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True, max_width=max(8, width // 4), overflow="ellipsis")
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_column(no_wrap=True)
        bar.add_row(
            Text(self._doing or self._phase, style="bold cyan"),
            ProgressBar(total=self.total_steps, completed=self._step, pulse=not self.total_steps),
            Text(f"{self._step}/{self.total_steps or '?'}"),
            Text(times, style="dim"),
        )
        return Group(bar, _fit(self._figures(), width))

    def _figures(self) -> list[tuple[str, str]]:
        """(label, value) pairs, the most telling first."""
        figures = [("epoch", f"{self._epoch:.2f}")]
        if self._loss is not None:
            figures.append(("loss", _number(self._loss)))
        if self._last is not None:
            best = f" (best {_number(self._best)})" if self._best is not None else ""
            figures.append((self._metric or "metric", _number(self._last) + best))
        rates = {name: rate for name, rate in self._lrs.items() if rate}
        if rates:
            top = HEAD if HEAD in rates else max(rates, key=lambda name: rates[name])
            low = min(rates, key=lambda name: rates[name])
            figures.append(
                ("lr", _rate(rates[top]) + (f" … {_rate(rates[low])}" if rates[low] < rates[top] else ""))
            )
        if self._samples_per_second is not None:
            figures.append(("samples/s", f"{self._samples_per_second:.3g}"))
        return figures


def _fit(figures: list[tuple[str, str]], width: int) -> Text:
    line = Text()
    for label, value in figures:
        if len(line) + len(label) + len(value) + 3 > width:
            break
        line.append(("  " if line else "") + label + " ", style="dim").append(value)
    return line


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1000 else f"{value:.4g}"


def _rate(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
