"""Fast kernels behind the custom ops: CPU schedules in `tvm/`, the onnxruntime library around them in `ort/`.

Importing this package imports neither TVM nor torch: TVM is a compiler here, and nothing at run time needs it.
"""
