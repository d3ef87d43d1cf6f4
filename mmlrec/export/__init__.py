"""A run's best checkpoint as a folder that needs neither torchrec nor fbgemm: network, tables, encoder, card."""
