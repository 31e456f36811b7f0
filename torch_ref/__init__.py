"""The PyTorch reference: the same model, optimizer and Backend, for CUDA, MPS and parity."""
