"""BCC as a compiler: C files in, instructions out. Imported in a child process only: it takes 80 MB.

The programs include no kernel header but the few stubs in headers/: with real ones a compile takes many times as long
and breaks whenever they change.
"""

import os
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "dnat_hits.c"
HEADERS = HERE / "headers"


class CompileError(Exception):
    """BCC is not there, or refused; what clang says goes to stderr."""


def compile_programs(defines: Mapping[str, int], programs: tuple[str, ...], source: Path = SOURCE) -> dict[str, bytes]:
    """The instructions of each program; numbers of maps stand where descriptors belong (bpf_syscall.with_maps)."""
    os.environ["BCC_KERNEL_SOURCE"] = str(HEADERS)
    try:
        from bcc import BPF
    except Exception as error:  # a binding to a library that is not there may raise anything
        raise CompileError(f"bcc cannot be imported ({type(error).__name__}): apt-get install python3-bpfcc") from None
    flags = [f"-D{name}={value}" for name, value in defines.items()]
    flags += [f"-I{HERE}", "-Wall", "-Wno-unused-function", "-Wno-macro-redefined"]
    try:
        module = BPF(src_file=str(source).encode(), cflags=flags)
        return {name: bytes(module.dump_func(name.encode())) for name in programs}
    except Exception as error:  # BCC raises Exception itself
        raise CompileError(f"BCC: {error}") from None
