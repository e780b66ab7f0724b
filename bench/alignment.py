"""Alignments of the canonical spaces of two hosts, and their effect on a frozen adapter.

    python bench/alignment.py --host MODEL --source-data DIR --target-data DIR [--seeds 0,1,2] --work DIR

Uses the sources that bench/portability.py has trained in --work with the projector `probe`, or trains them, and moves
each to MODEL cut to half of its layers and to two thirds of its width, under several alignments. Figures are means over
seeds with 95 % t-intervals:

    agreement   share of the codes' variance that a host's inputs explain, on the 4 of 14 probe sentences that the map
                was not fitted on; mean over layers and kinds of input.
    zero-shot   score of the frozen adapter with a head by ridge regression; `gain` is its difference to no adapter.

    ridge       fastpeft's own: regression onto the source's codes, outputs by their correlation with codes.
    ridge/100   the same with a hundredth of the ridge penalty.
    procrustes  leading principal components of unit variance, rotated by the orthogonal matrix that brings them
                nearest to the codes; outputs likewise.
    cca         the codes' coordinates scaled by how well the host predicts them, as in canonical correlation analysis.
    turned      ridge onto codes mixed by a random rotation: the control, aligned with nothing.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.portability import Bench, interval, parser_of
from fastpeft.adapters.unihyperlora import file_format, probe, projectors
from fastpeft.config import with_values
from fastpeft.trainer.build import build_job
from fastpeft.trainer.transferring import zero_shot

Read = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(inputs W x I, codes W x Q) -> Phi_in (I x Q), offset (Q)."""
Write = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(outputs W x O, codes W x Q) -> Phi_out (O x Q)."""
NUM_FITTED = sum(map(len, probe.WORDS[:10]))
"""Probe words that a map is fitted on when it is evaluated on the others."""


def weak_ridge(x_WI: torch.Tensor, codes_WQ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    before, projectors.RIDGE = projectors.RIDGE, projectors.RIDGE / 100
    try:
        return projectors.read_codes(x_WI, codes_WQ)
    finally:
        projectors.RIDGE = before


def _turned_components(x_WI: torch.Tensor, codes_WQ: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(mean I, directions I x Q, spread Q, rotation Q x Q): x's leading components, and the rotation that brings them,
    at unit variance, nearest to the codes."""
    x, width = x_WI.double(), codes_WQ.shape[1]
    mean = x.mean(0)
    _, s, vt = torch.linalg.svd(x - mean, full_matrices=False)
    directions, spread = vt[:width].t(), s[:width].clamp_min(1e-9) / len(x) ** 0.5
    left, _, right = torch.linalg.svd(((x - mean) @ directions / spread).t() @ codes_WQ.double())
    return mean, directions, spread, left @ right


def procrustes_read(x_WI: torch.Tensor, codes_WQ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, directions, spread, rotation = _turned_components(x_WI, codes_WQ)
    phi = directions / spread @ rotation
    return phi.float(), -(mean @ phi).float()


def procrustes_write(y_WO: torch.Tensor, codes_WQ: torch.Tensor) -> torch.Tensor:
    _, directions, _, rotation = _turned_components(y_WO, codes_WQ)
    return projectors.unit_columns(directions @ rotation).float()


def cca_read(x_WI: torch.Tensor, codes_WQ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    phi, offset = projectors.read_codes(x_WI, codes_WQ)
    found = (x_WI.double() @ phi.double() + offset).float()
    scale = _correlations(found, codes_WQ) / found.std(0).clamp_min(1e-9)
    return phi * scale, offset * scale


def _correlations(found_WQ: torch.Tensor, codes_WQ: torch.Tensor) -> torch.Tensor:
    a, b = found_WQ - found_WQ.mean(0), codes_WQ - codes_WQ.mean(0)
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp_min(1e-9)


def turned(codes_WQ: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(codes_WQ.shape[1])
    rotation, _ = torch.linalg.qr(torch.randn(codes_WQ.shape[1], codes_WQ.shape[1], generator=generator))
    return codes_WQ @ rotation.to(codes_WQ)


ALIGNMENTS: dict[str, tuple[Read, Write]] = {
    "ridge": (projectors.read_codes, projectors.write_codes),
    "ridge/100": (weak_ridge, projectors.write_codes),
    "procrustes": (procrustes_read, procrustes_write),
    "cca": (cca_read, projectors.write_codes),
    "turned": (
        lambda x, codes: projectors.read_codes(x, turned(codes)),
        lambda y, codes: projectors.write_codes(y, turned(codes).flip(-1)),
    ),
}


Fitted = list[tuple[torch.Tensor, torch.Tensor]]
"""Inputs of a site (W x I) and the codes (W x Q) that they are mapped to."""


@contextmanager
def aligned_by(name: str) -> Iterator[Fitted]:
    """Adapters attached in this context use the alignment `name`. Yields the inputs and codes of each fitted map."""
    read, write = ALIGNMENTS[name]
    fitted: Fitted = []

    def noting(x_WI: torch.Tensor, codes_WQ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fitted.append((x_WI, codes_WQ))
        return read(x_WI, codes_WQ)

    before = probe.read_codes, probe.write_codes
    probe.read_codes, probe.write_codes = noting, write
    try:
        yield fitted
    finally:
        probe.read_codes, probe.write_codes = before


def agreement(read: Read, fitted: Fitted) -> float:
    """Squared correlation on words that the map was not fitted on, mean over codes and spaces."""
    found = []
    for x_WI, codes_WQ in fitted:
        phi, offset = read(x_WI[:NUM_FITTED], codes_WQ[:NUM_FITTED])
        said = x_WI[NUM_FITTED:] @ phi + offset
        found.append(float(_correlations(said, codes_WQ[NUM_FITTED:]).square().mean()))
    return statistics.fmean(found)


class Alignments(Bench):
    def one_seed(self, seed: int) -> None:
        name = f"source-probe-{seed}"
        values = {"unihyperlora.projector": "probe", "budget": f"{self.options.source_steps}steps"}
        self.trained(self.run(self.host, self.options.source_data, seed, **values), name)
        moved = {
            "unihyperlora.adapter": str(self.work / name / "adapter" / file_format.FILE),
            "unihyperlora.train": "delta",
        }
        for target, host in self.targets().items():
            run = with_values(self.run(host, self.options.target_data, seed), moved)
            for row, (read, _) in ALIGNMENTS.items():
                with aligned_by(row) as fitted:
                    job = build_job(run)
                (without, adapted), *_ = zero_shot(job)
                assert without.score is not None
                assert adapted.score is not None
                self.note(target, row, "agreement", agreement(read, fitted))
                self.note(target, row, "zero-shot", adapted.score)
                self.note(target, row, "gain", adapted.score - without.score)


FIGURES = ("agreement", "zero-shot", "gain")


def shown(bench: Bench) -> str:
    lines = []
    for target in dict.fromkeys(target for target, _, _ in bench.scores):
        lines += ["", f"{target:26}" + "".join(f"{figure:>20}" for figure in FIGURES)]
        for row in ALIGNMENTS:
            values = [interval(bench.scores[target, row, figure]) for figure in FIGURES]
            lines.append(f"{row:26}" + "".join(f"{value:>20}" for value in values))
    return "\n".join(lines)


def main() -> None:
    options = parser_of((__doc__ or "").splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bench = Alignments(options, options.work or Path(temporary))
        bench.work.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            bench.one_seed(seed)
            print(f"seed {seed}{shown(bench)}", flush=True)
    print(f"\nwritten {bench.write('alignment')}")


if __name__ == "__main__":
    main()
