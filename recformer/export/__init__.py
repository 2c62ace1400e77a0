"""A catalogue and its encoder for other programs: vectors in files, the encoder as ONNX.

Each form is a folder of its own that appears whole or not at all, with `manifest.json` in it.
"""
