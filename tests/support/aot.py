"""Compiles Triton kernels ahead of time, for GPUs that are not there, and says what came out.

Run as a script, in a process whose Triton is not interpreted: python aot.py FAMILY [--all]
It imports aot_cases_FAMILY beside it, compiles `cases(every)` for each GPU generation, and prints one JSON line each.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ARCHITECTURES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Compute capability, and the shared memory that one block may have."""

TENSOR_CORE = {80: r"mma\.sync", 90: r"wgmma\.mma_async|mma\.sync", 100: r"tcgen05\.mma|mma\.sync"}


@dataclass
class Case:
    """One kernel with one set of tiles."""

    kernel: Any
    signature: dict[str, str]
    """Argument to Triton type: `*bf16`, `i32`, `fp32`; constexpr arguments are in `constants` alone."""
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    """Integer arguments that are multiples of 16 at the shapes that matter; pointers always are."""
    tensor_cores: bool = True
    architectures: tuple[int, ...] = tuple(ARCHITECTURES)


@dataclass
class Compiled:
    kernel: str
    architecture: int
    constants: dict[str, Any]
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    wants_tensor_cores: bool
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.spilled_bytes:
            self.problems.append(f"spills {self.spilled_bytes} bytes")
        if self.shared_bytes > ARCHITECTURES[self.architecture]:
            self.problems.append(f"wants {self.shared_bytes} bytes of shared memory")
        if self.wants_tensor_cores and not self.tensor_core_instructions:
            self.problems.append("uses no tensor core")


def compile_case(case: Case, architecture: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    missing = [n for n in names if n not in case.signature and n not in case.constants]
    assert not missing, f"{case.kernel.__name__}: no type for {missing}"
    signature = {n: case.signature.get(n, "constexpr") for n in names}
    divisible = [n for n in names if signature[n].startswith("*") or n in case.aligned]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in divisible}
    source = ASTSource(case.kernel, signature, case.constants, attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    usage = _resources(compiled.asm["cubin"], Path(triton.__file__).parent)
    return Compiled(
        kernel=case.kernel.__name__,
        architecture=architecture,
        constants={**{k: str(v) for k, v in case.constants.items()}, **options},
        registers=usage["REG"],
        spilled_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        tensor_core_instructions=len(re.findall(TENSOR_CORE[architecture], compiled.asm["ptx"])),
        wants_tensor_cores=case.tensor_cores,
    )


def _resources(cubin: bytes, triton_folder: Path) -> dict[str, int]:
    tool = triton_folder / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}


def chosen(cases: list[Case], every: bool) -> list[tuple[Case, int]]:
    """Each case for each generation; unless `every`, a kernel's first case, and each further one for one in turn."""
    found, num_seen = [], dict.fromkeys((case.kernel.__name__ for case in cases), 0)
    for case in cases:
        turn = num_seen[case.kernel.__name__]
        num_seen[case.kernel.__name__] += 1
        own = case.architectures
        found += [(case, one) for one in (own if every or not turn else (own[turn % len(own)],))]
    return found


def main() -> None:
    family, *flags = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    every = "--all" in flags
    cases = importlib.import_module(f"tests.support.aot_cases_{family}").cases(every)
    for case, architecture in chosen(cases, every):
        print(json.dumps(asdict(compile_case(case, architecture))), flush=True)


if __name__ == "__main__":
    main()
