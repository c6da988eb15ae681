"""From a module to layers to an executor, and the words for it."""
