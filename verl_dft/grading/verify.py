"""Comparing an answer with its gold through math-verify. Slow, and able to hang or die: it runs in a worker process."""

import re

# Enough digits that 1e-20 and 2e-20 differ; the default rounds both to 0. Costs time, so only for small golds.
_SMALL = re.compile(r"10\^\{?-|0\.0000")
_FINE_PRECISION = {"float_rounding": 40, "numeric_precision": 60}


def verify(answer: str, gold: str, answer_type: str = "auto") -> tuple[bool, str]:
    """Whether ``answer`` equals ``gold``, by sympy.

    Returns:
        (verdict, rule); the rule is ``math_verify``, or ``unparsed`` where the answer is not mathematics.

    Raises:
        ValueError: the gold cannot be read, so that nothing can be said about the answer.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
    from math_verify import verify as math_verify

    from verl_dft.grading.normalize import for_math_verify

    def read(text: str) -> list:
        # No time-outs of its own: they use signal.alarm, and the pool ends a worker that takes too long.
        boxed = rf"\boxed{{{for_math_verify(text)}}}"
        configs = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
        return parse(boxed, configs, parsing_timeout=None)

    parsed_gold = read(gold)
    if not parsed_gold:
        raise ValueError(f"gold {gold!r:.80} cannot be parsed")
    parsed = read(answer)
    if not parsed:
        return False, "unparsed"
    precision = _FINE_PRECISION if _SMALL.search(for_math_verify(gold)) else {}
    equal = math_verify(parsed_gold, parsed, allow_set_relation_comp=True, timeout_seconds=None, **precision)
    return bool(equal), "math_verify"
