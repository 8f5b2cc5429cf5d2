"""Command-line experiments; each file is one `python -m experiments.NAME`."""
