"""Commands of operators: see `python -m scripts.admin --help`."""
