"""A verdict from a language model behind an OpenAI-compatible endpoint (endpoint.py says what is tried again).

The judge is asked greedily, once per different answer, and must end with `Judgement: correct`, `wrong` or `not_found`;
the last such line counts. Whatever else happens is no verdict, never a wrong answer:

    timeout     no complete reply within timeout_seconds, in every attempt
    crash       no connection, an HTTP error or a reply that is no chat completion, in every attempt;
                a reply without a judgement (unparsed); not asked, because the endpoint is down
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_srft.config import JudgeRewardConfig
from megatron_srft.rewards.answers import Verdict
from megatron_srft.rewards.endpoint import ChatEndpoint, ChatReply
from megatron_srft.rewards.responses import Response
from megatron_srft.rewards.workers import VerifierError

TEMPLATE = """\
Decide whether a student's answer to a problem agrees with the reference answer. Do not solve the problem again; compare
the final answers. Equivalent forms of one value agree.

Problem:
{prompt}

Reference answer:
{answer}

End of the student's response:
{response}

Write one line of reasoning. Then write as the last line `Judgement: correct` if the final answers agree,
`Judgement: wrong` if they do not, or `Judgement: not_found` if the response has no final answer.
"""

JUDGEMENT = re.compile(r"judge?ment\W{1,9}(correct|wrong|incorrect|not[_ ]found)(?![a-z])", re.IGNORECASE)
VERDICTS = {
    "correct": (True, "verified"),
    "wrong": (False, "verified"),
    "incorrect": (False, "verified"),
    "not_found": (False, "no_answer"),
}
COUNTS = ("retries", "timeouts", "http_errors", "unparsed", "not_asked")


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came of asking about one answer."""

    verdict: Verdict
    failure: str = ""
    """Name of the count of a failure."""
    retries: int = 0
    reason: str = ""


class JudgeVerifier:
    """Judges responses. Use: judge.judge(...) each step, judge.close() at the end.

    Raises ValueError when the template's file cannot be read or the key's variable is not set.
    """

    def __init__(self, name: str, config: JudgeRewardConfig):
        self.name, self.config = name, config
        self.counts: Counter[str] = Counter()
        self._template = _template(name, config)
        self._endpoint = ChatEndpoint(
            f"rewards.{name}",
            config.url,
            api_key_variable=config.api_key_variable,
            timeout_seconds=config.timeout_seconds,
            retries=config.retries,
            backoff_seconds=config.backoff_seconds,
            concurrency=config.concurrency,
        )

    def close(self) -> None:
        """Answers that are still asked about get no further attempt."""
        self._endpoint.close()

    def judge(self, responses: Sequence[Response]) -> list[Verdict]:
        """One verdict per response, in order; counts what failed."""
        jobs = [(r.prompt, r.text, r.answer) for r in responses]
        unique = list(dict.fromkeys(jobs))
        replies = dict(zip(unique, self._ask(unique), strict=True))
        for reply in replies.values():
            self.counts["retries"] += reply.retries
            self.counts[reply.failure] += 1
        return [replies[job].verdict for job in jobs]

    def accounting(self) -> dict[str, int]:
        return {f"{self.name}/{count}": self.counts[count] for count in COUNTS}

    def self_test(self) -> None:
        """Ask about a right and a wrong answer; nothing is counted. Raises VerifierError with what went wrong."""
        for answer, right in (("204", True), ("205", False)):
            (reply,) = self._ask([("Compute 12 * 17.", f"The final answer is $\\boxed{{{answer}}}$.", "204")])
            if reply.verdict.correct is not right:
                verdict = f"it judges {answer} against 204 to be {'right' if reply.verdict.correct else 'wrong'}"
                raise VerifierError(f"rewards.{self.name}: {self.config.url}: {reply.reason or verdict}")

    def _ask(self, jobs: Sequence[tuple[str, str, str | None]]) -> list[Reply]:
        """What the judge says of each (prompt, response, reference)."""
        missing = [answer is None and "{answer}" in self._template for _, _, answer in jobs]
        questions = [self._question(*job) for job, left_out in zip(jobs, missing, strict=True) if not left_out]
        replies = iter(self._endpoint.ask(questions))
        unverifiable = Reply(verdict=Verdict(correct=None, status="unverifiable"))
        return [unverifiable if left_out else _reply(next(replies)) for left_out in missing]

    def _question(self, prompt: str, text: str, answer: str | None) -> dict[str, Any]:
        values = {"prompt": prompt, "response": text[-self.config.response_characters :], "answer": answer or ""}
        question = re.sub(r"\{(prompt|response|answer)\}", lambda match: values[match[1]], self._template)
        return {
            "model": self.config.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": self.config.max_judge_tokens,
        }


def _reply(reply: ChatReply) -> Reply:
    if reply.failure:
        status = "timeout" if reply.failure == "timeouts" else "crash"
        return _failed(reply.failure, status, reply.reason, reply.retries)
    content = reply.content
    found = JUDGEMENT.findall(content) if isinstance(content, str) else []
    if not found:
        reason = f"no line 'Judgement: ...' in the reply {str(content)[-200:]!r}"
        return _failed("unparsed", "crash", reason, reply.retries)
    correct, status = VERDICTS[found[-1].lower().replace(" ", "_")]
    return Reply(verdict=Verdict(correct=correct, status=status), retries=reply.retries)


def _failed(failure: str, status: Any, reason: str, retries: int = 0) -> Reply:
    return Reply(verdict=Verdict(correct=None, status=status), failure=failure, retries=retries, reason=reason)


def _template(name: str, config: JudgeRewardConfig) -> str:
    if not config.prompt_file:
        return config.prompt or TEMPLATE
    try:
        text = Path(config.prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"rewards.{name}: cannot read prompt_file {config.prompt_file}: {error}") from None
    if "{response}" not in text:
        raise ValueError(f"rewards.{name}: {config.prompt_file} has no {{response}}, so the judge would see no answer")
    return text
