"""The runner as a drop-in for ``hadamoe._cpu``: same calls, another process, maybe another CPU."""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence

import numpy as np

from hadamoe import _cpu
from hadamoe.errors import ContractError

from . import build

#: DLPack's code of what ops take.
CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
BF16 = 4


class Crashed(RuntimeError):
    """The runner died: a read or write outside an array, or a sanitizer's report."""


class Runner:
    """One running process of a build target, optionally under an emulated CPU.

    numpy has no bf16: with ``half_is_bf16`` set, its f16 arrays travel as bf16 bits.
    """

    half_is_bf16 = False
    cut = 0  # bytes withheld from the end of every input, to prove that the unmapped page is there

    def __init__(self, target: str, emulate: Sequence[str] = ()) -> None:
        self.command = [*emulate, str(build.runner(target))]
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors
        )

    def close(self) -> None:
        """Ends the process; a leak or a late report of a sanitizer is an error."""
        self.process.stdin.close()
        code = self.process.wait(60)
        assert code == 0, self._report(f"exit code {code}")

    def _report(self, why: str) -> str:
        self.errors.seek(0)
        text = self.errors.read().decode(errors="replace")[-6000:]
        return f"{' '.join(self.command)}: {why}\n{text}"

    def _send(self, message: bytes) -> None:
        try:
            self.process.stdin.write(message)
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Crashed(self._report("died before the request")) from None

    def _take(self, count: int) -> bytes:
        data = self.process.stdout.read(count) if count else b""
        if len(data) != count:
            raise Crashed(self._report(f"died with {self.process.wait(60)}"))
        return data

    def command_text(self, name: str, *ints: int) -> str:
        """Runs a command that answers with text (``@isas``, ``@threads`` ...)."""
        head = name.encode()
        counts = struct.pack("<4I", 0, 0, len(ints), 0)
        self._send(
            struct.pack("<I", len(head)) + head + counts + struct.pack(f"<{len(ints)}q", *ints)
        )
        return self._take(struct.unpack("<I", self._take(4))[0]).decode()

    # ---- what hadamoe.ops calls on _cpu ----

    def call(self, op: str, inputs: list, outputs: list, ints: list, floats: list) -> None:
        """`_cpu.call`: runs one op; outputs are overwritten in place."""
        arrays = [self._describe(a) for a in (*inputs, *outputs)]
        head = op.encode()
        message = [struct.pack("<I", len(head)), head]
        message.append(struct.pack("<4I", len(inputs), len(outputs), len(ints), len(floats)))
        message.append(struct.pack(f"<{len(ints)}q", *(int(i) for i in ints)))
        message.append(struct.pack(f"<{len(floats)}d", *floats))
        self._send(b"".join(message + arrays))
        if size := struct.unpack("<I", self._take(4))[0]:
            raise ContractError(self._take(size).decode())
        for out in outputs:
            if out is not None:
                out[...] = np.frombuffer(self._take(out.nbytes), out.dtype).reshape(out.shape)

    def _describe(self, array: np.ndarray | None) -> bytes:
        if array is None:
            return struct.pack("<BBHQ", CODES["f"], 32, 0, 0)
        a = np.ascontiguousarray(array)
        bf16 = self.half_is_bf16 and a.dtype == np.float16
        head = struct.pack("<BBH", BF16 if bf16 else CODES[a.dtype.kind], a.itemsize * 8, a.ndim)
        shape = struct.pack(f"<{a.ndim}q", *a.shape)
        raw = a.tobytes()
        if self.cut and len(raw) > self.cut:
            raw = raw[: -self.cut]
        return head + shape + struct.pack("<Q", len(raw)) + raw

    def instances(self) -> list:
        """`_cpu.instances`: the same list, compiled from the same header."""
        return _cpu.instances()

    def ops(self) -> list[str]:
        """`_cpu.ops`."""
        return _cpu.ops()

    def isas(self) -> list[str]:
        """`_cpu.isas` of the emulated CPU."""
        return self.command_text("@isas").split()

    def isa(self) -> str:
        """`_cpu.isa`: the best one, which is in use until `set_isa`."""
        return self.isas()[-1]

    def set_isa(self, name: str) -> None:
        """`_cpu.set_isa`."""
        assert self.command_text(f"@isa {name}") == name

    def set_threads(self, count: int) -> None:
        """`_cpu.set_threads`."""
        assert self.command_text("@threads", count) == "ok"

    def set_guard(self, before: bool) -> None:
        """Puts the unmapped page before each array instead of behind it."""
        assert self.command_text("@guard", int(before)) == "ok"


def qemu(cpu: str) -> list[str]:
    """The command prefix that runs this machine's programs on another x86 CPU."""
    return [shutil.which("qemu-x86_64") or "qemu-x86_64", "-cpu", cpu]
