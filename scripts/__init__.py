"""The verbs of the pipeline: every stage runs as `python -m scripts.NAME --help`."""
