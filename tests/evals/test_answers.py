"""Final answers as models write them."""

from fractions import Fraction

import pytest

from dsv3_jax.evals import answers


@pytest.mark.parametrize(
    "text, expected",
    [
        ("She makes 9 * 2 = $18 a day.\n#### 18", "18"),
        ("#### 1,234", "1,234"),
        ("#### -3.5", "-3.5"),
        ("the answer is $70,000.", "70,000"),
        ("so 3 + 4 = 7 apples.", "7"),
        (r"5 left, \boxed{12} in all, of 3 kinds", "12"),
        (r"\boxed{\$1,080.00}", "1,080.00"),
        ("1/2 of it", "1/2"),
        ("#### nothing\nbut 5", "5"),
        ("none", None),
    ],
)
def test_final_number(text, expected):
    assert answers.final_number(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("18", Fraction(18)),
        ("1,234.50", Fraction(2469, 2)),
        ("-7", Fraction(-7)),
        ("$3", Fraction(3)),
        (r"25\%", Fraction(25)),
        ("2/4", Fraction(1, 2)),
        (r"\frac{3}{6}", Fraction(1, 2)),
        ("18.", Fraction(18)),
        ("1/0", None),
        ("x", None),
        ("", None),
    ],
)
def test_as_number(text, expected):
    assert answers.as_number(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The answer is (C).", "C"),
        ("I first thought the answer is A. No: the answer is (D)", "D"),
        ("**Answer:** B", "B"),
        (r"Thus \boxed{C}", "C"),
        (r"The answer is \boxed{\text{B}}.", "B"),
        ("It is a matter of (A) or of B", "B"),
        ("Answer: the answer is a bit unclear", None),
        ("The answer is (J)", None),  # no such choice
        ("A train leaves; I say C", "C"),
        ("", None),
    ],
)
def test_final_letter(text, expected):
    assert answers.final_letter(text, "ABCD") == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{ {2} }", "{2}"),
        (r"\boxed{1} and \boxed{2", "1"),
        ("nothing", None),
    ],
)
def test_last_boxed(text, expected):
    assert answers.last_boxed(text) == expected


def test_code_block():
    assert answers.code_block("a\n```python\nx = 1\n```\n```\nout\n```") == "x = 1\n"
    assert answers.code_block("```\nx = 1\n```") == "x = 1\n"
    assert answers.code_block("```py\nx = 1") == "x = 1"  # cut by max_tokens
    assert answers.code_block("x = 1") is None
