"""A worker that fails on orders: `python -m tests.chaos.worker`, with the arguments of `worker_service`."""

import sys

from worker_service.__main__ import main

if __name__ == "__main__":
    if sys.argv[1] == "generate":
        # Only here: an io worker never loads torch.
        from tests.chaos import failpoints

        failpoints.install()
    main()
