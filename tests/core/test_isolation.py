import subprocess
import sys


def test_importing_the_core_loads_no_framework():
    probe = (
        "import bonsai_lora.core.loraset, bonsai_lora.core.merge, bonsai_lora.core.spectrum, sys;"
        "found = {'fastapi', 'starlette', 'pydantic', 'uvicorn', 'structlog', 'httpx', 'llvmlite'}"
        " & set(sys.modules); sys.exit(repr(found) if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
