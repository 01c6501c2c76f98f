from dataclasses import replace
import pytest
from rollback_world import Findings, World
from manager import anchor
from manager.anchoring import Anchoring
from manager.anchor import *

async def histories(n=40, **options: object) -> Findings:
    total = Findings()
    for seed in range(n):
        found = await World(seed, **options).history(7)  # type: ignore[arg-type]
        for name, value in vars(found).items():
            setattr(total, name, getattr(total, name) + value)
    print({k: (len(v) if isinstance(v, list) else v) for k, v in vars(total).items()}, total.accepted_old[:3], total.locked_out[:3])
    return total

def nopend(p, d, q): return anchor.judge(replace(p, notes=replace(p.notes, pending=bytes(32))), d, q)
def noheld(p, d, q): return anchor.judge(replace(p, held=bytes(32)), d, q)
def nopcr(p, d, q): return anchor.judge(p, d, None)

async def test_x(monkeypatch) -> None:
    print("real"); await histories(150)
    print("strict"); await histories(60, strict=True)
    print("opening"); await histories(opening=Anchoring.write_durable)
    print("nopend"); await histories(judge=nopend)
    print("noheld"); await histories(judge=noheld)
    print("nopcr"); await histories(judge=nopcr)
    print("nopcr strict"); await histories(judge=nopcr, strict=True)
    async def nothing(self): self._durable_unknown = False
    monkeypatch.setattr(Anchoring, "_find_out", nothing)
    print("nofind"); await histories(80)
