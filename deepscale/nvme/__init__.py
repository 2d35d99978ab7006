"""Optimiser states and parameters on a disk, with DeepSpeed's ZeRO-3 (ZeRO-Infinity, arXiv:2104.07857).

| module | what |
|---|---|
| transfer.py | tensors to files and back, in place of DeepSpeed's op, which loses errors |
| folder.py | the folder on the disk: refused where it cannot serve, timed, one of its own for each rank, removed at the end |
| check.py | before training: two steps of a small network with the disk against the same without |
"""
