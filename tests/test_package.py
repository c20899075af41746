"""The package as it is installed and imported: its files, its imports, its platforms."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
DEAD = "http://127.0.0.1:9"
POSIX_ONLY = ("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty", "uvloop")


def python(code, **options):
    """Run `code` in its own interpreter; return its output."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the tree as `pip install .` builds it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "app", source / "app", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(source / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    (built,) = (source / "dist").iterdir()
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names} == {
        "bonsai_lora",
        f"bonsai_lora-{VERSION}.dist-info",
    }
    ours = {name for name in names if name.startswith("bonsai_lora/")}
    package = ROOT / "app"
    sources = {
        str(one.relative_to(package))
        for one in package.rglob("*")
        if one.is_file() and "__pycache__" not in one.parts
    }
    assert "bonsai_lora/py.typed" in sources
    assert ours == sources


def test_it_coexists_with_a_package_named_app(wheel, tmp_path):
    site, project = tmp_path / "site", tmp_path / "project"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
    subprocess.run(
        [*command, "--target", str(site), str(wheel)], check=True, capture_output=True, timeout=100
    )
    (project / "app").mkdir(parents=True)
    (project / "app" / "__init__.py").write_text("NAME = 'mine'\n")
    (project / "app" / "core.py").write_text("def answer():\n    return 42\n")
    code = (
        "import app, app.core, bonsai_lora, sys\n"
        "adapter = bonsai_lora.LoraAdapter.new(4, 3, bonsai_lora.LoraConfig(rank=2))\n"
        "print(app.NAME, app.core.answer(), adapter.d_out, bonsai_lora.__version__)\n"
        "print(app.__file__, bonsai_lora.__file__, sep='\\n')\n"
    )
    path = os.pathsep.join([str(site), str(project)])
    said = python(code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}).splitlines()
    assert said[0] == f"mine 42 3 {VERSION}"
    assert Path(said[1]).is_relative_to(project)
    assert Path(said[2]).is_relative_to(site)


LOADED = "import atexit, sys; atexit.register(lambda: print('loaded', *sorted(sys.modules)));"


def loaded_by(code):
    """The modules that are loaded when an interpreter that ran `code` ends."""
    return set(python(LOADED + code).rpartition("loaded ")[2].split())


def test_importing_the_package_loads_nothing():
    loaded = loaded_by("import bonsai_lora; dir(bonsai_lora)")
    assert {name for name in loaded if name.startswith("bonsai_lora")} == {"bonsai_lora"}
    assert not loaded & {"numpy", "llvmlite", "fastapi", "httpx"}
    loaded = loaded_by(
        "import bonsai_lora\n"
        "with bonsai_lora.Client('http://127.0.0.1:9', retries=0) as client:\n"
        "    try: client.get_stats()\n"
        "    except Exception as error: print(type(error))\n"
    )
    assert "httpx" in loaded
    assert not loaded & {"numpy", "llvmlite", "fastapi"}
    assert "numpy" in loaded_by("import bonsai_lora; bonsai_lora.LoraConfig")


@pytest.mark.parametrize(
    "words",
    [
        ["ls"],
        ["show", "s"],
        ["stats"],
        ["rm", "s"],
        ["pull", "base/s", "-o", "nowhere"],
        ["push", "s", str(ROOT / "tests" / "data" / "tiny-qwen3" / "plain")],
    ],
    ids=lambda words: words[0],
)
def test_the_client_loads_neither_the_server_nor_numpy(words):
    words = [*words, "--url", DEAD]
    loaded = loaded_by(f"from bonsai_lora.cli.main import main; assert main({words!r}) == 3")
    assert "httpx" in loaded
    first = {name.partition(".")[0] for name in loaded}
    assert not first & {"numpy", "llvmlite", "fastapi", "starlette", "uvicorn", "pydantic"}
    parts = {name.split(".")[1] for name in loaded if name.startswith("bonsai_lora.")}
    assert parts == {"cli", "client", "errors", "formats", "validation"}


def test_blas_threads_are_set_before_numpy_loads():
    watch = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'numpy':\n"
        "            print('numpy finds', os.environ.get('OPENBLAS_NUM_THREADS'))\n"
        "sys.meta_path.insert(0, Watch())\n"
        "from bonsai_lora.cli.main import main\n"
        "main(['serve', '--help'])\n"
    )
    free = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    assert python(watch, env=free).startswith("numpy finds 1\n")
    assert python(watch, env={**free, "OPENBLAS_NUM_THREADS": "3"}).startswith("numpy finds 3\n")


def without(*names):
    """Code after which these modules cannot be imported."""
    return f"import sys\nfor name in {names!r}: sys.modules[name] = None\n"


def test_client_and_library_import_no_posix_only_modules():
    elsewhere = without(*POSIX_ONLY) + (
        "import asyncio, os\n"  # elsewhere, asyncio needs no sysconf
        "for name in ('sched_getaffinity', 'sysconf', 'fork'): delattr(os, name)\n"
        "import bonsai_lora\n"
        "from bonsai_lora.cli.main import main\n"
        f"assert main(['ls', '--url', {DEAD!r}]) == 3\n"
        "made = [getattr(bonsai_lora, name) for name in bonsai_lora.__all__]\n"
        "assert len(made) == 8\n"
        "import numpy as np\n"
        "adapter = bonsai_lora.LoraAdapter.new(4, 3, bonsai_lora.LoraConfig(rank=2))\n"
        "print(adapter.apply(np.ones((2, 4), np.float32)).shape)\n"
    )
    assert python(elsewhere) == "(2, 3)\n"


def test_cores_are_counted_without_an_affinity():
    """As on macOS, whose `os` module has no such function."""
    count = (
        "import os, sys\n"
        "from bonsai_lora import settings\n"
        "from bonsai_lora.api.app import create_app\n"
        "sys.version_info = (3, 12)\n"
        "print(settings.usable_cores() == len(os.sched_getaffinity(0)))\n"
        "del os.sched_getaffinity\n"
        "print(settings.usable_cores() == os.cpu_count())\n"
        "app = create_app(settings.Settings(store='memory:'))\n"
        "print(app.state.context.settings.threads == os.cpu_count())\n"
    )
    assert python(count) == "True\nTrue\nTrue\n"


def test_a_file_counts_as_resident_if_the_system_cannot_tell(tmp_path, monkeypatch):
    import ctypes
    import mmap

    from bonsai_lora.formats.mapped import map_file
    from bonsai_lora.storage.residency import resident_bytes

    (tmp_path / "file").write_bytes(bytes(5 * mmap.PAGESIZE + 1))
    with (tmp_path / "file").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        mapped = map_file(file)
    known = resident_bytes(mapped)
    assert 0 <= known <= 6 * mmap.PAGESIZE
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert resident_bytes(mapped) == 6 * mmap.PAGESIZE
