"""Mathematical equality through math-verify, and where we are stricter than it."""

import pytest

from megatron_srft.rewards.symbolic import judge


@pytest.mark.parametrize(("answer", "reference"), [
    ("0.333333", r"\frac{1}{3}"), (r"2\sqrt{3}", r"\sqrt{12}"), ("x^2+2x+1", "(x+1)^2"), ("x=5", "5"), ("5", "x=5"),
    ("3, 1, 2", "1,2,3"), (r"\{1,2\}", "1,2"), ("5.890e-7", r"5.89\times10^{-7}"), ("2x-2y+4=0", "y=x+2"),
    ("xy=1", r"y=\frac{1}{x}"), (r"2\sin x\cos x", r"\sin 2x"), ("90", r"90^\circ"), ("18 dollars per day", "18"),
    (r"864", r"864 \mbox{ inches}^2"), (r"\binom{5}{2}", "10"), ("3<x", "x>3"), (r"62.5\%", r"0.625"),
    (r"\frac{2E_1+E_2}{3}", r"\frac{1}{3}E_2+\frac{2}{3}E_1"), (r"\begin{bmatrix}1\\2\end{bmatrix}",
    r"\begin{pmatrix}1\\2\end{pmatrix}"), (r"f(x)=2x", r"f(x) = x + x"), (r"1\frac{4}{5}", "1.8"),
])  # fmt: skip
def test_equal_mathematics(answer, reference):
    verdict = judge(answer, "", reference)
    assert (verdict.correct, verdict.status) == (True, "verified")


@pytest.mark.parametrize(("answer", "reference"), [
    ("5.89e-7", "6.89e-7"), ("2.9088e-19", "2.88e-19"), ("4.5e34", "4.5e33"), ("N=n+1", "M=n"), ("y=x+3", "y=x+2"),
    ("(2, 1)", "(1, 2)"), ("[1,2]", "(1,2)"), ("18 and 20", "18"), ("5 million", "5"), ("not 18", "18"),
    (r"\frac{1}{3} E_{1}+\frac{2}{3} E_{3}", r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}"), (r"\sqrt{x^2}", "x"),
    (r"\frac{dM}{dt}=c M^{7}", r"\frac{dM}{dt}=c M^{6}"), ("x=5", "y=5"), ("X_{d}=125-1.26 P", "X_{d}=125-1.25 P"),
    (r"\begin{pmatrix}1\\3\end{pmatrix}",
    r"\begin{pmatrix}1\\2\end{pmatrix}"), ("0.3333", r"\frac{1}{3}"), ("garbage\\foo{", "12"), (r"\cot x+1", r"\cot x"),
])  # fmt: skip
def test_different_mathematics(answer, reference):
    verdict = judge(answer, "", reference)
    assert (verdict.correct, verdict.status) == (False, "verified")


def test_without_an_explicit_answer_the_last_number_of_the_text_counts():
    tail = "She sells 9 * 2 = 18 eggs, that is 18 dollars"
    assert judge(None, tail, "18").correct is True
    assert judge(None, tail, "9").correct is False
    assert judge(None, "I do not know", "9").status == "no_answer"


def test_a_reference_that_sympy_cannot_read_is_no_verdict_against_the_answer():
    verdict = judge("t(0,5]", "", "t(0,4]")
    assert (verdict.correct, verdict.status) == (None, "unverifiable")
    assert judge("t(0,5]", "", r"\text{never}").correct is False
