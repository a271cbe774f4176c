"""The command `afterimage`: generate, search, upload, jobs, bulk, login."""
