"""Listening to a machine without PyTorch: the parts of examples/monitor.py."""
