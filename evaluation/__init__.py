"""The evaluation of checkpoints: scores, metrics and decisions, and their tables, figures, report
and comparison.
"""
