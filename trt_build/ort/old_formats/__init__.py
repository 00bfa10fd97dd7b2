"""Reads and runs engines of formats 2, 3 and 4, which moeship built before the present format 5.

Format 4 lacks the serving graph and is otherwise the present one. In CPU engines of formats 2 and 3 the quantised
weights are stored in the packed form, as ONNX Runtime's kernels lay them out. Format 2 (ONNX Runtime 1.31) stores the
packed form alone. Format 3 stores the packed form and, behind it in the data file, the codes and scales that the
graph's operators take. In both cases a session gets codes and scales, and packs them when it loads the graph.

manifest.py      the values of engine.json that the present format does not have
graphs.py        the graphs without the references to packed weights
packed_alone.py  codes and scales computed from the packed form
packing.py       the packed form that this machine's kernels give a weight

Only `trt_build/ort/engine.py`, `trt_build/ort/device.py` and `export/conversion/parts.py` (the key of a part) use this
folder.
"""
