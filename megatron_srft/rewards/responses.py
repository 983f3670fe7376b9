"""One answer as the rewards see it: the response alone, with what it is measured against."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """Example: prompt="7+15=", text="7+15=22#22", token_ids=(7, 8, 2), answer="22", truncated=False."""

    prompt: str
    """The prompt as the model saw it, for judges that need the question; nothing else may look for answers in it."""

    text: str
    """The response, behind the part of it that the prompt begins (`data.generation_prefix`)."""

    token_ids: tuple[int, ...] | None
    """Tokens of the response, its end token included; None where only a text was given."""

    answer: str | None
    """The reference answer."""

    truncated: bool
    """Cut at the engine's limit."""

    correct: bool | None = None
    """The verdict on it, for rewards that come after the verifier; None where there is none."""
