"""Fast kernels behind the custom ops. None yet: in this version every op runs as standard ONNX operators."""
