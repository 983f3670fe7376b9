"""Rewards put together: every configured stream on every answer, their weighted sum, the verdict, and the counts.

    reward  = sum over streams of weight * value          (of a dense stream: the sum of its values)
    correct = verdict of the first verifier (math, exact or judge) and every format gate

A stream is a verifier, a format, or shapes the response by its tokens and its verdict (shaping.py, and users'
functions).

Completions and demonstrations go through the same verifier; a demonstration is not taken to be right. All of it is
local to this process: in a distributed run each rank scores its own share.
"""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from megatron_srft.config import (
    VERIFIERS,
    CosineRewardConfig,
    ExactRewardConfig,
    FormatRewardConfig,
    FunctionRewardConfig,
    JudgeRewardConfig,
    MathRewardConfig,
    RewardConfig,
    name_streams,
)
from megatron_srft.rewards import exact, format
from megatron_srft.rewards.answers import Verdict
from megatron_srft.rewards.functions import RewardFunction
from megatron_srft.rewards.judge import JudgeVerifier
from megatron_srft.rewards.math import MathVerifier
from megatron_srft.rewards.responses import Response
from megatron_srft.rewards.shaping import ShapingConfig, shaped
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

log = logging.getLogger(__name__)


class Scorer:
    """Scores answers. Use as a context manager, or call close(): it owns the processes of the math verifiers.

    with Scorer(config.rewards) as scorer:
        scorer.self_test()
        groups = scorer.score(groups)          # every step
        scorer.accounting()                    # totals so far
    """

    def __init__(self, configs: tuple[RewardConfig, ...]):
        self.streams = {name: config for name, config in name_streams(configs).items() if config.kind != "swift"}
        """What an answer's text and tokens earn; a hidden-state reward is merged in later (hidden_stream/)."""
        unresolved = [name for name, config in self.streams.items() if getattr(config, "max_tokens", 0) is None]
        assert not unresolved, f"rewards.{unresolved} have no limit; use a resolved config"
        self._judges = {
            name: JudgeVerifier(name, config)
            for name, config in self.streams.items()
            if isinstance(config, JudgeRewardConfig)
        }
        self._functions = {
            name: RewardFunction(name, config)
            for name, config in self.streams.items()
            if isinstance(config, FunctionRewardConfig)
        }
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
        for verifier in (*self._verifiers.values(), *self._judges.values()):
            verifier.close()

    # ------------------------------------------------------------ scoring

    def score(self, groups: list[Group]) -> list[Group]:
        """The groups with a score for every completion and for every demonstration that was not truncated.

        What is scored is the prompt's response_prefix + the text, because a format may begin in the prompt. A
        completion cut at the length limit is right only when it states its answer before the cut.
        """
        responses = [response for group in groups for response in _responses(group)]
        scores = iter(self._counted(responses))
        return [
            replace(
                group,
                scores=tuple(next(scores) for _ in group.completions),
                demonstration_score=next(scores) if has_scored_demonstration(group) else None,
            )
            for group in groups
        ]

    def verify(
        self,
        texts: Sequence[str],
        answers: Sequence[str | None],
        truncated: Sequence[bool] | None = None,
        token_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[Score]:
        """Score whole responses against reference answers, in order.

        texts: responses with their response_prefix, never the prompt. answers: references; None is unverifiable.
        truncated: responses cut at a length limit (default none). token_ids: the responses' tokens.

        Raises ValueError when a reward counts tokens and there are none.
        """
        cut = [False] * len(texts) if truncated is None else truncated
        tokens = [None] * len(texts) if token_ids is None else [tuple(ids) for ids in token_ids]
        return self._counted(
            [
                Response(prompt="", text=text, token_ids=ids, answer=answer, truncated=at_limit)
                for text, answer, at_limit, ids in zip(texts, answers, cut, tokens, strict=True)
            ]
        )

    def _counted(self, responses: list[Response]) -> list[Score]:
        scores = self._scores(responses)
        for score in scores:
            self._counts[f"status/{score.status}"] += 1
            self._counts["correct"] += score.correct is True
            self._counts["wrong"] += score.correct is False and score.status == "verified"
        return scores

    def accounting(self) -> dict[str, int]:
        """Totals since construction, the self-test left out; failures of the verifier apart from wrong answers.

        scored = correct + wrong + no_answer + unverifiable + timeout + crash, as long as there is a verifier. gated of
        the wrong ones have a right answer and a wrong format. worker_restarts counts processes replaced,
        <stream>/failed the answers on which a user's function failed; judge.py has the counts of a judge.
        """
        counts = {"scored": sum(self._counts[f"status/{status}"] for status in STATUSES)}
        counts |= {name: self._counts[name] for name in ("correct", "wrong", "gated")}
        counts |= {status: self._counts[f"status/{status}"] for status in STATUSES[1:]}
        counts |= {f"{name}/failed": function.failed for name, function in self._functions.items()}
        for judge in self._judges.values():
            counts |= judge.accounting()
        counts["worker_restarts"] = sum(verifier.pool.restarts for verifier in self._verifiers.values())
        return counts

    def self_test(self) -> None:
        """Verify known right and wrong answers through the very processes that training will use.

        Raises VerifierError, with what went wrong, when a verdict is not the known one; ValueError when a user's
        function fails.
        """
        for name, config in self.streams.items():
            if isinstance(config, CosineRewardConfig) and config.correct_at_zero < config.correct_at_limit:
                log.warning("rewards.%s: right answers earn more the longer they are, so lengths may explode", name)
            if isinstance(config, FunctionRewardConfig):
                self._functions[name].self_test()
            if isinstance(config, JudgeRewardConfig):
                self._judges[name].self_test()
            if not isinstance(config, (MathRewardConfig, ExactRewardConfig)):
                continue
            marker = f"{config.answer_after} " if config.answer_after else ""
            wrap = "The final answer is $\\boxed{{{}}}$." if config.kind == "math" else "{}"
            pairs = SELF_TEST if config.kind == "math" else [p for p in SELF_TEST if p[0] == p[1] or not p[2]]
            texts = [marker + wrap.format(answer) for answer, _, _ in pairs]
            responses = [
                Response(prompt="", text=text, token_ids=None, answer=reference, truncated=False)
                for text, (_, reference, _) in zip(texts, pairs, strict=True)
            ]
            verdicts = self._judge(name, responses)
            failures = [
                f"{answer} against {reference}: {verdict.status}, correct={verdict.correct}"
                for (answer, reference, right), verdict in zip(pairs, verdicts, strict=True)
                if verdict.correct is not right
            ]
            if failures:
                raise VerifierError(f"rewards.{name}: the verifier returns wrong verdicts: {'; '.join(failures)}")

    # ------------------------------------------------------------ one batch

    def _scores(self, responses: list[Response]) -> list[Score]:
        texts = [response.text for response in responses]
        matched = {
            name: format.matches(texts, config)
            for name, config in self.streams.items()
            if isinstance(config, FormatRewardConfig)
        }
        gates = [found for name, found in matched.items() if self.streams[name].gate]
        passed = [all(gate[i] for gate in gates) for i in range(len(texts))]
        verdicts = {name: self._judge(name, responses) for name, c in self.streams.items() if c.kind in VERIFIERS}
        return [
            self._score(
                response,
                {name: column[i] for name, column in matched.items()},
                {name: column[i] for name, column in verdicts.items()},
                passed[i],
            )
            for i, response in enumerate(responses)
        ]

    def _score(self, response: Response, matched: dict[str, bool], verdicts: dict[str, Verdict], passed: bool) -> Score:
        verdict = next(iter(verdicts.values()), Verdict(correct=None, status="verified"))
        gated = verdict.correct is True and not passed
        self._counts["gated"] += gated
        judged = replace(response, correct=False if gated else verdict.correct)
        values: dict[str, float | tuple[float, ...]] = {}
        for name, config in self.streams.items():
            if name in matched:
                values[name] = config.matched if matched[name] else config.unmatched
            elif name in verdicts:
                values[name] = config.correct if passed and verdicts[name].correct else config.wrong
            else:
                values[name] = self._shaped(name, config, judged)
        dense = {name: value for name, value in values.items() if isinstance(value, tuple)}
        totals = {name: math.fsum(value) if name in dense else value for name, value in values.items()}
        return Score(
            reward=sum(self.streams[name].weight * value for name, value in totals.items()),
            streams=totals,
            dense=dense,
            correct=judged.correct,
            status=verdict.status,
            answer=verdict.answer,
        )

    def _shaped(
        self, name: str, config: ShapingConfig | FunctionRewardConfig, response: Response
    ) -> float | tuple[float, ...]:
        needs_tokens = not isinstance(config, FunctionRewardConfig) or config.dense
        if needs_tokens and response.token_ids is None:
            raise ValueError(f"rewards.{name} counts tokens, and this response has only a text; pass its token_ids")
        if isinstance(config, FunctionRewardConfig):
            return self._functions[name](response)
        return shaped(response, config)

    def _judge(self, name: str, responses: list[Response]) -> list[Verdict]:
        config = self.streams[name]
        if isinstance(config, ExactRewardConfig):
            return [exact.judge(response.text, response.answer, config) for response in responses]
        if isinstance(config, JudgeRewardConfig):
            return self._judges[name].judge(responses)
        return self._verifiers[name].judge(
            [response.text for response in responses],
            [response.answer for response in responses],
            [response.truncated for response in responses],
        )


def _responses(group: Group) -> list[Response]:
    """A group's completions and then its demonstration, where that is scored."""
    members = [(c.text, c.token_ids, c.finish_reason == "length") for c in group.completions]
    if has_scored_demonstration(group):
        members.append((group.demonstration.text, group.demonstration.token_ids, False))
    return [
        Response(
            prompt=group.prompt.text,
            text=group.prompt.response_prefix + text,
            token_ids=tuple(token_ids.tolist()),
            answer=group.prompt.answer,
            truncated=truncated,
        )
        for text, token_ids, truncated in members
    ]


def has_scored_demonstration(group: Group) -> bool:
    return group.demonstration is not None and not group.demonstration.truncated
