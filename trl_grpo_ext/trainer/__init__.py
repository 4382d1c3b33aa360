"""The life of a batch: the trainer, and what its options switch on."""
