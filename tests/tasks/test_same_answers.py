"""One table of answers and completions, right and wrong: the reading that all rewards share."""

from __future__ import annotations

import pytest

from lowmem_grpo.tasks.answers import chosen_letter, explained, judge, kind_of, read_number

# Of an answer: completions that give it, and others that do not.
NUMBERS = {
    "2500": (
        [
            r"\boxed{2{,}500}",
            "2 500",
            "2\u202f500 kg",
            "2'500",
            r"\(2\,500\)",
            "2.500,00",
            r"\$2,500.00",
            "\uff12\uff15\uff10\uff10",
            "\u0662\u0665\u0660\u0660",
            "2.5 thousand",
            r"2.5 \times 10^3",
            "25e2",
        ],
        ["2,50", "2500.5", "25", "2 50 0", "x^{2500}", "2500x", "1/2500", "3*2500", "2500/2"],
    ),
    "7/2": (
        [r"3\frac12", "3\u00bd", "3 1/2", "3.5", r"\boxed{\dfrac{7}{2}}", r"x = \tfrac72"],
        ["31/2", "3/2", "7", "3", "3.4999999"],
    ),
    "-7": (
        ["\u22127", "\u20137", "(-7)", "minus 7", "-$7", "$-7", r"\boxed{x=-7}", "5 - 12 = -7"],
        ["7", "3-7", "10 - 17"],
    ),
    "25%": (["25%", r"\boxed{25\%}", "25", "25 percent"], ["0.25", "1/4"]),
    "0.25": (["1/4", ".25", "\u00bc"], ["25%"]),
    "\u20ac1,250.50": (["1250.5", "\u20ac1250.50", "1250.50 EUR", "1,250.5 euros"], ["1250"]),
    "5 apples": (["5", "5 apples", r"\boxed{5\text{ apples}}"], ["6 apples"]),
    "1/3": (["1/3", r"\frac{2}{6}"], ["0.3333333333"]),
    "\u0664\u0662": (["42", "4.2e1"], ["24"]),
    "He has 6*7 of them.\n#### 42": (
        [
            "So it is 42.",
            "<think>7? \\boxed{7}</think>42",
            "\\boxed{42}. This used 3 steps.",
            "<answer>42</answer>, in 3 steps",
            "42</answer> 3",
            "#### 42\n\nDone after 3 steps.",
            "The answer is 42 (see step 3). 5",
            "**Final Answer:** 42\n\nCheck: 7",
            "The answer is 41. No: the answer is 42, and not 41.",
            "\u7b54\u6848\u662f42\u3002",
            "42\n\nLet me know if you need 2 more.",
            "42\n\nI looked at 3 cases.",
        ],
        [
            "\\boxed{41} 42",
            "<answer>41</answer> 42",
            "The answer is 41 or 42.",
            "The answer is not 42.",
            "42 or 43",
            "GPT-4 says 43",
            "on 42/05/2020",
            "",
        ],
    ),
}
FORMULAS_AND_WORDS = {
    r"\sqrt{2}": ([r"\boxed{\sqrt2}", r"The answer is $\sqrt{2}$, since"], ["1.41421", "2"]),
    r"\frac{\pi}{2}": ([r"\dfrac\pi2".replace(r"\pi2", r"{\pi}{2}")], ["1.5708"]),
    "1,2": (["2, 1", "1 and 2", r"\{1,2\}", "x = 1 or x = 2"], ["1,2,2", "(1,2)", "12", "1"]),
    "(1,2)": ([r"\left( 1, 2 \right)"], ["(2,1)", "[1,2]", "1,2"]),
    "[0,1)": (["[0, 1)", r"\boxed{x \in [0,1)}"], ["[0,1]", "(0,1)"]),
    "3,5": (["3,5", "3.5", "5,3"], ["35", "3"]),
    "10:30": (["10:30", "The answer is 10:30."], ["10:31", "10", "20:60"]),
    "Monday": (
        ["monday", r"\boxed{\text{Monday}}", "**Monday**", "The answer is Monday, because"],
        ["Tuesday", "Monday or Tuesday", "Mon", "not Monday"],
    ),
    "New York": ([r"\mathrm{New York}", "It is big. <answer>new  york</answer>"], ["York"]),
    "True": (["true.", r"\boxed{\text{true}}"], ["false", "not true"]),
    "caf\u00e9": (["cafe\u0301", "Caf\u00e9."], ["cafe"]),
    "x": ([r"\boxed{x}"], ["X", "y"]),
    "3 pm": (["3 pm"], ["3 am", "3"]),
}


