"""The penalty's kernel, ahead of time: every rank that has tiles of its own."""

from __future__ import annotations

from fastpeft.kernels.ops.frobenius.kernel import weighted_frobenius_kernel
from fastpeft.kernels.ops.frobenius.op import tiles
from tests.support.aot import Case

SIGNATURE = {name: "*fp32" for name in weighted_frobenius_kernel.arg_names if name.endswith("_ptr")}
SIGNATURE |= {"tasks_ptr": "*i64", "ticket_ptr": "*i32"}
SIGNATURE |= dict.fromkeys(("num_matrices", "num_adapter_tasks", "num_tasks"), "i32")


def case(penalty: str, rank: int, add: bool = True, measure: bool = False, aligned: bool = True):
    shape = tiles(rank, aligned)
    num_warps = shape.pop("num_warps")
    flags = {"PENALTY": penalty, "ADD": add, "MEASURE": measure}
    return Case(
        kernel=weighted_frobenius_kernel,
        signature=SIGNATURE,
        constants=flags | {"ALIGNED": aligned, "ALIGNED_ROWS": aligned} | shape,
        num_warps=num_warps,
        tensor_cores=penalty == "product",
    )


def cases(every: bool) -> list[Case]:
    if not every:
        return [case("product", 8), case("product", 64, measure=True), case("none", 8)]
    found = [case(penalty, 8, measure=measure) for penalty in ("none", "factors") for measure in (False, True)]
    found.append(case("factors", 8, add=False, aligned=False))
    for rank in (8, 32, 64, 256):
        found += [case("product", rank), case("product", rank, measure=True), case("product", rank, add=False)]
        found.append(case("product", rank, measure=True, aligned=False))
    return found
