"""The local stack: the same processes as production, on servers that come in wheels, inside one folder.

`python -m ops.local up | run | down | status`; `LocalStack` is the same for tests and scripts.
"""
