"""Ops of e5core that own their forward, their backward and their choice of device: one op, one file.

Every file holds the op's definition in plain torch (`NAME_reference`), its Triton kernels, and the public `NAME`, which
checks its arguments and picks the face by device; `face(device)` names that choice for the first log line. Nothing here
imports e5core.
"""
