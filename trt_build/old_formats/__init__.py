"""Engines of formats 2 and 3, which moeship built before the present format 4: read, and run as they were.

For the CPU they hold quantised weights as ONNX Runtime's kernels pack them: those of format 2 (ONNX Runtime 1.31) in
that form alone, those of format 3 in that form and, behind it in the data file, in the one that the graph's operators
take. A session gets the second form of either, and packs it when it loads the graph.

manifest.py      what their engine.json says that the present one does not
graphs.py        their graphs, as a session of today takes them
packed_alone.py  codes and scales from the packed form alone
packing.py       how this machine's kernels pack a weight

Nothing outside of `trt_build/engine.py`, `trt_build/ort/device.py` and `export/conversion/parts.py` (the key of a part)
knows of them.
"""
