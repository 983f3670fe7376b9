"""`megatron-srft generate` against the engine asked by hand, over ranks, and read back as a replay."""

import json

import numpy as np
import pytest
from spawning import spawn
from tiny_models import make_model

from megatron_srft import cli
from megatron_srft.config import DataConfig, ModelConfig, SamplingConfig
from megatron_srft.data import load_problems
from megatron_srft.generate_command import STREAM, summary
from megatron_srft.rollout import Request, load_dump, load_local_engine, load_tokenizer
from megatron_srft.rollout.replay import ReplayEngine
from megatron_srft.sample import Completion, Group, Prompt, Score

OPTIONS = ["--samples", "3", "--max-response-tokens", "6", "--seed", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, problems whose answer is what the model says in its second sample, and one without an answer."""
    folder = tmp_path_factory.mktemp("generate")
    make_model("qwen2", folder / "model", tied=True, max_position_embeddings=64)
    write(folder / "problems.jsonl", ["?"] * 5)
    answers = [completion.text for completion in by_hand(folder)[1::3]]
    write(folder / "problems.jsonl", [*answers[:4], None])
    return folder


def write(path, answers):
    rows = [{"id": f"q{i}", "prompt": f"{i}+{i}="} | ({"answer": a} if a else {}) for i, a in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def by_hand(folder):
    model = ModelConfig(path=str(folder / "model"))
    tokenizer = load_tokenizer(model)
    problems = load_problems([str(folder / "problems.jsonl")], DataConfig(), tokenizer, need_answers=False)
    requests = [Request(prompt=p, sample=s, seed=4, step=STREAM) for p in problems.prompts for s in range(3)]
    engine = load_local_engine(model, tokenizer, "cpu", 4)
    return engine.generate(requests, SamplingConfig(max_response_tokens=6))


def run(folder, output, *more):
    arguments = ["generate", folder / "model", folder / "problems.jsonl", "--output", output, *OPTIONS, *more]
    return cli.main([str(a) for a in arguments])


def test_answers_are_the_engines_and_verdicts_are_right(folder, capsys):
    path = folder / "dumps" / "step-000007.jsonl.zst"
    assert run(folder, path, "--reward", "exact") == 0
    groups, wanted = load_dump(path), by_hand(folder)
    found = [completion for group in groups for completion in group.completions]
    assert all(
        np.array_equal(a.token_ids, b.token_ids) and a.text == b.text for a, b in zip(found, wanted, strict=True)
    )
    verdicts = [score.correct for group in groups[:4] for score in group.scores]
    assert verdicts == [c.text.strip() == g.prompt.answer.strip() for g in groups[:4] for c in g.completions]
    assert {score.status for score in groups[4].scores} == {"unverifiable"}
    out = capsys.readouterr().out
    share = sum(verdicts) / 12
    assert f"accuracy {share:.1%}  (3 answers without a verdict left out)  problems 5  answers 15" in out
    assert "unverifiable 3" in out and str(path) in out
    # A run with rollout.kind replay would get these very completions.
    request = Request(prompt=groups[2].prompt, sample=0, seed=0, step=7)
    replayed = ReplayEngine(path.parent).generate([request, request, request], SamplingConfig())
    assert np.array_equal(replayed[0].token_ids, wanted[6].token_ids)


def in_two_ranks(folder, output):
    status = run(folder, output, "--reward", "exact")
    return status


def test_two_ranks_write_what_one_writes(folder):
    outputs = [folder / "one.jsonl", folder / "two.jsonl"]
    assert run(folder, outputs[0], "--reward", "exact") == 0
    assert spawn(2, in_two_ranks, folder, outputs[1]) == [0, 0]
    assert outputs[0].read_text() == outputs[1].read_text()


def test_summary_counts_by_hand():
    def group(verdicts, reasons, statuses):
        prompt = Prompt(id="p", text="", token_ids=np.zeros(1, np.int32), answer="1", source="s")
        nothing = dict(token_ids=np.zeros(1, np.int32), text="", rollout_logprobs=np.zeros(1, np.float32))
        return Group(
            prompt=prompt,
            completions=tuple(Completion(**nothing, finish_reason=r, policy_version=0) for r in reasons),
            scores=tuple(Score(reward=0.0, correct=v, status=s) for v, s in zip(verdicts, statuses, strict=True)),
        )

    groups = [
        group([True, False, False], ["stop", "length", "stop"], ["verified", "no_answer", "verified"]),
        group([None, True, True], ["length", "stop", "stop"], ["timeout", "verified", "verified"]),
    ]
    assert summary(groups) == (
        "accuracy 60.0%  (1 answers without a verdict left out)  problems 2  answers 6  "
        "problems with right and wrong answers 1  truncated 2  without a final answer 1  unverifiable 0  "
        "verifier failures 1"
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output", "x.json"], "the name of a rollout dump ends in .jsonl.zst"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--temperature", "0"], "would be one answer"),
        (["--answer-after", "#"], "--answer-after needs --reward"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--head", "head"], "the local engine reads no hidden states; add --engine vllm"),
    ],
)
def test_mistakes_are_told_before_anything_is_sampled(folder, more, message, capsys):
    assert run(folder, folder / "never.jsonl", *more) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "never.jsonl").exists()
