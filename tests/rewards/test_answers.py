"""Extraction and comparison as text: what is found, what is proved, and what is left to mathematics."""

import time
from fractions import Fraction

import pytest

from megatron_srft.rewards.answers import (
    canonical,
    chosen_letter,
    decide,
    final_answer,
    last_boxed,
    normal,
    number,
)


@pytest.mark.parametrize(("response", "answer"), [
    (r"so \boxed{12}.", "12"),
    (r"first \boxed{1}, then more work, finally \boxed{\frac{1}{\sqrt{2}}} done", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{\left\{1, \frac{2}{3}\right\}}", r"\left\{1, \frac{2}{3}\right\}"),
    (r"$\boxed{-2}$ and $\boxed{1}$", "-2, 1"),
    (r"\boxed{5}, \boxed{5}", "5"),
    (r"\boxed{5}. To check: \boxed{7}", "7"),
    (r"the answer is 3, hence \boxed{4}", "4"),
    (r"complete \boxed{8} but then cut \boxed{9", "8"),
    (r"empty \boxed{ }", None),
    (r"\boxed{\boxed{204}}", "204"),
    ("The answer is 18. I hope it is correct.", "18"),
    ("So the final answer is 3.5.", "3.5"),
    ("So the final answer is .5.", ".5"),
    ("**Final Answer:** $\\frac{1}{2}$", "$\\frac{1}{2}$"),
    ("The answer to the second question is: 7\nbecause", "7"),
    ("The answer is 3. No wait, the answer is 4.", "4"),
    ("work\n#### 1,234", "1,234"),
    ("<think>hm</think><answer>\n42 </answer>", "42"),
    ("nothing of the kind, 17", None),
    ("", None),
])  # fmt: skip
def test_the_last_box_then_the_last_statement(response, answer):
    assert final_answer(response) == answer


@pytest.mark.parametrize(("response", "letter"), [
    ("The answer is C.", "C"), ("Answer: **(B)**", "B"), ("ANS:D", "D"), ("so the correct option is A because", "A"),
    ("Hence (C) is the correct answer", "C"), ("D is the right choice", "D"), (r"\boxed{\text{(E)}}", "E"),
    (r"\boxed{B) 8 days}", "B"), ("we conclude\nB", "B"), ("... which is 12 (A).", "A"), ("A car drives 12 km", None),
    ("The answer is a car", "a car"), (r"answer A, no: \boxed{12}", "12"),
])  # fmt: skip
def test_letters_of_a_multiple_choice(response, letter):
    assert chosen_letter(response) == letter


@pytest.mark.parametrize(("one", "other"), [
    (r"\dfrac{1}{2}", r"$\frac{1}{2}$"), (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
    ("1,234,567", "1234567"), (r"\text{(C)}", "C"), (r"10,\!080", "10080"), ("90^{\\circ}", "90°"),
    (r"\text{ east }", "east"), ("x _ {2}", "x_2"), ("−3", "-3"), (r"\boxed{204}", "204"), ("62.5\\%", "62.5%"),
])  # fmt: skip
def test_typesetting_does_not_matter(one, other):
    assert normal(one) == normal(other)
    assert decide(one, other) is True


@pytest.mark.parametrize(("one", "other"), [
    ("1 1/2", "11/2"), ("12", "1 2"), ("-3", "3"), ("3.5", "35"), ("1,5", "15"), ("x^12", "x^{1}2"), ("{1,2}", "12"),
    ("(1,2)", "[1,2]"), ("0.1", ".01"), ("2^10", "210"), ("a_1", "a1"), ("nowhere", "now here"), ("1,23", "123"),
])  # fmt: skip
def test_text_that_only_looks_alike_is_never_equal(one, other):
    assert decide(one, other) is not True
    assert decide(other, one) is not True


@pytest.mark.parametrize(("text", "value"), [
    ("18", Fraction(18)), ("-1.50", Fraction(-3, 2)), (".5", Fraction(1, 2)), ("4.5e33", Fraction(45 * 10**32)),
    (r"3.5\times10^4", Fraction(35000)), ("10/4", Fraction(5, 2)), (r"-\frac{3}{4}", Fraction(-3, 4)),
    (r"\frac34", Fraction(3, 4)), ("1/0", None), ("x", None), ("1e999999999", None), ("5%", None), ("", None),
])  # fmt: skip
def test_plain_numbers_have_exact_values(text, value):
    assert number(text) == value


def test_text_decides_only_what_it_proves():
    assert decide("17", "18") is False
    assert decide("0.5", r"\frac{1}{2}") is True
    assert decide("0.333333", r"\frac{1}{3}") is None
    assert decide(r"2\sqrt{3}", r"\sqrt{12}") is None
    assert decide("D) none", "C") is False
    assert decide("Navin", r"\text{Evelyn}") is False
    assert decide("EVELYN", r"\text{Evelyn}") is True
    assert decide("{" * 9 + "1" + "}" * 9, "x") is False
    assert decide("1+" * 200 + "1", "201") is False
    assert [decide(answer, "52_8") for answer in ("52_{8}", "52", "52_9", "53_8")] == [True, True, False, False]
    assert [decide(answer, "52") for answer in ("52_8", "5_2")] == [True, False]


def test_votes_for_one_number_are_counted_together():
    assert {canonical(text) for text in (r"\frac{1}{2}", "0.50", "1/2", r"$\dfrac12$")} == {"1/2"}
    assert canonical("x + 1") != canonical("x + 2")


@pytest.mark.parametrize("noise", [
    "\\boxed{" * 5000, "answer" + " " * 20000, "answer is " * 5000, "\n" * 20000 + "A", "(A " * 8000, "{" * 30000,
    "\\boxed{1}, " * 3000, "answer: " + "*" * 20000, "the answer" + " is" * 9000, "$ ," * 9000,
])  # fmt: skip
def test_degenerate_responses_cost_little(noise):
    started = time.process_time()
    final_answer(noise)
    chosen_letter(noise)
    normal(last_boxed(noise) or noise[:2000])
    assert time.process_time() - started < 1.0
