"""The rewards that shape a response beyond its verdict: length, repetition."""

from megatron_srft.config import (
    CosineRewardConfig,
    LengthRewardConfig,
    OverlongRewardConfig,
    RepetitionRewardConfig,
)
from megatron_srft.rewards import lengths, repetition
from megatron_srft.rewards.responses import Response

ShapingConfig = CosineRewardConfig | LengthRewardConfig | OverlongRewardConfig | RepetitionRewardConfig


def shaped(response: Response, config: ShapingConfig) -> float | tuple[float, ...]:
    """A stream's reward before its weight: a number for the response, or one for each of its tokens."""
    assert response.token_ids is not None
    tokens, cut = response.token_ids, response.truncated
    match config:
        case CosineRewardConfig():
            return lengths.cosine(len(tokens), response.correct is True, cut, config)
        case LengthRewardConfig():
            return lengths.linear(len(tokens), cut, config)
        case OverlongRewardConfig():
            return lengths.overlong(len(tokens), cut, config)
        case RepetitionRewardConfig(mode="dense"):
            return repetition.dense(tokens, config.ngram, config.penalty)
        case RepetitionRewardConfig():
            return config.penalty * repetition.share(tokens, config.ngram)
