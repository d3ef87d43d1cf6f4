"""From a configuration to a sharded model on this rank: tables, network, loss, optimizers, pipeline."""
