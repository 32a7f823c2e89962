"""What others make of an export: scripts that e5core.export starts in a process of their own, one a library.

Each takes the exported path, a request and where to put the answer, both JSON: {"max_tokens": n, "base": path of an
adapter's base model, "texts": [...], "ids": [[...], ...] (ours)} and {"ids": [[...], ...], "vectors": [[...], ...]}.
They know nothing of e5core: what they load, they load as any user of the library would.
"""
