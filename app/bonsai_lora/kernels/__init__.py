"""The five functions of `core/definition.py` as machine code; start with docs/kernels.md.

The modules generate LLVM IR; `library` compiles each function on first use, for the dtypes in use;
`arrays` calls the functions with NumPy arrays.
"""
