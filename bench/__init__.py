"""Benchmarks, one file per question; `python -m svdkern bench` lists them. Not installed: they come with the sources."""

BENCHES = {
    "linear": "one adapted layer, against the frozen one and every other way to compute it",
    "model_step": "a whole training step of a model, time and memory",
    "methods": "a training step with each published method, against PEFT's implementation",
    "decode": "tokens a second of an adapted model",
    "memory": "what a layer's forward and backward add to memory",
    "accuracy": "errors against fp64 on easy and hard numbers",
    "init": "the SVD that initialises an adapter: seconds against accuracy",
    "init_model": "the SVDs of all linear layers of a model, and the whole call, against PEFT's",
    "init_memory": "memory and time of the initial adapter of a 7B model on disk",
    "topk": "a few singular triplets of a large matrix: seconds against accuracy",
    "svd_methods": "which method finds a few triplets first, by size",
    "svd_kernels": "the GPU kernels behind the SVD beside PyTorch's operations",
    "ceilings": "what this machine can do at most",
    "roofline": "the floor and the predicted time of each design, for a GPU or CPU",
    "blocks": "whether the CPU kernels' block sizes are right for this CPU",
    "confirm": "predictions of the roofline beside measurements",
    "compare": "two runs side by side",
    "report": "tables and plots from the result files",
}
