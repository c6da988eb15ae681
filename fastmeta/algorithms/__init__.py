"""One file an algorithm: function, module, equation and source."""
