"""The five functions of `core/definition.py` as machine code; docs/kernels.md is the way in.

The modules write functions in LLVM's language; `library` compiles each when it is first used, for
the dtypes that it is used with; `arrays` calls them with NumPy arrays.
"""
