"""Final answers inside texts: found, normalised, compared."""

import re
from fractions import Fraction

_NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d[\d,]*)?"
_LETTER = re.compile(
    r"(?i:answer\s*(?:is|:)\s*(?:\\boxed\{|\\text\{|option|choice|[\s*_(:$\"'])*)"
    r"([A-Z])(?![A-Za-z])"
)
_FENCE = re.compile(r"```([^\n`]*)\n(.*?)(?:```|\Z)", re.DOTALL)
# LaTeX that changes how an answer looks and not what it is.
_COSMETIC = re.compile(
    r"\\(?:left|right|displaystyle|dfrac(?=\b)|[,;:! ])|\\(?:mathrm|text|textbf|mathbf)\b|[${}\s]"
)


def last_boxed(text: str) -> str | None:
    """What is in the last `\\boxed{...}` whose braces close; None without one."""
    for match in reversed(list(re.finditer(r"\\f?boxed\s*\{", text))):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[match.end() : end].strip()
    return None


def final_number(text: str) -> str | None:
    """The number after the last `####`, else the boxed one, else the last one of the text."""
    if "####" in text:
        found = re.search(_NUMBER, text.rsplit("####", 1)[1])
        if found:
            return found[0]
    boxed = last_boxed(text)
    numbers = re.findall(_NUMBER, boxed if boxed is not None else text)
    return numbers[-1] if numbers else None


def final_letter(text: str, letters: str) -> str | None:
    """The choice that a text settles on, one of `letters`.

    The last `answer is (X)`, else a boxed letter, else the last letter that stands alone.
    """
    found = _LETTER.findall(text)
    boxed = last_boxed(text)
    if boxed is not None:
        found += re.findall(r"\b[A-Z]\b", boxed)[-1:] if not found else []
    found = found or re.findall(r"(?<![A-Za-z'])\(?([A-Z])\)?(?![A-Za-z'])", text)
    found = [letter for letter in found if letter in letters]
    return found[-1] if found else None


def code_block(text: str) -> str | None:
    """The last fenced block marked as Python, else the last one; None without one."""
    blocks = _FENCE.findall(text)
    python = [code for name, code in blocks if name.strip().lower() in ("python", "py", "python3")]
    if python:
        return python[-1]
    return blocks[-1][1] if blocks else None


def as_number(text: str) -> Fraction | None:
    """The exact value of `1,234.50`, `$3`, `25%`, `-1/3` or `\\frac{1}{2}`; None for others."""
    text = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", text.strip())
    text = text.strip("$ .").removesuffix(r"\%").removesuffix("%").strip("$ ")
    if not re.fullmatch(_NUMBER, text):
        return None
    try:
        return Fraction(text.replace(",", ""))
    except (ValueError, ZeroDivisionError):  # a/b with decimals, or over nothing
        return None


def normalised(text: str) -> str:
    """A mathematical answer without what does not change its meaning."""
    text = text.strip().rstrip(".")
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\w)\s*(\w)(?!\w)", r"\\frac{\1}{\2}", text)  # \frac12
    text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"(\1)/(\2)", text)
    text = re.sub(r"\^\s*\{?\\circ\}?|\\degree", "", text)
    text = _COSMETIC.sub("", text.replace(r"\%", "").replace("%", ""))
    return re.sub(r"\((\w+)\)", r"\1", text).lower()


def same_answer(answer: str, reference: str) -> bool:
    """Whether two mathematical answers are equal as numbers, or as written once normalised."""
    left, right = as_number(answer), as_number(reference)
    if left is not None and right is not None:
        return left == right
    return normalised(answer) == normalised(reference)
