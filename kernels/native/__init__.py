"""The C layer around the compiled kernels: `edgekit_kernels.h` is the interface, the modules here build it.

`table` writes the C table that says which kernel serves which call, `objects` compiles kernels with TVM and keeps the
objects, `toolchain` finds and runs the C and C++ compilers. Importing any of them loads no TVM.
"""
