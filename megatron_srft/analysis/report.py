"""report.html: one self-contained page about a run, finished or in progress."""

from html import escape
from pathlib import Path
from typing import Any

from megatron_srft.analysis.page import element, facts, navigation, page, section, table
from megatron_srft.analysis.panels import sections
from megatron_srft.analysis.plots import NUM_COLOURS, Panel, draw
from megatron_srft.analysis.runs import Run, Series, load_run
from megatron_srft.config import RunConfig

REPORT_FILE = "report.html"
MAX_TEXT = 6000
"""Characters of a prompt, response or demonstration shown; a longer one is cut, and the report says so."""
SHORT_TEXT = 400
"""A longer demonstration is folded away."""
SAMPLED_STEPS = 3
"""Sample rollouts are shown of the first, the middle and the last sampled step."""


def write_report(run_folder: str | Path) -> Path:
    """Write report.html into a run folder from what is there so far, and return its path.

    Raises:
        ValueError: not a run folder, no metrics yet, or a damaged file; the message says what to do.
    """
    run = load_run(run_folder)
    path = run.folder / REPORT_FILE
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(render(run), encoding="utf-8", errors="xmlcharrefreplace")
    temporary.replace(path)
    return path


def render(run: Run) -> str:
    """The report's HTML."""
    parts = {"Settings": facts(settings(run)), "Evaluation": evaluation_table(run)}
    parts |= {title: plots(run, *content) for title, content in sections(run).items()}
    parts |= {"Accounting": accounting(run), "Sample rollouts": samples(run)}
    parts["Configuration"] = element(
        "details", element("summary", "Resolved configuration (config.yaml)"), element("pre", escape(run.config_text))
    )
    body = headline(run) + navigation(parts) + "".join(section(title, content) for title, content in parts.items())
    return page(f"{run.config.name} - megatron_srft run report", body)


# ---------------------------------------------------------------- headline


def headline(run: Run) -> str:
    """Name, progress, and one card per evaluation file with its primary metric before and after."""
    done, total = run.steps_done, run.total_steps
    state = f"all {total} steps finished" if done >= total else f"in progress or stopped: {done} of {total} steps done"
    methods = ", then ".join(method(config) for _, config in run.config.stage_configs())
    cards = []
    for file, metrics in run.evaluations().items():
        metric, series = next(iter(metrics.items()))
        name = "greedy accuracy" if metric == "greedy" else metric
        cards.append(card(change(series), f"{name} on {file}", series[-1][1] - series[0][1]))
    rollouts = run.series("accuracy")
    if rollouts and len(cards) < 3:
        cards.append(card(change(rollouts), "accuracy of training rollouts", rollouts[-1][1] - rollouts[0][1]))
    cards.append(card(duration(run.seconds), state))
    return (
        element("p", "megatron_srft run report", class_="overline")
        + element("h1", escape(run.config.name))
        + element("p", escape(f"{methods} on {run.config.model.path or 'an unnamed model'}"), class_="muted")
        + element("div", *cards, class_="cards")
    )


def card(value: str, label: str, direction: float = 0.0) -> str:
    style = "value" + (" up" if direction > 0 else " down" if direction < 0 else "")
    return element(
        "div", element("div", escape(value), class_=style), element("div", escape(label), class_="label"), class_="card"
    )


def change(series: Series) -> str:
    """'5.2% -> 93.1%', or one figure where only one was measured."""
    first, last = f"{series[0][1]:.1%}", f"{series[-1][1]:.1%}"
    return last if len(series) == 1 else f"{first} \N{RIGHTWARDS ARROW} {last}"


def method(config: RunConfig) -> str:
    """'srft (srft-paper)', or the kind alone for objectives without presets."""
    preset = config.objective.preset if config.objective.kind in ("grpo", "srft") else ""
    return (
        f"{config.objective.kind} ({preset})" if preset and preset != config.objective.kind else config.objective.kind
    )


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def settings(run: Run) -> dict[str, str]:
    """What one asks first about a run."""
    config = run.config
    parallel, batch, sampling, optimizer = config.parallel, config.batch, config.rollout, config.optimizer
    layout = [f"tensor {parallel.tensor}", f"pipeline {parallel.pipeline}"]
    layout += [f"context {parallel.context}"] * (parallel.context > 1)
    if ranks := run.series("ranks"):
        layout.append(f"data {round(ranks[-1][1]) // parallel.model_ranks} ({ranks[-1][1]:.0f} ranks)")
    layout += ["sequence parallel"] * parallel.sequence_parallel
    layout += ["distributed optimizer"] * parallel.distributed_optimizer
    layout += [f"{parallel.recompute} recomputation"] * (parallel.recompute != "none")
    several = len(run.config.stages) > 1
    stages = [f"{f'{name}: ' * several}{method(stage)}, {stage.steps} steps" for name, stage in config.stage_configs()]
    return {
        "Model": f"{config.model.path or '-'} ({config.model.dtype})",
        "Stages" if several else "Objective": "; ".join(stages),
        "Layout": ", ".join(layout),
        "Batch": f"{batch.prompts_per_step} prompts x {batch.rollouts_per_prompt} rollouts, "
        f"{batch.updates_per_step} update{'s' * (batch.updates_per_step > 1)} per step, "
        f"{batch.tokens_per_microbatch} tokens per micro-batch",
        "Sampling": f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, "
        f"at most {sampling.max_response_tokens} tokens",
        "Optimizer": f"AdamW, learning rate {optimizer.lr:g} ({optimizer.lr_schedule}), clip {optimizer.clip_grad:g}",
        "Rewards": ", ".join(f"{reward.kind} x {reward.weight:g}" for reward in config.rewards),
        "Training data": ", ".join(config.data.train) or "-",
        "Seed": str(config.seed),
        "Folder": str(run.folder),
    }


