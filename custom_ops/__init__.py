"""What each custom op means: contract, PyTorch reference, ONNX body. One folder per op."""
