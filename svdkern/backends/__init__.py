"""Backends: the objects that compute one SVD-adapted linear, forward and backward.

Layer: below ``svdkern.autograd``; imports nothing of svdkern but itself, ``timing`` and the compiled extension.

``formula``   the one formula, composed of three primitives
``eager``     the three primitives in plain PyTorch: the reference, on every device
``cpu``       the three primitives (and whole calls) in C++, with ATen where ATen is faster
``triton``    whole calls by Triton kernels, on NVIDIA GPUs; ``triton_tiles``, ``triton_tune``: their tile sizes, looked up
              and measured; ``triton_gram``: a factor's Gram matrix
``dispatch``  which of them a call takes
``choices``   which path of the cpu backend a layer takes: tuned here, shipped, or by the rule
``table``     measured layers, and the nearest one (``choices.json``: those shipped)
``tuned``     those measured on this machine, on disk
``measure``   how long each path of a layer takes
``philox``    the dropout stream, the same bits on every backend
``extension`` loading the compiled extension, and saying why it is not there
"""
