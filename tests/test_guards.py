"""Every limit of `accounting`: what just keeps it, and what passes it."""

import signal

import pytest

from megatron_srft import guards
from megatron_srft.config import AccountingConfig
from megatron_srft.guards import StopRequest, find_problem

LIMITS = AccountingConfig(max_verifier_failure_share=0.1, max_truncated_share=0.5, max_skipped_updates=2)


@pytest.mark.parametrize(
    ("metrics", "skipped", "key"),
    [
        ({}, 0, None),
        ({"accounting/scored": 20, "accounting/timeout": 1, "accounting/crash": 1}, 0, None),
        ({"accounting/scored": 20, "accounting/timeout": 1, "accounting/unverifiable": 2}, 0, "verifier_failure"),
        ({"accounting/scored": 20, "accounting/no_answer": 20, "accounting/wrong": 0}, 0, None),
        ({"truncated_share": 0.5}, 0, None),
        ({"truncated_share": 0.51}, 0, "truncated_share"),
        ({}, 2, None),
        ({}, 3, "skipped_updates"),
    ],
)
def test_a_step_is_stopped_only_beyond_its_limits(metrics, skipped, key):
    problem = find_problem(metrics, skipped, 7, LIMITS)
    assert problem is None if key is None else f"accounting.max_{key}" in problem


def test_the_defaults_never_stop_a_step_for_long_answers():
    assert find_problem({"truncated_share": 1.0}, 0, 1, AccountingConfig()) is None


def test_the_first_ctrl_c_asks_and_the_second_ends(monkeypatch, capfd):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        assert not stop.asked
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the same key, passed on by torchrun
        assert stop.asked
        assert capfd.readouterr().err.count("again to end at once") == 1
        monkeypatch.setattr(guards, "SAME_KEY_SECONDS", 0.0)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_asking_a_second_time_by_sigterm_does_not_end():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked
