"""What does a configured generator do on this machine? Load it as a worker does, measure it, and check its promises."""