def evaluation_table(run: Run) -> str:
    """Every metric of every evaluation file, before and after."""
    rows = []
    for file, metrics in run.evaluations().items():
        for metric, series in metrics.items():
            (first_step, first), (last_step, last) = series[0], series[-1]
            steps = f"{first_step} \N{RIGHTWARDS ARROW} {last_step}" if len(series) > 1 else str(first_step)
            gain = f"{last - first:+.4g}" if len(series) > 1 else ""
            rows.append([file, metric, f"{first:.4g}", f"{last:.4g}", gain, steps])
    if not rows:
        return muted("No evaluation was logged; name held-out files under evaluation.files.")
    return table(["file", "metric", "first", "last", "change", "after steps"], rows, text_columns=2)


def muted(text: str) -> str:
    return element("p", escape(text), class_="muted small")


# ---------------------------------------------------------------- plots


def plots(run: Run, panels: list[Panel], missing: list[str]) -> str:
    """The section's plots, or a line naming what the run did not log."""
    last_step = max(line["step"] for line in run.lines)
    figures = [figure(panel, draw(panel, last_step, run.stage_starts())) for panel in panels]
    if not figures:
        return muted(f"Not logged in this run: {', '.join(missing)}.")
    return element("div", *figures, class_="plots")


def figure(panel: Panel, svg: str) -> str:
    chips = (element("span", element("i", style=chip(number)), escape(key)) for number, key in enumerate(panel.lines))
    caption = element("figcaption", escape(panel.note)) if panel.note else ""
    return element("figure", element("h3", escape(panel.title)), element("div", *chips, class_="legend"), svg, caption)


def chip(number: int) -> str:
    """Style of a line's mark in the legend; lines that have an earlier one's colour are dashed."""
    colour = f"var(--c{number % NUM_COLOURS})"
    dashed = f"repeating-linear-gradient(90deg, {colour} 0 4px, transparent 4px 7px)"
    return f"background:{colour if number < NUM_COLOURS else dashed}"


# ---------------------------------------------------------------- accounting and samples


def accounting(run: Run) -> str:
    """What was dropped or doubtful: sum over the run, worst step, number of steps concerned."""
    rows = []
    for key in (key for key in run.keys() if key.startswith("accounting/")):
        series = run.series(key)
        if series:
            step, worst = max(series, key=lambda point: point[1])
            concerned = sum(value > 0 for _, value in series)
            where = f"{worst:g} (step {step})" if worst else "0"
            name = key.removeprefix("accounting/").replace("_", " ")
            rows.append([name, f"{sum(v for _, v in series):g}", where, f"{concerned} of {len(series)}"])
    if not rows:
        return muted("Not logged in this run: accounting/*.")
    return table(["what", "in all", "worst step", "steps concerned"], rows)


def samples(run: Run) -> str:
    """Rollouts of the first, middle and last sampled steps."""
    steps = sorted({sample["step"] for sample in run.samples})
    if not steps:
        return muted("No sample rollouts were kept; set logging.sample_rollouts above 0.")
    chosen = sorted({steps[i * (len(steps) - 1) // (SAMPLED_STEPS - 1)] for i in range(SAMPLED_STEPS)})
    parts = []
    for step in chosen:
        here = [sample for sample in run.samples if sample["step"] == step]
        parts.append(element("h3", f"Step {step}") + "".join(sample_card(sample) for sample in here))
    return "".join(parts)


def sample_card(sample: dict[str, Any]) -> str:
    """One completion with its prompt, reward and demonstration."""
    demonstration = sample["demonstration"]
    header = [
        verdict(sample),
        f"reward {sample['reward']:g}",
        *(escape(f"{name} {value:g}") for name, value in sample["streams"].items()),
        f"{sample['response_tokens']} tokens",
        "ended by itself" if sample["finish_reason"] == "stop" else "cut at the length limit",
        "rewards of the group: " + " ".join(f"{reward:g}" for reward in sample["group_rewards"]),
        escape(f"{sample['source']}, {sample['prompt_id']}"),
    ]
    rows = {"prompt": sample["prompt"], "response": sample["response"], "reference answer": sample["answer"]}
    exchange = "".join(
        element("span", name) + element("pre", clipped(text)) for name, text in rows.items() if text is not None
    )
    if demonstration:
        shown = element("pre", clipped(demonstration["text"]))
        if len(demonstration["text"]) > SHORT_TEXT:
            shown = element("details", element("summary", f"{len(demonstration['text'])} characters"), shown)
        exchange += element("span", f"demonstration, {demonstration_state(demonstration)}") + shown
    return element(
        "article",
        element("header", *(element("span", part) for part in header)),
        element("div", exchange, class_="exchange"),
        class_="sample",
    )


def verdict(sample: dict[str, Any]) -> str:
    """The verifier's word as a coloured badge."""
    if sample["correct"] is None:
        return element("span", escape(sample["status"].replace("_", " ")), class_="badge")
    text, style = ("correct", "badge good") if sample["correct"] else ("wrong", "badge bad")
    return element("span", text + (", no answer found" * (sample["status"] == "no_answer")), class_=style)


def demonstration_state(demonstration: dict[str, Any]) -> str:
    if demonstration["truncated"]:
        return "cut, earns no reward"
    return f"reward {demonstration['reward']:g}" if "reward" in demonstration else "not scored"


def clipped(text: str) -> str:
    """Escaped text, cut at MAX_TEXT characters."""
    return (
        escape(text)
        if len(text) <= MAX_TEXT
        else f"{escape(text[:MAX_TEXT])}\n[{len(text) - MAX_TEXT} more characters]"
    )
