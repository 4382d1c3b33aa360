"""
The TRL underneath, and what every room needs of the machine: processes, files, checkpoints.

Modules:
    seams: methods, helpers and private attributes of TRL and transformers that this package uses
    processes: an error on one process stops all of them, with its message
    checkpoints: files that are written whole, and checkpoints that are complete or do not count
    state: what may go into a checkpoint, and what is taken back out of one
    sources: where models come from
    calls: what kind of function a user passed
    nearest: what was meant by a word that is not known
    engine: vLLM beside the training, on a machine without a GPU

To add a seam, put the method and its parameters into `SEAMS` of `seams.py`. A private attribute gets a small function
there. Then pin either of them in `tests/host/test_contract.py`: importing this package on a TRL that lacks a seam gives
one clear error, and the test says which one moved.

Nothing is exported here, since rewards import `host.calls` and must need neither TRL nor torch.
"""
