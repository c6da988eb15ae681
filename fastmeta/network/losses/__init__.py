"""Losses: the standard ones, their recognition in a user's function, and their rules."""
