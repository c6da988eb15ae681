"""Expressions: elementwise functions and losses, traced from Python, differentiated, compiled."""
