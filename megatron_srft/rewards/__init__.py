"""What an answer earned: verifiers, format checks and the statistics of many samples.

    answers      finds the final answer in a response and compares it as text        (stdlib only)
    symbolic     compares two answers as mathematics, with math-verify and sympy      (worker processes only)
    worker       the program of one worker process; workers keeps a pool of them under a deadline
    math, exact, format    the three kinds of reward
    scorer       `Scorer`: one or more rewards, applied to groups
    statistics   avg@k, pass@k, majority@k

This file imports nothing on purpose: a worker process passes through it and must start without torch.
"""
