r"""Spellings that mean the same answer and ones that do not, by hand: (answer as boxed, gold). math-verify included."""

import pytest

from verl_dft.grading import GradeItem, GraderPool
from verl_dft.grading.judge import judge
from verl_dft.grading.verify import EngineLeaf

SAME = [
    (r"50\%", "50"), ("50", r"50\%"), ("0.5", r"50\%"), (r"\frac12", r"50\%"), ("50 percent", "50"),
    (r"1\frac34", r"\frac{7}{4}"), ("1 3/4", r"\frac{7}{4}"), (r"-1\frac{3}{4}", r"-\frac{7}{4}"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt2}"), ("0.707107", r"\frac{\sqrt{2}}{2}"), ("1.41421356", r"\sqrt{2}"),
    (r"45^\circ", "45"), (r"45^{\circ}", "45"), ("45 degrees", r"45^\circ"), ("45°", r"45^\circ"),
    (r"\frac{\pi}{4}", r"\frac{\pi}{4} \text{ radians}"), (r"\$12.50", "12.5"), ("12.50 dollars", r"\$12.50"),
    ("£5", "5"), ("−7", "-7"), ("- 7", "-7"), (r"\text{7}", "7"), (r"\left(\frac12,\ 3\right)", r"(\frac{1}{2},3)"),
    ("( 0.5 , 3.0 )", r"(\frac{1}{2},3)"), (r"\{3,0.5\}", r"\{\frac{1}{2},3\}"),
    (r"\left\{3,0.5\right\}", r"\{\frac{1}{2},3\}"), (r"3 \text{ and } 0.5", r"\frac12, 3"),
    (r"x=3 \text{ or } x=0.5", r"\frac12, 3"), ("3 or 0.5", r"\frac12, 3"), (r"x = 3, \frac{1}{2}", r"\frac12, 3"),
    (r"\pm 3", "3,-3"), ("3,-3", r"\pm 3"), (r"x=\pm 3", r"\pm3"), (r"2\pm\sqrt{3}", r"2+\sqrt3, 2-\sqrt3"),
    (r"2-\sqrt{3}, 2+\sqrt{3}", r"2 \pm \sqrt{3}"), ("(x+1)^2", "x^2+2x+1"), ("(x-1)(x+3)", "x^2+2x-3"),
    ("(x+3)(x-1)", "(x-1)(x+3)"), ("-(x+1)(1-x)", "x^2-1"), ("x=5", "5"), ("5", "x=5"), ("y = 2x+1", "2x+1"),
    ("2x+1", "y=2x+1"), ("f(x)=2x+1", "y=2x+1"), ("2x-y+1=0", "y=2x+1"), ("y-2x=1", "y=2x+1"), ("2y=4x+2", "y=2x+1"),
    ("x^2+y^2=4", r"\frac{x^2}{4}+\frac{y^2}{4}=1"), ("x = 5 or x = -3", "-3, 5"),
    ("x=5, x=-3", r"x=-3 \text{ or } x=5"), ("12:30", "12:30"), ("3:4", "3:4"), ("3 : 4", "3:4"), ("(1, 2)", "(1,2)"),
    ("(1;2)", "(1,2)"), (r"0.\overline{3}", r"\frac13"), (r"0.1\overline{6}", r"\frac16"),
    (r"5.47 \times 10^{5}", "5.47e5"), (r"5.47 \cdot 10^5", "547000"), ("547000", "5.47e5"), ("547,000", "5.47e5"),
    ("5.47 × 10^5", "5.47e5"), ("5.47e5", r"5.47 \times 10^{5}"), ("5.47E+05", r"5.47 \times 10^{5}"),
    ("5.47 * 10^5", "5.47e5"), ("10^{-3}", "0.001"), ("5.", "5"), ("5,", "5"), (r"\$5$", "5"), ("101_2", "101_2"),
    ("101_{2}", "101_2"), ("101", "101_2"), ("(101)_2", "101_2"), ("(B)", "B"), (r"\text{(B)}", "B"),
    (r"\textbf{(B) } 12", "B"), ("B. 12", "B"), ("B) 12 cm", "B"), ("B: twelve", "B"), ("b", "B"),
    (r"\mathrm{B}", "B"), (r"\text{B}", "(B)"), ("Option B", "B"), (r"\text{Choice B}", "B"), ("yes", r"\text{Yes}"),
    ("Yes, it is", r"\text{Yes}"), (r"\text{no solution}", r"\emptyset"), (r"\emptyset", r"\text{no solution}"),
    (r"\{\}", r"\emptyset"), (r"\varnothing", r"\text{no real solutions}"), (r"\infty", r"\infty"),
    (r"+\infty", r"\infty"), ("3+4i", "4i+3"), (r"3+4\mathrm{i}", "3+4i"), (r"e^{i\pi}", "-1"),
    (r"\pi/3", r"\frac{\pi}{3}"), (r"\frac{1}{3}\pi", r"\frac{\pi}{3}"), ("x>3", r"(3,\infty)"), ("3<x", "x>3"),
    (r"x \geq 3", r"[3,\infty)"), (r"[3,+\infty)", r"[3,\infty)"), (r"x\le 3", r"(-\infty,3]"),
    (r"1 < x \leq 2", "(1,2]"), (r"x\in(1,2]", "(1,2]"), (r"\{x \mid 1 < x \le 2\}", "(1,2]"),
    (r"\{x : 1 < x \le 2\}", "(1,2]"), (r"x<1 \text{ or } x>2", r"(-\infty,1)\cup(2,\infty)"),
    ("x < 1 or x > 2", r"(-\infty,1)\cup(2,\infty)"), (r"(2,\infty)\cup(-\infty,1)", r"x<1 \text{ or } x>2"),
    (r"(-\infty,1) U (2,\infty)", r"(-\infty,1)\cup(2,\infty)"), (r"x \neq 5", r"(-\infty,5)\cup(5,\infty)"),
    (r"(-\infty,5)\cup(5,\infty)", r"x \neq 5"), (r"\mathbb{R}", r"(-\infty,\infty)"),
    (r"\text{all real numbers}", r"(-\infty,\infty)"), (r"(-\infty,\infty)", "all real numbers"),
    (r"\mathbb{R}\setminus\{5\}", r"(-\infty,5)\cup(5,\infty)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\begin{bmatrix}1&2\\3&4.0\end{bmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\frac{1}{2}\begin{pmatrix}2&4\\6&8\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\ln 2 + C", r"\ln 2 + C"), (r"\frac{x^2}{2}+C", r"\frac{1}{2}x^2+C"),
    (r"\frac{x^2}{2}+c", r"\frac{1}{2}x^2+C"), ("10,000", "10000"), ("10{,}000", "10000"), (r"10\,000", "10000"),
    ("10 000", "10000"), ("1,2,3", "1,2,3"), ("1, 2, 3", "3,2,1"), ("5 million", "5000000"), ("five", "5"),
    ("2^{10}", "1024"), ("1024", "2^{10}"), (r"\sqrt{16}", "4"), ("|{-4}|", "4"), ("3!", "6"),
    (r"\binom{5}{2}", "10"), (r"\frac{-1}{2}", r"-\frac12"), (r"-\frac{1}{2}", r"\frac{1}{-2}"),
    ("-1/2", r"-\frac12"), (r"\frac{2}{4}", r"\frac12"), (r"\frac 1 2", r"\frac12"), (r"\frac1{2}", r"\frac12"),
    ("1/2", "0.5"), (".5", "0.5"), (r"\tan 45^\circ", "1"), ("5 cm", r"5 \text{ centimeters}"),
    ("5", r"5 \text{ cm}^2"), (r"5\text{ cm}^2", r"5\text{ cm}^2"), (r"5 \, \text{cm}^{2}", "5"),
    (r"5\ \mathrm{m/s}", "5"), (r"5\ \mathrm{m\,s^{-1}}", "5"), (r"5~\frac{\text{m}}{\text{s}}", "5"),
    (r"12\pi \text{ cm}^2", r"12\pi"), (r"12\pi", r"12\pi\text{ square inches}"), (r"\approx 5.3", "5.3"),
    (r"\sqrt{2} \approx 1.41", r"\sqrt{2}"), ("5! = 120", "120"), ("3.0000000001", "3"), (r"\text{Friday}", "Friday"),
    ("friday.", r"\text{Friday}"), ("The Friday", r"\text{Friday}"), (r"\langle 1,2,3\rangle", "(1,2,3)"),
    (r"(2, \pm 3)", "(2,3),(2,-3)"), ("(1,2), (3,4)", "(3,4),(1,2)"), ("(x,y)=(1,2)", "(1,2)"),
    (r"x=1,\ y=2", "(1,2)"), ("x=1, y=2", "x=1,y=2"), ("y=2, x=1", "x=1,y=2"), ("(1,2)", "x=1,y=2"),
    ("8:30 AM", r"8:30 \text{ a.m.}"), (r"\text{June 20}", "June 20"), (r"2\sqrt{3}+1", r"1+2\sqrt{3}"),
    (r"1+\sqrt{12}", r"1+2\sqrt{3}"), (r"\sqrt[3]{8}", "2"), ("8^{1/3}", "2"), (r"\log_{2} 8", "3"),
    (r"\ln e^2", "2"), (r"\cos^2 x", r"1-\sin^2 x"), (r"\frac{\sin x}{\cos x}", r"\tan x"),
    ("n(n+1)/2", r"\frac{n^2+n}{2}"), ("2^{n+1}-2", "2(2^n-1)"), (r"x^{\frac12}", r"\sqrt{x}"),
    ("x^{-1}", r"\frac1x"), ("a^{2}b", "ba^2"), ("x_1+x_2", "x_{1}+x_{2}"), (r"\alpha+\beta", r"\beta+\alpha"),
    (r"\overline{AB}", r"\overline{AB}"), (r"\frac{7}{2}, -1", "-1, 3.5"),
    (r"\text{Cannot be determined}", "cannot be determined"), (r"\text{True}", "true"), (r"\mathbf{5}", "5"),
    ("{5}", "5"), (r"\boxed{5}", "5"), (r"5\%", "0.05"), (r"500\%", "5"), (r"1\,000\,000", "10^6"),
    (r"2.5 \times 10^{-3} \mathrm{~m}", "2.5e-3"), (r"2.5 \times 10^{-3}\ \text{kg}", "0.0025"), ("7, 7", "7"),
    (r"7\text{ or }8", "7,8"), (r"x \in \{7,8\}", "7,8"), ("-(-5)", "5"), ("--5", "5"), ("ab", "ba"),
    ("E", r"\text{E}"), (r"\frac{e}{4}x+\frac{e}{4}", r"y=\frac{e}{4}x+\frac{e}{4}"), ("[2,3)", "[2,3)"),
    ("]2,3[", "(2,3)"), (r"6.02\times10^{23}", r"6.02\times 10^{23}"), ("2i", r"2 \imath"),
    (r"k\pi, k \in \mathbb{Z}", r"k\pi"), (r"\frac{\pi}{4}+k\pi", r"\frac{\pi}{4}+\pi k"),
    (r"\frac{\pi}{6} + 2k\pi", r"\frac{\pi}{6}+2n\pi"), ("f(n)=n+1", "f(x)=x+1"),
]  # fmt: skip

