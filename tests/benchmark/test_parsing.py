"""Which option an answer names: answers as models write them."""

import time

import pytest

from vllm_wsi.benchmark.parsing import parse_label

OPTIONS = {
    "A": "Adenocarcinoma",
    "B": "Lobular carcinoma",
    "C": "Lung adenocarcinoma",
    "D": "Squamous cell carcinoma",
}
GRADES = {"A": "1", "B": "2", "C": "3"}
NUMBERS = {str(n): text for n, text in enumerate(("Brain", "Lung", "Liver"), 1)}


@pytest.mark.parametrize(
    ("output", "label", "rule"),
    [
        ("B", "B", "label"),
        ("b", "B", "label"),
        ("B.", "B", "label"),
        (" (b)\n", "B", "label"),
        ("**B**", "B", "label"),
        ("**B.**", "B", "label"),
        ('"D"', "D", "label"),
        ('B "', "B", "label"),
        (r"\boxed{C}", "C", "label"),
        (r"$\boxed{C}$", "C", "label"),
        ('{"answer": "C"}', "C", "label"),
        ("Ｂ", "B", "label"),
        ("A", "A", "label"),
        ("<think>It may be A or (C).</think>\nB", "B", "label"),
        ("It may be A or (C).\n</think>\n\nB", "B", "label"),  # the template wrote the <think>
        ("The answer is A.</think>Hm. (C)</think>The answer is B.<think>Or A", "B", "statement"),
        ("Option B is correct.", "B", "statement"),
        ("The stroma is clear, so option **B** is the best choice.", "B", "statement"),
        ("I looked at all patches. B is the correct answer.", "B", "statement"),
        ("(B) is right, and A is not correct.", "B", "statement"),
        ("Option A is correct, and option C is correct too.", None, "ambiguous"),
        ("Option A is not correct.", None, "none"),
        ("Vitamin A is likely.", None, "none"),
        ("The answer is (C)", "C", "statement"),
        ("The answer is C because of the nests.", "C", "statement"),
        ("The correct answer is: **B. Lobular carcinoma**", "B", "statement"),
        ("The correct option is b.", "B", "statement"),
        ("Answer: D", "D", "statement"),
        ("answer: (d) squamous", "D", "statement"),
        ("Final answer = B", "B", "statement"),
        ("I would choose option D here", "D", "statement"),
        ("The glands are small. Answer: A", "A", "statement"),
        ("答案是B", "B", "statement"),
        ("答案：C。", "C", "statement"),
        ("B. Lobular carcinoma", "B", "lead"),
        ("B) Lobular carcinoma", "B", "lead"),
        ("(B) Lobular carcinoma", "B", "lead"),
        ("B: Lobular carcinoma", "B", "lead"),
        ("B - Lobular carcinoma", "B", "lead"),
        ("A. Adenocarcinoma\nA. Adenocarcinoma", "A", "lead"),
        ("B\nThe cells lie in single files.", "B", "lead"),
        ("**C** is what the slide shows", "C", "lead"),
        ("It looks like (C) to me", "C", "bracket"),
        ("Most likely **D**, from the pearls", "D", "bracket"),
        ("squamous cell carcinoma", "D", "text"),
        ("Lung adenocarcinoma.", "C", "text"),
        ("The slide shows an adenocarcinoma with mucin.", "A", "text"),
        ("Findings fit lung adenocarcinoma, well differentiated.", "C", "text"),
        ("A biopsy shows lobular carcinoma", "B", "text"),
        ("Based on the image, this is squamous  cell carcinoma", "D", "text"),
        ("This is not adenocarcinoma but lobular carcinoma", "B", "text"),
        # Nothing that could be read without guessing
        ("", None, "none"),
        ("   ", None, "none"),
        ("A biopsy shows atypical cells", None, "none"),
        ("Based on the slide, I cannot tell", None, "none"),
        ("Cannot be determined", None, "none"),
        ("The answer is a biopsy", None, "none"),
        ("B-cell infiltrates around vessels", None, "none"),
        ("The patient has hepatitis B", None, "none"),
        ("Depends on vitamin D levels", None, "none"),
        ("E", None, "none"),
        ("В", None, "none"),  # Cyrillic
        ("腺癌", None, "none"),
        ("Опухоль лёгкого", None, "none"),
        ("It is not adenocarcinoma", None, "none"),
        ("<think>B. no end", None, "none"),
        # Two
        ("The answer is A. No, the answer is B.", None, "ambiguous"),
        ("A. Adenocarcinoma\nB. Lobular carcinoma", None, "ambiguous"),
        ("(A) or (B)", None, "ambiguous"),
        ("Adenocarcinoma or lobular carcinoma", None, "ambiguous"),
    ],
)
def test_what_an_answer_names(output, label, rule):
    assert parse_label(output, OPTIONS) == (label, rule)


