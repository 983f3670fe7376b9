"""What a person reads while a run goes on: a live table with a bar on a terminal, plain lines elsewhere."""

from collections.abc import Mapping
from typing import TextIO


def duration(seconds: float) -> str:
    """75 -> '1:15', 3675 -> '1:01:15'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: float | None, pattern: str) -> str:
    return "-" if value is None else format(value, pattern)


def cells(values: Mapping[str, float | None]) -> list[tuple[str, str]]:
    """(name, text) of what the progress line shows of one step, without what was not measured."""
    table = [
        ("reward", "reward/mean", ".3f"),
        ("accuracy", "accuracy", ".1%"),
        ("loss", "loss", ".4f"),
        ("margin", "dpo/margin", ".3f"),
        ("in order", "dpo/accuracy", ".1%"),
        ("length", "response_length/mean", ".1f"),
        ("tokens/s", "tokens/s", ",.0f"),
    ]
    shown = [(name, _number(values[key], pattern)) for name, key, pattern in table if key in values]
    pair = [values.get(f"entropy/{population}") for population in ("rollouts", "demonstrations")]
    if pair != [None, None]:
        shown.insert(2, ("entropy r/d", "/".join(_number(value, ".3f") for value in pair)))
    return shown


def stage_times(values: Mapping[str, float | None]) -> str:
    """'4.2s (generate 2.9, train 1.2)', or '' when nothing was timed."""
    parts = {key.removeprefix("time/"): value for key, value in values.items() if key.startswith("time/") and value}
    total = parts.pop("step", sum(parts.values()))
    inside = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in parts.items())
    return f"{total:.1f}s ({inside})" if inside else ""


def evaluation_text(values: Mapping[str, float | None]) -> str:
    """'heldout greedy 0.931 length 20.5; harder greedy 0.1 length 31' of the eval/ keys, or ''."""
    files: dict[str, str] = {}
    for key, value in values.items():
        if key.startswith("eval/"):
            file, _, metric = key.removeprefix("eval/").rpartition("/")
            files[file] = f"{files.get(file, file)} {metric} {_number(value, '.4g')}"
    return "; ".join(files.values())


class PlainProgress:
    """One line per step, for files and pipes."""

    def __init__(self, stream: TextIO, total_steps: int) -> None:
        self._stream, self._total = stream, total_steps

    def step(self, step: int, stage: str, values: Mapping[str, float | None], eta: float) -> None:
        words = [f"step {step + 1}/{self._total}", stage, *(f"{name} {text}" for name, text in cells(values))]
        words += [f"time {stage_times(values)}"] if stage_times(values) else []
        self.note("  ".join([*words, f"eta {duration(eta)}"]))

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        pass


class TerminalProgress:
    """A row per step under a repeated heading, and a bar with ETA and stage times below the rows."""

    HEADING_EVERY = 20

    def __init__(self, stream: TextIO, total_steps: int, start_step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._console = Console(file=stream, force_terminal=True, highlight=False)
        self._progress = Progress(
            TextColumn("[bold]{task.fields[stage]}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            console=self._console,
            auto_refresh=False,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=start_step, stage="starting", detail="")
        self._rows, self._heading = 0, ""
        self._total = total_steps
        self._progress.start()
        self._console.show_cursor(True)  # rich hides it, and a killed run would leave the terminal without one

    def step(self, step: int, stage: str, values: Mapping[str, float | None], eta: float) -> None:
        shown = [("step", f"{step + 1}/{self._total}"), *cells(values)]
        widths = [max(len(name), 13 if name.startswith("entropy") else 8) for name, _ in shown]
        heading = "  ".join(name.rjust(width) for (name, _), width in zip(shown, widths, strict=True))
        if heading != self._heading or self._rows % self.HEADING_EVERY == 0:
            self._print(heading, style="dim")
        self._heading, self._rows = heading, self._rows + 1
        self._print("  ".join(text.rjust(width) for (_, text), width in zip(shown, widths, strict=True)))
        detail = f"eta {duration(eta)}  {stage_times(values)}"
        self._progress.update(self._task, completed=step + 1, stage=stage, detail=detail, refresh=True)

    def note(self, text: str) -> None:
        self._print(text, style="cyan", overflow="fold")

    def _print(self, text: str, style: str = "", overflow: str = "crop") -> None:
        from rich.text import Text

        self._console.print(Text(text, style=style, no_wrap=overflow == "crop", overflow=overflow))

    def close(self) -> None:
        self._progress.stop()
