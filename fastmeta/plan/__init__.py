"""From a module to its layers, and to the executor that runs them."""
