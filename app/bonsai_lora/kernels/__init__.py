"""The arithmetic of an apply, a merge and a cast, and of numbers in JSON, as machine code.

NumPy has no bfloat16, repacks both matrices of a product, which for thin ones costs as much as the
product, and cannot cast, add and round in one pass over the memory; a compiler is not on every
machine. llvmlite brings LLVM as a wheel (docs/decisions/0015-kernels.md). The modules write
functions in its language; `library` has them made, each for the dtypes that it is first used with.

Each number of a result is made by the same operations in the same order, wherever its row stands in
a batch and however the work is cut or shared: a row's outputs do not depend on its batch, to the
bit. (Between kinds of CPU they do differ, as their vectors are of different lengths.)
"""
