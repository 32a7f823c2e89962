"""Ops of e5core that own their forward, their backward and their choice of device: one op, one room.

`NAME.py` holds the op's definition in plain torch (`NAME_reference`) and the public `NAME`, which checks its arguments
and picks the face by device; `face(device)` names that choice for the first log line. `NAME_triton.py` holds the op's
Triton kernels and is imported on Linux only, the one platform that has Triton. Nothing here imports e5core.
"""
