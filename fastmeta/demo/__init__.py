"""`python -m fastmeta demo`: learn to learn on sinusoids or on Omniglot, and see what came out."""
