"""The convolutional executor: blocks of convolution, norm, activation and pooling in C++."""
