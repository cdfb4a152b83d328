"""What eval.py needs beyond scoring: metrics with intervals, tables, decisions, figures, a report, comparisons."""
