"""The performance suite: each module is a command that measures one claim and prints its conditions."""
