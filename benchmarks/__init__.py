"""The benchmarks: each command measures one claim and prints the conditions of the measurement."""
