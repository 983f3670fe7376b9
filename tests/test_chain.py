"""SFT, PSFT, GRPO and DPO in one config: killed once in each stage, the run ends with the bits of an unbroken one."""

import json
import math
import signal
from pathlib import Path

import pytest
from runs import Run, final_weights, history, write_inputs

from megatron_srft.metrics import read_metrics

STAGES = [
    {"name": "imitate", "steps": 2, "objective": {"kind": "sft"}},
    {
        "name": "hold",
        "steps": 3,
        "objective": {"kind": "psft", "refresh_every": 3},
        "optimizer": {"lr": 0.003},
    },
    {"name": "explore", "steps": 2, "objective": {"kind": "grpo"}, "batch": {"prompts_per_step": 2}},
    {
        "name": "prefer",
        "steps": 3,
        "objective": {"kind": "dpo", "sft_coefficient": 0.1},
        "optimizer": {"lr": 0.001},
    },
]
ENDS = (2, 5, 7)
"""Steps after which a stage has ended and another begins."""

KILLED_AT = (2, 4, 7, 9)
"""The run is killed while it writes the checkpoint of this step: in each stage, and with an old policy in use."""


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """The folder of an unbroken run and of one that was killed four times."""
    folder = tmp_path_factory.mktemp("chain")
    pairs = [{"prompt": f"{i}+{i}=", "chosen": f"s{i}#{2 * i}", "rejected": f"#{2 * i + 1}"} for i in range(8)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    stages = [*STAGES[:-1], STAGES[-1] | {"data": {"train": [str(folder / "pairs.jsonl")]}}]
    config = write_inputs(folder, stages=stages, checkpoint={"every": 1, "keep": 2})

    def run(name: str, **options) -> tuple[int, str]:
        started = Run([str(config), f"name={name}"], folder / f"{name}.log", **options)
        return started.wait(), started.output

    assert run("whole") == (0, (folder / "whole.log").read_text())
    for step in KILLED_AT:
        event = ("open", f"step-{step:06d}.partial/manifest.json", signal.SIGKILL)
        assert run("killed", event=event)[0] == -signal.SIGKILL
    assert run("killed")[0] == 0
    return folder / "runs"


def test_every_stage_runs_with_its_own_data_and_learning_rate(chain):
    lines = read_metrics(chain / "whole")
    assert [line["stage"] for line in lines] == ["imitate"] * 2 + ["hold"] * 3 + ["explore"] * 2 + ["prefer"] * 3
    assert [line["lr"] for line in lines] == pytest.approx([0.01] * 2 + [0.003] * 3 + [0.01] * 2 + [0.001] * 3)
    sizes = [[line[f"count/{kind}"] for kind in ("demonstrations", "completions", "pairs")] for line in lines]
    assert sizes == [[3, 0, 0]] * 5 + [[0, 6, 0]] * 2 + [[0, 0, 3]] * 3


def test_killed_in_each_stage_it_ends_with_the_same_bits(chain):
    assert history(chain / "killed") == history(chain / "whole")
    assert final_weights(chain / "killed") == final_weights(chain / "whole")


def test_each_stage_leaves_its_model(chain):
    exports = [f"step-{step:06d}" for step in ENDS] + ["final"]
    for run in ("whole", "killed"):
        assert sorted(path.name for path in (chain / run / "hf").iterdir()) == sorted(exports)
    weights = [[(chain / run / "hf" / name / "model.safetensors").read_bytes() for name in exports] for run in
               ("whole", "killed")]  # fmt: skip
    assert weights[0] == weights[1] and len(set(weights[0])) == len(exports)


def test_dpo_begins_at_log_2_with_the_model_of_the_stage_before_as_its_reference(chain):
    first, *later = [line for line in read_metrics(chain / "whole") if line["stage"] == "prefer"]
    assert first["loss/preference"] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["dpo/margin"], first["dpo/accuracy"]) == (0, 0.5)
    assert all(line["dpo/margin"] > 1e-4 for line in later)
