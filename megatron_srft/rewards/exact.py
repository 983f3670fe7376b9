"""Reward of an exact answer: the text behind a marker equals the reference, up to surrounding white space."""

from megatron_srft.config import ExactRewardConfig
from megatron_srft.rewards.answers import Verdict
from megatron_srft.rewards.math import after_marker


def judge(response: str, reference: str | None, config: ExactRewardConfig) -> Verdict:
    """Compare what follows the last `config.answer_after` (empty: the whole response) with the reference."""
    if reference is None:
        return Verdict(correct=None, status="unverifiable")
    text = after_marker(response, config.answer_after)
    answer = _comparable(text, config) if text is not None else ""
    if not answer:
        return Verdict(correct=False, status="no_answer")
    return Verdict(correct=answer == _comparable(reference, config), status="verified", answer=answer)


def _comparable(text: str, config: ExactRewardConfig) -> str:
    return text.strip().casefold() if config.ignore_case else text.strip()