DIFFERENT = [
    ("5", r"50\%"), ("0.7071", r"\frac{\sqrt{2}}{2}"), (r"(3,\frac12)", r"(\frac{1}{2},3)"),
    ("[0.5,3]", r"(\frac{1}{2},3)"), (r"\{3\}", r"\{\frac{1}{2},3\}"), (r"\{3,0.5,1\}", r"\{\frac{1}{2},3\}"),
    ("(3, 0.5)", r"(\frac12, 3)"), ("3", r"\pm 3"), ("-3", r"\pm 3"), (r"\pm 3", "3"),
    (r"2+\sqrt{3}", r"2 \pm \sqrt{3}"), ("x^2+2x+2", "x^2+2x+1"), ("y=5", "x=5"), ("x=6", "5"), ("y=2x+2", "y=2x+1"),
    ("2x-y-1=0", "y=2x+1"), ("x=5", r"x=-3 \text{ or } x=5"), ("4:3", "3:4"), (r"0.\overline{4}", r"\frac13"),
    (r"5.48 \times 10^{5}", "5.47e5"), (r"1.094 \times 10^{6}", "5.47e5"), ("101_3", "101_2"), ("5", "101_2"),
    ("C", "B"), ("(C) 12", "B"), ("No", r"\text{Yes}"), (r"-\infty", r"\infty"), ("3-4i", "3+4i"), ("(3,4)", "3+4i"),
    ("1.047", r"\frac{\pi}{3}"), (r"60^\circ", r"\frac{\pi}{3}"), ("x > 3", r"x \ge 3"),
    (r"(3,\infty)", r"[3,\infty)"), (r"1 \leq x < 2", "(1,2]"),
    (r"(-\infty,1]\cup(2,\infty)", r"(-\infty,1)\cup(2,\infty)"), (r"(2,\infty)", r"(-\infty,1)\cup(2,\infty)"),
    (r"\begin{bmatrix}1&3\\2&4\end{bmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\begin{pmatrix}1&2\\3&5\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\frac{x^2}{2}", r"\frac{1}{2}x^2+C"), ("1,2,4", "1,2,3"), ("1,2", "1,2,3"), ("5 million", "5"), ("0,5", "0.5"),
    (r"5 \text{ cm}", r"5 \text{ m}"), (r"6\text{ cm}", r"5 \text{ cm}"), ("100000000001", "100000000000"),
    ("99999999999999999999", "100000000000000000000"), ("Monday", r"\text{Friday}"),
    (r"\text{increasing on } (0,1)", "increasing"), ("(1,2),(4,3)", "(3,4),(1,2)"), ("x=2, y=1", "x=1,y=2"),
    ("a=1, b=2", "x=1, y=2"), ("8:30", r"8:30 \text{ a.m.}"), (r"\cos^2 x", r"1+\sin^2 x"),
    (r"\frac{n(n-1)}{2}", r"\frac{n^2+n}{2}"), ("10^{10^{10}}", "5"), ("7 hours 30 minutes", "7"), ("7 + 1", "7"),
    ("73, 74, 75", "73"), (r"\text{7 or 8}", "7"), ("7 and 8", "7"), (r"x=7 \text{ or } 8", "7"), ("7 < 8", "7"),
    ("x<7", "7"), (r"x \ge 7", "7"), ("5x", "5"), ("5a", "5"), ("5ab", "5"), (r"\text{ba}", r"\text{ab}"),
    ("MAKE", r"\text{KAME}"), (r"2\text{ to }3", "2:3"),
]  # fmt: skip


