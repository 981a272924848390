"""Builds llama.cpp for this processor from llama-cpp-python's source distribution on PyPI.

    python bench/peers/build.py [DIR]           default: build/peers

Leaves DIR/bin/llama-bench and DIR/ggml_kernels. Needs a C++ compiler, cmake and ninja (pip has the
last two). Takes about three minutes on two cores.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

PACKAGE = "llama-cpp-python==0.3.36"  # carries llama.cpp 0c1e57098
HERE = Path(__file__).resolve().parent
DEFAULT = HERE.parent.parent / "build" / "peers"


def source(out: Path) -> Path:
    """llama.cpp's source, downloaded and unpacked once."""
    found = sorted(out.glob("llama_cpp_python-*/vendor/llama.cpp"))
    if not found:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "-d", out, PACKAGE], check=True)
        (archive,) = out.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(out, filter="data")
        found = sorted(out.glob("llama_cpp_python-*/vendor/llama.cpp"))
    return found[0]


def mend_amx(llama: Path) -> None:
    """GCC 12 believes `_tile_loadconfig` reads 8 bytes, drops the stores of the other 56, and the
    first tile load of llama.cpp is then an illegal instruction. Only AMX processors get there."""
    info = Path("/proc/cpuinfo")
    if not (info.exists() and "amx_tile" in info.read_text()):
        return
    path = llama / "ggml/src/ggml-cpu/amx/mmq.cpp"
    text, call = path.read_text(), "_tile_loadconfig(&tc);"
    if 'asm volatile(""' not in text:
        path.write_text(text.replace(call, f'asm volatile("" ::"r"(&tc) : "memory"); {call}'))


def tool(name: str) -> str:
    """A program beside this Python, or on the PATH."""
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    found = shutil.which(name, path=places)
    if found is None:
        sys.exit(f"build.py: no {name}; install it with: pip install {name}")
    return found


def main() -> None:
    out = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else DEFAULT
    out.mkdir(parents=True, exist_ok=True)
    cmake, ninja = tool("cmake"), tool("ninja")
    llama = source(out)
    mend_amx(llama)
    configure = ["-S", HERE, "-B", out, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += ["-DCMAKE_BUILD_TYPE=Release", f"-DLLAMA_CPP={llama}"]
    subprocess.run([cmake, *configure], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([cmake, "--build", out, "--target", "llama-bench", "ggml_kernels"], check=True)
    print(f"built {out / 'bin' / 'llama-bench'} and {out / 'ggml_kernels'}")


if __name__ == "__main__":
    main()
