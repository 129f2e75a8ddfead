"""Grading: is the answer in this text the gold answer? Verdicts, never a silent zero."""

from verl_dft.grading.extract import extract_answer
from verl_dft.grading.pool import VERDICTS, Grade, GradeItem, GraderPool, grade_batch, shared_pool

__all__ = ["VERDICTS", "Grade", "GradeItem", "GraderPool", "extract_answer", "grade_batch", "shared_pool"]
