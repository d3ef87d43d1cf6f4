"""Entry points that torchrun and TorchX run: thin, each a few calls into mmlrec."""
