"""A model as a network of layers, and its losses: the ground floor, which knows no executor."""
