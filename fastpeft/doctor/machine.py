"""Checks of versions, device, threads, kernels and energy meter."""

from __future__ import annotations

import os
import platform
import tomllib
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from fastpeft._version import __version__
from fastpeft.doctor.check import Finding
from fastpeft.errors import first_line
from fastpeft.runs.system import git_commit

_SHOWN = ("torch", "triton", "transformers", "peft", "datasets", "wandb")
_ESSENTIAL = {
    "torch", "transformers", "huggingface_hub", "accelerate", "peft", "safetensors", "pydantic", "PyYAML", "psutil",
}  # fmt: skip
"""No run starts without these. The other dependencies are needed by some runs only."""

_GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup")


def fastpeft() -> list[Finding]:
    commit = git_commit()
    python, floor = platform.python_version(), _project()["requires-python"]
    from packaging.specifiers import SpecifierSet

    at = f", commit {commit}" if commit else ""
    message = f"fastpeft {__version__}{at}; Python {python} on {platform.system()} {platform.machine()}"
    if not SpecifierSet(floor).contains(python, prereleases=True):
        return [Finding("fastpeft", "warning", f"{message}: Python {floor} is supported", f"use Python {floor}")]
    return [Finding("fastpeft", "ok", message)]


# ---- packages ------------------------------------------------------------------------------


def _project() -> dict[str, Any]:
    """`requires-python` and `dependencies`, from the checkout's pyproject.toml or else the installed metadata."""
    path = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if path.is_file():
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        if project["name"] == "fastpeft":
            return project
    requirements = [line for line in metadata.requires("fastpeft") or [] if "extra ==" not in line]
    return {"requires-python": metadata.metadata("fastpeft")["Requires-Python"], "dependencies": requirements}


def packages() -> list[Finding]:
    """A finding with the main versions, and one for every package that is missing or of an unsupported version."""
    from packaging.requirements import Requirement

    versions, findings = {}, []
    for line in _project()["dependencies"]:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        name, fix = requirement.name, f"pip install --upgrade '{requirement.name}{requirement.specifier}'"
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            fatal = name in _ESSENTIAL
            findings.append(
                Finding(name, "missing", f"is not installed; {requirement.specifier} is needed", fix, fatal)
            )
            continue
        if not requirement.specifier.contains(versions[name], prereleases=True):
            message = f"{versions[name]} is installed; {requirement.specifier} is supported"
            findings.append(Finding(name, "warning", message, fix))
    shown = ", ".join(f"{name} {versions[name]}" for name in _SHOWN if name in versions)
    more = f" and {len(versions) - sum(name in versions for name in _SHOWN)} more"
    return [Finding("packages", "ok", shown + more), *findings]


def imports() -> list[Finding]:
    """Whether the libraries that every run loads can be imported. An installed version does not prove it."""
    for name in ("torch", "transformers", "peft"):
        try:
            __import__(name)
        except BaseException as error:
            message = f"{name} is installed but cannot be imported: {type(error).__name__}: {first_line(error)}"
            fix = f"reinstall it: pip install --force-reinstall {name}"
            if isinstance(error, ModuleNotFoundError):
                message, fix = f"{name} cannot be imported: {first_line(error)}", f"pip install {error.name}"
            return [Finding("imports", "missing", message, fix, fatal=True)]
    return [Finding("imports", "ok", "torch, transformers and peft load")]


# ---- device --------------------------------------------------------------------------------


def device() -> list[Finding]:
    """The device that a run would use."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        return [_cuda_device()]
    finding = _cpu_device()
    gpus = _gpus_of_the_driver()
    if not gpus:
        return [finding]
    if torch.version.cuda is None:
        why, fix = "this is a CPU build of torch", "install a CUDA build: https://pytorch.org/get-started/locally"
    elif "CUDA_VISIBLE_DEVICES" in os.environ:
        hidden = os.environ["CUDA_VISIBLE_DEVICES"]
        why, fix = f"CUDA_VISIBLE_DEVICES is {hidden!r}", "unset CUDA_VISIBLE_DEVICES to use them"
    else:
        why = first_line(caught[0].message) if caught else "torch does not say why"
        fix = "update the driver, or install a torch build for the driver's CUDA version"
    message = f"the driver has {', '.join(gpus)}, but torch sees no GPU: {why}. A run would use the CPU"
    return [Finding("device", "warning", message, fix), finding]


def _cuda_device() -> Finding:
    import torch

    here = torch.device("cuda", 0)
    facts = torch.cuda.get_device_properties(here)
    capability = f"{facts.major}.{facts.minor}"
    try:
        _multiply(here)
        free, total = torch.cuda.mem_get_info(here)
    except RuntimeError as error:
        message = f"{facts.name}, capability {capability}, does not compute: {first_line(error)}"
        built = ", ".join(torch.cuda.get_arch_list())
        fix = (
            f"free its memory, or install a torch build for it (this one: {built}); CUDA_VISIBLE_DEVICES= uses the CPU"
        )
        return Finding("device", "missing", message, fix, fatal=True)
    count = torch.cuda.device_count()
    message = (
        f"{facts.name}, capability {capability}, driver {_driver() or 'unknown'}, CUDA {torch.version.cuda} in torch, "
        f"{free / _GIB:.0f} of {total / _GIB:.0f} GiB free; {_precision(here)}"
        + (f"; the first of {count}" if count > 1 else "")
    )
    if free < total / 2:
        fix = "end what else runs on it, or choose another with CUDA_VISIBLE_DEVICES"
        return Finding("device", "warning", f"{message}. Most of its memory is in use", fix)
    return Finding("device", "ok", message)


def _multiply(device: Any) -> None:
    """One matrix product, synchronised. Raises RuntimeError if the device cannot compute it."""
    import torch

    float((torch.ones(16, 16, device=device) @ torch.ones(16, 16, device=device)).sum())


def _cpu_device() -> Finding:
    import psutil
    import torch

    facts = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    memory = psutil.virtual_memory()
    return Finding(
        "device",
        "ok",
        f"CPU {facts.get('cpu_name') or platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free; "
        f"{_precision(torch.device('cpu'))}",
    )


def _precision(device: Any) -> str:
    """The precision that `auto` selects on the device, for layers of 768 x 3072."""
    from fastpeft.models.precision import choose_precision

    return choose_precision("auto", device, lambda: (768, 3072)).note


def _gpus_of_the_driver() -> list[str]:
    """Names of the GPUs that NVIDIA's driver reports, whether or not torch sees them."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [pynvml.nvmlDeviceGetName(handle) for handle in handles]
    except Exception:  # no driver; one that is being reset raises other classes than NVMLError
        return []


