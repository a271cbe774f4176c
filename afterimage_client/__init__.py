"""A typed client of the service; needs neither torch nor the server."""
