"""TorchX: presets and arguments to an AppDef. Imports no torch."""
