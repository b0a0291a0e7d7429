"""What each way of merging leaves of a trained change: packed again to NF4, or added in fp32 and rounded once.

    python benchmarks/merge.py             writes benchmarks/results/merge.json
W: 1024 x 1024 Gaussian on NF4 (block 64, double); change: a random matrix of rank 16, scaled to a share of ||W||.
survives: projection of (merged - base) onto the change, 1 is all of it.
error: ||merged - (base + change)|| / ||change||.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from results import machine, write
from torch import Tensor

from qtune.quant import NF4

RESULTS = Path(__file__).parent / "results" / "merge.json"
SIZE, RANK, SHARES = 1024, 16, (0.003, 0.01, 0.03, 0.1)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    generator = torch.Generator().manual_seed(0)
    scheme = NF4()

    def rounded(w: Tensor) -> Tensor:
        return scheme.unpack(scheme.pack(w), w.shape, torch.float32)

    base = rounded(torch.randn(SIZE, SIZE, generator=generator) * 0.02)
    change = torch.randn(SIZE, RANK, generator=generator) @ torch.randn(RANK, SIZE, generator=generator)
    rows = []
    for share in SHARES:
        delta = change * (share * base.norm() / change.norm())
        whole = base + delta
        ways = {"packed to NF4 again": rounded(whole)}
        ways |= {
            f"qtune merge --dtype {t}": whole.to(getattr(torch, t)).float() for t in ("bfloat16", "float16", "float32")
        }
        for way, merged in ways.items():
            survives = float(((merged - base) * delta).sum() / delta.square().sum())
            rows.append(
                {
                    "share": share,
                    "way": way,
                    "survives": survives,
                    "error": float((merged - whole).norm() / delta.norm()),
                }
            )
    write(RESULTS, {"command": "python benchmarks/merge.py", **machine(), "rows": rows})


if __name__ == "__main__":
    main()