@pytest.mark.parametrize("answer", [*NUMBERS, *FORMULAS_AND_WORDS])
def test_every_spelling_of_an_answer_and_nothing_else_is_right(answer):
    right, wrong = (NUMBERS | FORMULAS_AND_WORDS)[answer]
    assert (kind_of(answer) == "number") is (answer in NUMBERS)
    for text in (*right, *wrong):
        verdict = judge(text, answer)
        assert verdict.right is (text in right), (text, explained(verdict, answer))


def test_any_of_several_answers_is_right():
    answers = ["NYC", r"So \boxed{\text{New York}}", "8"]
    for text in ("nyc", r"\boxed{New York}", "8.0"):
        assert judge(text, answers).right, text
    assert not judge("9", answers).right


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("**C**", "C"),
        (r"\boxed{\textbf{(D) }12}", "D"),
        ("The best answer is option E. Rome is", "E"),
        ("The answer is A, as the others are not", "A"),
        ("The answer is not B but C.", "C"),
        ("\u6b63\u786e\u7b54\u6848\uff1aB", "B"),
        ("<think>Answer: A</think> (B) Paris", "B"),
        ("C: Rome", "C"),
        ("Choice D is the correct one", "D"),
        ("Both A and B are right", None),
        ("The answer is (A) or (B)", None),
        ("The answer is not B.", None),
        ("Rich in vitamin C", None),
        ("A. Rome\nB. Paris\nC. Oslo", None),
    ],
)
def test_the_letter_that_a_text_settles_on(text, letter):
    assert chosen_letter(text) == letter


def test_what_was_read_is_said():
    assert explained(judge(r"\boxed{5} or 6", "7"), "7") == r"read '5', in \boxed{}; wanted '7'"
    assert explained(judge("It is 5.", "5"), "5") == "read '5', the last number"
    assert "wanted 'Oslo' or 'Rome'" in explained(judge("Bern", ["Oslo", "Rome"]), ["Oslo", "Rome"])


HOSTILE = {
    "power": "10^10^10 ",
    "tower": r"\boxed{10^{10^{10}}}",
    "exponent": "1e999999999 ",
    "digits": "9" * 20,
    "groups": ",111",
    "braces": "{",
    "boxes": r"\boxed{",
    "fractions": r"\frac{1}{",
    "text": r"\text{",
    "tags": "<answer>",
    "closed": "</answer>",
    "hashes": "#### ",
    "sayings": "the answer is ",
    "colons": "answer:",
    "letters": "(A) ",
    "spaces": " ",
    "mixed": "1 1/2 ",
    "signs": "- ",
    "bold": "**",
    "brackets": "[1,2],",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_text_takes_long(name):
    # In proportion to its length: what backtracks would take hours here.
    text = HOSTILE[name] * (40_000 // len(HOSTILE[name]))
    for wanted in ("72", "C", "Monday", r"\frac{\pi}{2}"):
        assert not judge(text + " so", wanted).right
        assert not judge(wanted, text + " so").right


def test_a_power_that_no_machine_holds_is_no_number():
    assert read_number("10^10^10")[0] is None
    assert read_number("10^{10000000}")[0] is None
    assert read_number("2^{10}")[0] == 1024
