"""Rewards put together: every configured stream on every answer, their weighted sum, the verdict, and the counts.

    reward  = sum over streams of weight * value
    correct = verdict of the first verifier (math or exact) and every format gate

Completions and demonstrations go through the same verifier; a demonstration is not taken to be right. All of it is
local to this process: in a distributed run each rank scores its own share.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from megatron_srft.config import ExactRewardConfig, FormatRewardConfig, MathRewardConfig, RewardConfig
from megatron_srft.rewards import exact, format
from megatron_srft.rewards.answers import Verdict
from megatron_srft.rewards.math import MathVerifier
from megatron_srft.rewards.workers import VerifierError
from megatron_srft.sample import Group, Score

STATUSES = ("verified", "no_answer", "unverifiable", "timeout", "crash")

SELF_TEST = (
    ("204", "204", True), ("205", "204", False), ("1,234", "1234", True), ("C", "C", True), ("D", "C", False),
    (r"\frac{1}{2}", "0.5", True), (r"\frac{2}{3}", r"\frac{3}{4}", False), (r"2\sqrt{3}", r"\sqrt{12}", True),
    ("(2, 1)", "(1, 2)", False), ("x+1", "1+x", True), ("x+1", "1-x", False), ("3, 1, 2", "1,2,3", True),
    (r"\frac{\pi}{3}", r"\frac{\pi}{2}", False),
)  # fmt: skip
"""(answer, reference, right): from plain text to what only sympy can tell."""

Streams = dict[str, RewardConfig]


class Scorer:
    """Scores answers. Use as a context manager, or call close(): it owns the processes of the math verifiers.

    with Scorer(config.rewards) as scorer:
        scorer.self_test()
        groups = scorer.score(groups)          # every step
        scorer.accounting()                    # totals so far
    """

    def __init__(self, configs: tuple[RewardConfig, ...]):
        self.streams = name_streams(configs)
        self._verifiers = {
            name: MathVerifier(config) for name, config in self.streams.items() if isinstance(config, MathRewardConfig)
        }
        self._counts: Counter[str] = Counter()

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """End the verifier's processes."""
        for verifier in self._verifiers.values():
            verifier.close()

    # ------------------------------------------------------------ scoring

    def score(self, groups: list[Group]) -> list[Group]:
        """The groups with a score for every completion and for every demonstration that was not truncated.

        What is scored is the prompt's response_prefix + the text, because a format may begin in the prompt. A
        completion cut at the length limit is right only when it states its answer before the cut.
        """
        texts, references, truncated = [], [], []
        for group in groups:
            members = [(c.text, c.finish_reason == "length") for c in group.completions]
            if has_scored_demonstration(group):
                members.append((group.demonstration.text, False))
            texts += [group.prompt.response_prefix + text for text, _ in members]
            references += [group.prompt.answer] * len(members)
            truncated += [cut for _, cut in members]
        scores = iter(self.verify(texts, references, truncated))
        return [
            replace(
                group,
                scores=tuple(next(scores) for _ in group.completions),
                demonstration_score=next(scores) if has_scored_demonstration(group) else None,
            )
            for group in groups
        ]

    def verify(
        self, texts: Sequence[str], answers: Sequence[str | None], truncated: Sequence[bool] | None = None
    ) -> list[Score]:
        """Score whole responses against reference answers, in order.

        texts: responses with their response_prefix, never the prompt. answers: references; None is unverifiable.
        truncated: responses cut at a length limit (default none).
        """
        scores = self._scores(texts, answers, [False] * len(texts) if truncated is None else truncated)
        for score in scores:
            self._counts[f"status/{score.status}"] += 1
            self._counts["correct"] += score.correct is True
            self._counts["wrong"] += score.correct is False and score.status == "verified"
        return scores

    def accounting(self) -> dict[str, int]:
        """Totals since construction, the self-test left out; failures of the verifier apart from wrong answers.

        scored = correct + wrong + no_answer + unverifiable + timeout + crash, as long as there is a verifier. gated of
        the wrong ones have a right answer and a wrong format. worker_restarts counts processes replaced.
        """
        counts = {"scored": sum(self._counts[f"status/{status}"] for status in STATUSES)}
        counts |= {name: self._counts[name] for name in ("correct", "wrong", "gated")}
        counts |= {status: self._counts[f"status/{status}"] for status in STATUSES[1:]}
        counts["worker_restarts"] = sum(verifier.pool.restarts for verifier in self._verifiers.values())
        return counts

    def self_test(self) -> None:
        """Verify known right and wrong answers through the very processes that training will use.

        Raises VerifierError, with what went wrong, when a verdict is not the known one.
        """
        for name, config in self.streams.items():
            if isinstance(config, FormatRewardConfig):
                continue
            marker = f"{config.answer_after} " if config.answer_after else ""
            wrap = "The final answer is $\\boxed{{{}}}$." if config.kind == "math" else "{}"
            pairs = SELF_TEST if config.kind == "math" else [p for p in SELF_TEST if p[0] == p[1] or not p[2]]
            texts = [marker + wrap.format(answer) for answer, _, _ in pairs]
            verdicts = self._judge(name, texts, [reference for _, reference, _ in pairs], [False] * len(pairs))
            failures = [
                f"{answer} against {reference}: {verdict.status}, correct={verdict.correct}"
                for (answer, reference, right), verdict in zip(pairs, verdicts, strict=True)
                if verdict.correct is not right
            ]
            if failures:
                raise VerifierError(f"rewards.{name}: the verifier returns wrong verdicts: {'; '.join(failures)}")

    # ------------------------------------------------------------ one batch

    def _scores(self, texts: Sequence[str], answers: Sequence[str | None], truncated: Sequence[bool]) -> list[Score]:
        matched = {
            name: format.matches(texts, config)
            for name, config in self.streams.items()
            if isinstance(config, FormatRewardConfig)
        }
        gates = [found for name, found in matched.items() if self.streams[name].gate]
        passed = [all(gate[i] for gate in gates) for i in range(len(texts))]
        verdicts = {name: self._judge(name, texts, answers, truncated) for name in self.streams if name not in matched}
        return [
            self._score(
                {name: column[i] for name, column in matched.items()},
                {name: column[i] for name, column in verdicts.items()},
                passed[i],
            )
            for i in range(len(texts))
        ]

    def _score(self, matched: dict[str, bool], verdicts: dict[str, Verdict], passed: bool) -> Score:
        values = {}
        for name, config in self.streams.items():
            if isinstance(config, FormatRewardConfig):
                values[name] = config.matched if matched[name] else config.unmatched
            else:
                values[name] = config.correct if passed and verdicts[name].correct else config.wrong
        verdict = next(iter(verdicts.values()), Verdict(correct=None, status="verified"))
        gated = verdict.correct is True and not passed
        self._counts["gated"] += gated
        return Score(
            reward=sum(self.streams[name].weight * value for name, value in values.items()),
            streams=values,
            correct=False if gated else verdict.correct,
            status=verdict.status,
            answer=verdict.answer,
        )

    def _judge(
        self, name: str, texts: Sequence[str], answers: Sequence[str | None], truncated: Sequence[bool]
    ) -> list[Verdict]:
        config = self.streams[name]
        if isinstance(config, ExactRewardConfig):
            return [exact.judge(text, answer, config) for text, answer in zip(texts, answers, strict=True)]
        return self._verifiers[name].judge(texts, answers, truncated)


def name_streams(configs: Sequence[RewardConfig]) -> Streams:
    """A name per reward: its kind, with _2, _3, ... from the second of a kind on."""
    streams: Streams = {}
    for config in configs:
        seen = sum(other.kind == config.kind for other in streams.values())
        streams[config.kind if seen == 0 else f"{config.kind}_{seen + 1}"] = config
    return streams


def has_scored_demonstration(group: Group) -> bool:
    return group.demonstration is not None and not group.demonstration.truncated
