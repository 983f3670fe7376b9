"""Reward of a mathematical answer: found in the response, compared as text here and as mathematics in a worker."""

from collections.abc import Sequence

from megatron_srft.config import MathRewardConfig
from megatron_srft.rewards import answers
from megatron_srft.rewards.answers import Verdict
from megatron_srft.rewards.workers import Job, WorkerPool

TAIL_CHARACTERS = 1000
"""End of a response in which math-verify looks for the last number or formula when no answer is stated."""


class MathVerifier:
    """Judges responses against reference answers. Use: verifier.judge(...) each step, verifier.close() at the end.

    Most responses are settled here without a process: equal text is right, another integer or letter is wrong.
    """

    def __init__(self, config: MathRewardConfig):
        self.config = config
        self.pool = WorkerPool(config.workers, config.timeout_seconds)

    def judge(
        self, responses: Sequence[str], references: Sequence[str | None], truncated: Sequence[bool]
    ) -> list[Verdict]:
        """One verdict per response, in order.

        A truncated response must state its answer; the last number of a text cut anywhere is not an answer.
        """
        settled = [self._settle(*row) for row in zip(responses, references, truncated, strict=True)]
        verdicts = iter(self.pool.judge([result for result in settled if not isinstance(result, Verdict)]))
        return [result if isinstance(result, Verdict) else next(verdicts) for result in settled]

    def close(self) -> None:
        self.pool.close()

    def _settle(self, response: str, reference: str | None, truncated: bool) -> Verdict | Job:
        """The verdict where text is enough, else the job for a worker."""
        if reference is None or not answers.normal(reference):
            return Verdict(correct=None, status="unverifiable")
        text = after_marker(response, self.config.answer_after)
        answer = _find_answer(text, reference, truncated) if text is not None else None
        if answer is None:
            return _without_answer(text, reference, truncated)
        correct = answers.decide(answer, reference)
        if correct is not None:
            return Verdict(correct=correct, status="verified", answer=answers.canonical(answer))
        return answer, "" if truncated or answers.last_boxed(text) else text[-TAIL_CHARACTERS:], reference


def after_marker(response: str, marker: str) -> str | None:
    """What follows the last `marker`, the whole response without one, None when the marker is missing."""
    if not marker:
        return response
    _, found, text = response.rpartition(marker)
    return text if found else None


def _find_answer(text: str, reference: str, truncated: bool) -> str | None:
    """The stated answer, else the last line when it is the reference: too little to go by for anything but a match."""
    if answers.is_letter(answers.normal(reference)):
        return answers.chosen_letter(text)
    answer = answers.final_answer(text)
    if answer is None and not truncated:
        line = answers.last_line(text)
        return line if len(line) <= answers.MAX_ANSWER_CHARACTERS and answers.decide(line, reference) else None
    return answer


def _without_answer(text: str | None, reference: str, truncated: bool) -> Verdict | Job:
    wanted = answers.normal(reference)
    if text is None or truncated or not text.strip() or answers.is_letter(wanted) or answers.is_words(wanted):
        return Verdict(correct=False, status="no_answer")
    return None, text[-TAIL_CHARACTERS:], reference
