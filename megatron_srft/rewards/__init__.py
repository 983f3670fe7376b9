"""What an answer earned: verifiers, format checks and the statistics of many samples.

    answers      finds the final answer in a response and compares it as text        (stdlib only)
    symbolic     compares two answers as mathematics, with math-verify and sympy      (worker processes only)
    worker       the program of one worker process; workers keeps a pool of them under a deadline
    math, exact, judge     rewards of the answer, with a verdict; the judge is a model behind an HTTP endpoint
    endpoint     chat completions over HTTP, for the judge and for the data tools
    format                 reward of the form, and a gate
    lengths, repetition    the formulas of the rewards that shape a response; shaping applies them
    functions              users' own rewards
    responses              what a reward sees of an answer
    scorer       `Scorer`: one or more rewards, applied to groups
    over_ranks   each rank verifies its share of a step's answers
    statistics   avg@k, pass@k, majority@k

A worker process passes through this file and must start without torch, so `Scorer` is imported when first asked for.
"""


def __getattr__(name: str):
    if name == "Scorer":
        from megatron_srft.rewards.scorer import Scorer

        return Scorer
    raise AttributeError(f"module {__name__} has no attribute {name}")
