"""The executors: each takes a `Problem` and gives an `Outcome`; none knows another."""
