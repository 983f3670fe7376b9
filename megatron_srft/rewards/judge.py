"""A verdict from a language model behind an OpenAI-compatible endpoint (`POST <url>/chat/completions`).

The judge is asked greedily, once per different answer, and must end with `Judgement: correct`, `wrong` or `not_found`;
the last such line counts. Whatever else happens is no verdict, never a wrong answer:

    timeout     no complete reply within timeout_seconds, in every attempt
    crash       no connection, an HTTP error or a reply that is no chat completion, in every attempt;
                a reply without a judgement (unparsed); not asked, because the endpoint is down

Timeouts, lost connections, statuses 408, 425, 429 and 5xx, and garbled replies are tried again, after a pause that
doubles.
"""

import contextlib
import http.client
import json
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_srft.config import JudgeRewardConfig
from megatron_srft.rewards.answers import Verdict
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
TRY_AGAIN = {408, 425, 429}
"""Statuses below 500 that a later attempt can mend."""

MAX_REPLY_BYTES, MAX_PAUSE_SECONDS = 1 << 20, 30.0
COUNTS = ("retries", "timeouts", "http_errors", "unparsed", "not_asked")


class EndpointError(RuntimeError):
    """An attempt that failed; `again` says whether another one may do better."""

    def __init__(self, message: str, *, again: bool = True, timeout: bool = False):
        super().__init__(message)
        self.again, self.timeout = again, timeout


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
        self._headers = _headers(name, config)
        self._closed = threading.Event()
        self._failed_in_a_row = 0

    def close(self) -> None:
        """Answers that are still asked about get no further attempt."""
        self._closed.set()

    def judge(self, responses: Sequence[Response]) -> list[Verdict]:
        """One verdict per response, in order; counts what failed."""
        unique = list(dict.fromkeys((r.prompt, r.text, r.answer) for r in responses))
        self._failed_in_a_row = 0
        with ThreadPoolExecutor(self.config.concurrency) as threads:
            replies = dict(zip(unique, threads.map(lambda job: self._ask(*job), unique), strict=True))
        for reply in replies.values():
            self.counts["retries"] += reply.retries
            self.counts[reply.failure] += 1
        return [replies[r.prompt, r.text, r.answer].verdict for r in responses]

    def accounting(self) -> dict[str, int]:
        return {f"{self.name}/{count}": self.counts[count] for count in COUNTS}

    def self_test(self) -> None:
        """Ask about a right and a wrong answer; nothing is counted. Raises VerifierError with what went wrong."""
        for answer, right in (("204", True), ("205", False)):
            reply = self._ask("Compute 12 * 17.", f"The final answer is $\\boxed{{{answer}}}$.", "204")
            if reply.verdict.correct is not right:
                verdict = f"it judges {answer} against 204 to be {'right' if reply.verdict.correct else 'wrong'}"
                raise VerifierError(f"rewards.{self.name}: {self.config.url}: {reply.reason or verdict}")

    def _ask(self, prompt: str, text: str, answer: str | None) -> Reply:
        if answer is None and "{answer}" in self._template:
            return Reply(verdict=Verdict(correct=None, status="unverifiable"))
        if self._failed_in_a_row >= self.config.concurrency:
            return _failed("not_asked", "crash", "the endpoint is down")
        values = {"prompt": prompt, "response": text[-self.config.response_characters :], "answer": answer or ""}
        question = re.sub(r"\{(prompt|response|answer)\}", lambda match: values[match[1]], self._template)
        for attempt in range(self.config.retries + 1):
            try:
                content = self._complete(question)
            except EndpointError as error:
                last = error
            else:
                self._failed_in_a_row = 0
                return _reply(content, attempt)
            pause = min(self.config.backoff_seconds * 2**attempt, MAX_PAUSE_SECONDS)
            if not last.again or attempt == self.config.retries or self._closed.wait(pause):
                break
        self._failed_in_a_row += last.again
        kind = ("timeouts", "timeout") if last.timeout else ("http_errors", "crash")
        return _failed(*kind, str(last), attempt)

    def _complete(self, question: str) -> str:
        """The judge's text. Raises EndpointError."""
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": self.config.max_judge_tokens,
        }
        status, data = _post(
            self.config.url.rstrip("/") + "/chat/completions",
            json.dumps(body).encode(),
            self._headers,
            self.config.timeout_seconds,
        )
        if status != 200:
            again = status in TRY_AGAIN or status >= 500
            raise EndpointError(f"HTTP status {status}: {data[:200].decode(errors='replace')}", again=again)
        try:
            return json.loads(data)["choices"][0]["message"]["content"] or ""
        except (ValueError, LookupError, TypeError):
            raise EndpointError(f"no chat completion: {data[:200].decode(errors='replace')}") from None


def _post(url: str, body: bytes, headers: dict[str, str], seconds: float) -> tuple[int, bytes]:
    """Status and body of the reply, all of it within `seconds`. Raises EndpointError."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=seconds)
    late, timer, start = threading.Event(), None, time.monotonic()

    def hang_up(line: socket.socket) -> None:
        late.set()
        with contextlib.suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)

    try:
        connection.connect()
        # A socket's own timeout starts again with every byte that a slow server sends.
        timer = threading.Timer(max(seconds - (time.monotonic() - start), 0), hang_up, (connection.sock,))
        timer.start()
        connection.request("POST", parts.path + ("?" + parts.query if parts.query else ""), body, headers)
        response = connection.getresponse()
        data = response.read(MAX_REPLY_BYTES)
        # read(n) hands out a body cut short without complaint; one that ends early is not a reply.
        if late.is_set() or (response.length or 0) > 0:
            raise http.client.IncompleteRead(data)
        return response.status, data
    except (OSError, http.client.HTTPException, ValueError) as error:
        if late.is_set() or isinstance(error, TimeoutError):
            raise EndpointError(f"no complete reply within {seconds:g} s", timeout=True) from None
        raise EndpointError(f"{type(error).__name__}: {error}") from None
    finally:
        if timer is not None:
            timer.cancel()
        connection.close()


def _reply(content: Any, retries: int) -> Reply:
    found = JUDGEMENT.findall(content) if isinstance(content, str) else []
    if not found:
        return _failed("unparsed", "crash", f"no line 'Judgement: ...' in the reply {str(content)[-200:]!r}", retries)
    correct, status = VERDICTS[found[-1].lower().replace(" ", "_")]
    return Reply(verdict=Verdict(correct=correct, status=status), retries=retries)


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


def _headers(name: str, config: JudgeRewardConfig) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Connection": "close"}
    if config.api_key_variable:
        key = os.environ.get(config.api_key_variable)
        if not key:
            raise ValueError(f"rewards.{name}: the environment has no {config.api_key_variable}; set it to the key")
        headers["Authorization"] = f"Bearer {key}"
    return headers