@pytest.fixture(scope="module")
def pool() -> GraderPool:
    with GraderPool(2) as made:
        yield made


@pytest.mark.parametrize(("pairs", "verdict"), [(SAME, "correct"), (DIFFERENT, "wrong")], ids=["same", "different"])
def test_spellings(pool: GraderPool, pairs: list[tuple[str, str]], verdict: str) -> None:
    grades = pool.grade([GradeItem(rf"So $\boxed{{{answer}}}$.", gold) for answer, gold in pairs])
    assert [pair for pair, grade in zip(pairs, grades, strict=True) if grade.verdict != verdict] == []


@pytest.mark.parametrize(
    ("answer", "gold", "qwen"),
    [
        ("1600", "16", True), ("0.16", "16", True), ("16.0008", "16", True), ("16.01", "16", False),
        ("15", "16", False), ("[1,2)", "(1,2]", True), ("(1,3]", "(1,2]", False), ("3.1416", r"\pi", True),
        (r"100\sqrt{2}", r"\sqrt{2}", True), (r"3\sqrt{2}", r"\sqrt{2}", False), ("0.3333", r"\frac{1}{3}", True),
        (r"\begin{pmatrix} 1 \\ 200 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
        ("x+2", "x+1", False),
    ],
)  # fmt: skip
def test_the_qwen_harness_accepts_what_is_wrong(answer: str, gold: str, qwen: bool) -> None:
    """Its leniencies: 1e-4, a factor of 100, brackets. The strict verdict rejects every one of these."""
    verdict = judge(answer, gold, "auto", EngineLeaf())
    assert (verdict.equal, verdict.qwen) == (False, qwen)


def test_the_qwen_harness_takes_the_last_number_for_an_answer(pool: GraderPool) -> None:
    text = "She pays 12 dollars and has 16 left, I think."
    assert [(g.verdict, g.qwen) for g in pool.grade([GradeItem(text, "16"), GradeItem(text, "12")])] == [
        ("no_answer", "correct"),
        ("no_answer", "wrong"),
    ]
