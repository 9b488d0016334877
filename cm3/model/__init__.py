"""CM3 in plain PyTorch: fusion, losses, graph convolution, sampling."""
