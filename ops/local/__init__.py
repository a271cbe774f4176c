"""The local stack: the processes of production, with servers from Python wheels, inside one folder.

People use `python -m ops.local up | run | down | status`; tests and scripts use `LocalStack`.
"""