def _driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except Exception:
        return None


# ---- threads -------------------------------------------------------------------------------


def threads() -> list[Finding]:
    """Warns of more threads than cores, and of threads that spin while they wait. Both slow training down."""
    import torch

    num, usable, quota = torch.get_num_threads(), len(os.sched_getaffinity(0)), _cpu_quota()
    policy = os.environ.get("OMP_WAIT_POLICY", "not set")
    set_to = os.environ.get("OMP_NUM_THREADS", "not set")
    cores = f"{usable} cores" + (f", of which a container's limit leaves {quota:g}" if quota is not None else "")
    message = f"torch uses {num} threads on {cores}; OMP_NUM_THREADS {set_to}, OMP_WAIT_POLICY {policy}"
    limit = min(usable, quota or usable)
    findings = [Finding("threads", "ok", message)]
    if num > limit:
        most = max(1, int(limit))
        fix = f"set training.threads={most}, or OMP_NUM_THREADS={most}"
        findings = [Finding("threads", "warning", f"{message}: more threads than cores", fix)]
    if policy.upper() == "ACTIVE":
        fix = "unset OMP_WAIT_POLICY: fastpeft then sets it to PASSIVE"
        message = "OMP_WAIT_POLICY is ACTIVE: threads spin while they wait, which can make steps 100 times slower"
        findings.append(Finding("threads", "warning", message, fix))
    return findings


def _cpu_quota() -> float | None:
    """Cores that a container's limit allows; None without a limit."""
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


# ---- kernels, energy -----------------------------------------------------------------------


def kernels() -> list[Finding]:
    """Which operations have Triton kernels, whether Triton loads, and whether this GPU has a tuning table."""
    import pkgutil

    import torch

    from fastpeft import kernels as ours
    from fastpeft.kernels import dispatch, ops

    for name in ours.__all__:
        getattr(ours, name)  # an import that fails becomes a finding
    modules = (module.name.split(".") for module in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}."))
    written = sorted(operation for *_, operation, module in modules if module == "kernel")
    used = f"Triton kernels: {', '.join(written)}" if written else "this release has no Triton kernels"
    try:
        import triton
    except Exception as error:
        why = f"triton cannot be imported ({type(error).__name__}: {first_line(error)}), so PyTorch computes them"
        return [Finding("kernels", "warning" if written else "ok", f"{used}; {why}")]
    used += f"; triton {triton.__version__} loads"
    if not torch.cuda.is_available():
        return [Finding("kernels", "ok", f"{used}; on a CPU PyTorch computes them, with closed-form gradients")]
    gpu = dispatch.gpu_name(0)
    try:
        rows = dispatch.table(gpu)
    except ValueError as error:
        return [Finding("kernels", "warning", f"{used}; {error}", f"delete {dispatch.table_path(gpu)}")]
    if not rows:
        message = f"{used}; no table for {gpu}: lora_linear takes cuBLAS"
        return [Finding("kernels", "warning", message, "measure which is faster: fastpeft doctor --tune")]
    fused = sum(choice.form != "split" for choice in rows.values())
    return [Finding("kernels", "ok", f"{used}; a table for {gpu}: {len(rows)} shapes, {fused} of them in Triton")]


def energy() -> list[Finding]:
    """Which meter a run's joules would come from."""
    import torch

    from fastpeft.budget.energy import EnergyMeter
    from fastpeft.trainer.build import gpu_uuid

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    meter = EnergyMeter.open(gpu_uuid(device))
    if not meter.works:
        fix = "budgets in seconds, tokens or steps need no meter; only joules do"
        return [Finding("energy", "missing", f"no energy meter: {meter.reason}", fix)]
    return [Finding("energy", "ok", f"{meter.method}: {_METERS[meter.method]}")]


_METERS = {
    "nvml_counter": "the energy counter of the GPU",
    "nvml_power": "the power that the GPU reports, integrated",
    "rapl": "the processor's RAPL counters, which leave out disks and fans",
}
