"""What methods are made of: the base class, and those of chains of tasks and of gated connections."""
