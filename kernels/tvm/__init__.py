"""CPU kernels written in TVMScript and scheduled with TVM: one module per custom op, compiled ahead of time.

`catalog.kernels(arch)` lists them, `catalog.compile_object(...)` makes one object file of them. The modules of this
package import TVM (`pip install 'edgekit[tvm]'`); the package itself does not.
"""
