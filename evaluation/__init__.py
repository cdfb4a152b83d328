"""What a checkpoint says of clips: scores, metrics, decisions; tables, figures, report and
comparison made of them.
"""
