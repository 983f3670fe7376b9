"""report.html from real run folders: what stands in it, what may not, and what a user is told."""

import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from megatron_srft import config as configuration
from megatron_srft.analysis import log_samples, write_report
from megatron_srft.analysis.runs import load_run
from megatron_srft.metrics import MetricSink
from megatron_srft.sample import Completion, Demonstration, Group, Prompt, Score

ATTACK = "<script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)>&amp;\"'"
VOID = {"meta", "br", "img", "input", "link", "hr"}


class Page(HTMLParser):
    """Tags, attributes and visible text of a document; complains about tags that do not match."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.text, self.stack = [], [], [], []
        self.feed(html)
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


def write_config(folder, **tree):
    folder.mkdir(parents=True, exist_ok=True)
    config = configuration.from_dict({"name": folder.name, "run_dir": str(folder.parent), "steps": 4, **tree})
    text = configuration.to_yaml(config if config.stages else config.resolved())
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    return config


def open_sink(folder, config):
    return MetricSink(folder, config.logging, total_steps=4, stream=io.StringIO())


def attacked_group() -> Group:
    token_ids = np.zeros(3, np.int32)
    return Group(
        prompt=Prompt(id=f"id{ATTACK}", text=f"prompt{ATTACK}", token_ids=token_ids, answer=ATTACK, source=ATTACK),
        completions=(
            Completion(
                token_ids=token_ids,
                text=f"response{ATTACK}\udcff",
                rollout_logprobs=np.zeros(3, np.float32),
                finish_reason="length",
                policy_version=0,
            ),
        ),
        demonstration=Demonstration(token_ids=token_ids, text=f"demonstration{ATTACK}" + "x" * 7000),
        scores=(Score(reward=0.5, streams={ATTACK: 0.5}, correct=None, status="timeout"),),
        demonstration_score=Score(reward=1.0, correct=True),
    )


def full_step(step: int) -> dict[str, float]:
    keys = [
        "reward/mean", "reward/math", "accuracy", "demonstration_solved", "groups/all_correct", "groups/none_correct",
        "groups/without_signal", "entropy/rollouts", "entropy/demonstrations", "weight/rl", "weight/sft",
        "weight_sft/max",
        "loss", "loss/sft", "loss/rl_positive", "nll/rollouts", "response_length/mean", "truncated_share",
        "clip_fraction/low", "clip_fraction/high", "ratio/mean", "ratio/max", "kl/k1", "kl/k3", "mismatch/mean",
        "mismatch/max",
        "parity/mean_difference", "parity/max_difference", "parity/ratio_p99", "grad_norm", "lr", "time/generate",
        "time/train", "tokens/s",
        "invented/figure", "$\\frac{",
    ]  # fmt: skip
    return {key: (number + 1) / (step + 2) for number, key in enumerate(keys)} | {"time/step": 100.0}


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "full"
    config = write_config(
        folder,
        model={"path": "models/tiny"},
        parallel={"tensor": 2},
        objective={"kind": "srft", "preset": "srft-paper"},
    )
    with open_sink(folder, config) as sink:
        for step in range(4):
            if step in (0, 2):
                values = {"eval/a<b>/length": 7.0, "eval/a<b>/greedy": 0.0625 + step / 4}
                sink.log(step, values, "srft")
            accounting = {"accounting/timeout": [0, 3, 5, 1][step], "accounting/crash": 0}
            sink.log(step, {**full_step(step), **accounting, "ranks": 4}, "srft")
            log_samples(folder, step, [attacked_group()], 2)
        sink.log(4, {"eval/a<b>/length": 6.0, "eval/a<b>/greedy": 0.9375}, "srft")
    return folder


@pytest.fixture(scope="module")
def full_html(full_run):
    return write_report(full_run).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def full_page(full_html):
    return Page(full_html)


def test_every_metric_of_a_step_is_in_the_report(full_page):
    shown_elsewhere = {"time/step"}
    for key in set(full_step(0)) - shown_elsewhere:
        assert key in full_page.words, key
    labels = " ".join(value for name, value in full_page.attributes if name == "aria-label")
    for key in set(full_step(0)) - shown_elsewhere:
        assert key in labels, f"{key} is in no plot"


def test_headline_names_method_layout_and_accuracy_before_and_after(full_page):
    for text in (
        "full", "srft (srft-paper) on models/tiny", "6.2% \N{RIGHTWARDS ARROW} 93.8%", "greedy accuracy on a<b>",
        "all 4 steps finished", "tensor 2, pipeline 1, data 2 (4 ranks)", "6 min 40 s",
    ):  # fmt: skip
        assert text in full_page.words, text


def test_evaluation_and_accounting_tables_hold_the_right_figures(full_page):
    assert "a<b> greedy 0.0625 0.9375 +0.875 0 \N{RIGHTWARDS ARROW} 4" in full_page.words
    assert "a<b> length 7 6 -1 0 \N{RIGHTWARDS ARROW} 4" in full_page.words
    assert "timeout 9 5 (step 2) 3 of 4" in full_page.words
    assert "crash 0 0 0 of 4" in full_page.words


def test_rollouts_are_shown_as_text_and_never_as_markup(full_page):
    assert not {"script", "img", "iframe", "object", "link"} & set(full_page.tags)
    assert not [name for name, _ in full_page.attributes if name.startswith("on")]
    for part in ("prompt", "response", "demonstration"):
        assert part + ATTACK in full_page.words
    assert "timeout" in full_page.words and "cut at the length limit" in full_page.words
    assert "more characters]" in full_page.words


def test_nothing_is_loaded_from_elsewhere(full_html, full_page):
    for name, value in full_page.attributes:
        assert name not in ("src", "data", "srcset", "action"), (name, value)
        if name in ("href", "xlink:href"):
            assert value.startswith("#"), value
    style = full_html[full_html.index("<style>") : full_html.index("</style>")]
    assert "url(" not in style and "@import" not in style
    targets = {value for name, value in full_page.attributes if name == "id"}
    assert {value[1:] for name, value in full_page.attributes if name == "href"} <= targets


def test_the_resolved_config_in_the_page_can_be_run_again(full_run, full_page, tmp_path):
    shown = next(text for text in full_page.text if text.startswith("name: full"))
    (tmp_path / "config.yaml").write_text(shown)
    assert configuration.load(tmp_path / "config.yaml") == configuration.load(full_run / "config.yaml")


def test_a_run_in_progress_with_only_a_first_evaluation(tmp_path):
    config = write_config(tmp_path / "young")
    with open_sink(tmp_path / "young", config) as sink:
        sink.log(0, {"eval/heldout/avg@4": 0.25, "eval/heldout/pass@4": 0.5}, "srft")
    words = Page(write_report(tmp_path / "young").read_text()).words
    assert "in progress or stopped: 0 of 4 steps done" in words and "25.0% avg@4 on heldout" in words
    assert "Not logged in this run: loss, loss/*, nll/rollouts" in words
    assert "No sample rollouts were kept" in words


def test_stage_boundaries_are_marked_and_both_stages_named(tmp_path):
    stages = [
        {"name": "imitate", "steps": 2, "objective": {"kind": "sft"}},
        {"name": "reinforce", "steps": 2, "objective": {"kind": "grpo", "preset": "dapo"}},
    ]
    config = write_config(tmp_path / "two", stages=stages)
    with open_sink(tmp_path / "two", config) as sink:
        for step in range(4):
            sink.log(step, {"loss": 1.0 + step}, "imitate" if step < 2 else "reinforce")
    assert load_run(tmp_path / "two").stage_starts() == [(0, "imitate"), (2, "reinforce")]
    page = Page(write_report(tmp_path / "two").read_text())
    assert "imitate: sft, 2 steps; reinforce: grpo (dapo), 2 steps" in page.words
    assert page.text.count("reinforce") == 1  # the mark in the one plot; elsewhere it stands inside longer texts


def test_a_metric_that_was_never_finite_is_no_plot_and_no_error(tmp_path):
    config = write_config(tmp_path / "nan")
    with open_sink(tmp_path / "nan", config) as sink:
        sink.log(0, {"loss": float("nan"), "grad_norm": 1.0, "eval/a/greedy": float("inf")}, "srft")
    words = Page(write_report(tmp_path / "nan").read_text()).words
    assert "nonfinite metrics 2 2 (step 0) 1 of 1" in words


@pytest.mark.parametrize("make, message", [
    (lambda folder: None, r"not a run folder: it does not exist; pass the folder of a run"),
    (lambda folder: folder.mkdir(), r"not a run folder: it has no config\.yaml; pass the folder of a run"),
    (write_config, r"has no metrics yet; run `megatron-srft train"),
])  # fmt: skip
def test_what_is_no_run_is_refused_with_a_remedy(tmp_path, make, message):
    make(tmp_path / "folder")
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "folder")
