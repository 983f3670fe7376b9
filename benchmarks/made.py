"""What benchmarks train on where the tokens do not matter."""

import numpy as np

from megatron_srft.sample import TrainingSequence


def random_rollout(random: np.random.Generator, length: int, prompt: int, vocabulary: int) -> TrainingSequence:
    """A completion of random tokens, right, with advantage 1 and log-probs of 0.

    Args:
        length: tokens, the prompt's included.
        prompt: of them in the prompt.
    """
    return TrainingSequence(
        token_ids=random.integers(0, vocabulary, length).astype(np.int32),
        prompt_length=prompt,
        is_demonstration=False,
        advantages=np.ones(length - prompt, np.float32),
        correct=True,
        group=0,
        rollout_logprobs=np.zeros(length - prompt, np.float32),
    )
