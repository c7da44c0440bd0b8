"""The terms of the gate that need no model: what answers and statistics of pictures tell.

Arrays and texts in, arrays and texts out; no torch, no files. The gate asks the model, calls these
and judges. Legend: I, J pictures, N training pictures, P pictures that are compared with each
other, C texts, T prompts, K columns, D width of features.
"""