@pytest.mark.parametrize(
    ("output", "label", "rule"),
    [
        # Marks around statement and label
        ("**Answer:** B", "B", "statement"),
        ("**Answer**: B", "B", "statement"),
        ("**Final Answer:** **B**", "B", "statement"),
        ("**The answer is:** B", "B", "statement"),
        ("__Answer:__ B", "B", "statement"),
        ("*Answer:* (B)", "B", "statement"),
        ("### Answer:\nB", "B", "statement"),
        ("Nests of cells.\n\n**Answer: B. Lobular carcinoma**", "B", "statement"),
        ("The correct answer is\n\n**B**", "B", "statement"),
        ("The correct answer is option B.", "B", "statement"),
        ("**The correct answer is option B.**", "B", "statement"),
        ("The answer is `B`.", "B", "statement"),
        ("the answer is **b** because", "B", "statement"),
        ("<answer>B</answer>", "B", "statement"),
        ("<think>A or C</think><answer> b </answer>", "B", "statement"),
        ("Answer: \\boxed{B}", "B", "statement"),
        ("The answer is $\\boxed{B}$", "B", "statement"),
        ("**Answer: \\boxed{\\text{B}}**", "B", "statement"),
        ("The answer is \\(B\\).", "B", "statement"),
        ("\\[ \\boxed{B} \\]", "B", "label"),
        ("$$\\boxed{\\textbf{B}}$$", "B", "label"),
        ("The cells lie in single files, so \\boxed{B}.", "B", "bracket"),
        ("\\boxed{\\text{B. Lobular carcinoma}}", "B", "lead"),
        ("\\boxed{\\text{Lobular carcinoma}}", "B", "text"),
        ("## B. Lobular carcinoma", "B", "lead"),
        # Two labels
        ("The answer is A or B", None, "ambiguous"),
        ("The answer is B and C.", None, "ambiguous"),
        ("The answer is either B or C", None, "ambiguous"),
        ("Answer: B, C", None, "ambiguous"),
        ("Answer: A/B", None, "ambiguous"),
        ("Answer: (B) or (C)", None, "ambiguous"),
        ("Answer: **B** or **C**", None, "ambiguous"),
        ("Answer: option A or option B", None, "ambiguous"),
        ("Answer: \\boxed{A \\text{ or } B}", None, "ambiguous"),
        ("the answer is (a) or (b)", None, "ambiguous"),
        ("The answer is B. Lobular carcinoma or C. Lung adenocarcinoma", None, "ambiguous"),
        ("B. Lobular carcinoma, or C", None, "ambiguous"),
        # One label, and words about another
        ("The correct answer is B, not A.", "B", "statement"),
        ("The answer is B rather than A", "B", "statement"),
        ("The answer is B, A is less likely", "B", "statement"),
        ("The answer is B; C lacks glands", "B", "statement"),
        ("The answer is B and C is wrong", "B", "statement"),
        ("The answer is B (Lobular carcinoma), not A", "B", "statement"),
        ("(A) is wrong. (B) fits", "B", "bracket"),
        ("I would exclude (A) and (C), so (B)", "B", "bracket"),
        ("No, the answer is B.", "B", "statement"),
        ("No. Answer: B", "B", "statement"),
        # The article
        ("Answer: A biopsy is needed", None, "none"),
        ("**Answer:** A biopsy is needed", None, "none"),
        ("Answer: A typical lobular carcinoma", "B", "text"),
        ("The answer is A because of the glands", "A", "statement"),
        ("Answer: A is correct", "A", "statement"),
        ("Answer: A\nthe glands are round", "A", "statement"),
        # Negated
        ("I cannot select A or B", None, "none"),
        ("I do not think the answer is A", None, "none"),
        ("I wouldn't choose option A", None, "none"),
        ("Answer: not B", None, "none"),
        ("I would exclude (A). The tumour is lobular carcinoma.", "B", "text"),
        ("Neither (A) nor (C) fits lobular carcinoma", "B", "text"),
        ("(A) is not seen. The tumour is lobular carcinoma.", "B", "text"),
        ("This rules out (A)", None, "none"),
        ("This isn't lobular carcinoma", None, "none"),
        ("A squamous cell carcinoma is not seen; this is lobular carcinoma", "B", "text"),
    ],
)
def test_marks_second_labels_articles_and_negations(output, label, rule):
    assert parse_label(output, OPTIONS) == (label, rule)


def test_two_letters_with_a_comma_name_none():
    assert parse_label("A, B", OPTIONS).label is None
    assert parse_label("A and B", OPTIONS).label is None


@pytest.mark.parametrize(
    ("output", "label"), [("2", "B"), ("grade 3", "C"), ("Grade: 2.5", None), ("grade 2.5", None), ("12", None)]
)
def test_options_that_are_numbers(output, label):
    found = parse_label(output, {key: f"{text}" for key, text in GRADES.items()} if output == "2" else
                        {key: f"grade {text}" for key, text in GRADES.items()})  # fmt: skip
    assert found.label == label


@pytest.mark.parametrize(
    ("output", "label"),
    [
        ("2", "2"),
        ('{"answer": 2}', "2"),
        ("2. Lung", "2"),
        ("Answer: 3", "3"),
        ("Lung", "2"),
        ("12", None),
        ("2.5", None),
        ("Answer: 2.5", None),
        ("Answer: 2, 3", None),
        ("Answer: 2/3", "2"),  # two of three
    ],
)
def test_labels_that_are_numbers(output, label):
    assert parse_label(output, NUMBERS).label == label


def test_a_label_that_is_part_of_a_larger_one_is_not_found():
    options = {str(n): f"organ {n}" for n in range(1, 31)}
    assert parse_label("30", options).label == "30"
    assert parse_label("12. organ 12", options).label == "12"
    assert parse_label("The answer is 12", options).label == "12"


@pytest.mark.parametrize(
    ("output", "label"),
    [("(A) or (B), " * 2000, None), ("The answer is B, " * 1000, "B"), ("not the " * 3000 + "(A)", None)],
)
def test_an_answer_that_repeats_itself_is_read_in_no_time(output, label):
    start = time.monotonic()
    assert parse_label(output, OPTIONS).label == label
    assert time.monotonic() - start < 2  # it was 11 s where each label went through all that are joined to it
