"""The CPUs that kernels are tested for: this one, and less capable ones that it can emulate.

None stands for the NumPy definition, which is all that remains without the kernels package.
"""

from importlib.util import find_spec

TARGETS: list = [None]

if find_spec("bonsai_lora.kernels") and find_spec("llvmlite"):
    from bonsai_lora.kernels.target import MACHINE, Target, host

    HOST = host()
    TARGETS += [
        # What this machine runs, pretended to be less: fewer lanes and registers, no float16.
        HOST,
        HOST._replace(lanes=8, sums=12),
        HOST._replace(lanes=4, sums=24),
        HOST._replace(lanes=4, sums=12, has_half=False),
    ]
    if MACHINE in ("x86_64", "amd64") and HOST.lanes >= 8:
        # And made for older CPUs, which this one can do as well: without AVX-512, and without FMA.
        TARGETS += [
            Target("x86-64-v3", "", lanes=8, sums=12, has_half=True),
            Target("nehalem", "", lanes=4, sums=12, has_half=False),
        ]


def name_of(target) -> str:
    """Return a target's name in a test's."""
    return "numpy" if target is None else f"{target.cpu}-{target.lanes}x{target.sums}"
