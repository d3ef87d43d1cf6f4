"""Tables, sharding plans and initialisation of embeddings."""
