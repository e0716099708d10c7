"""Pure functions of tensors and numbers: no state, no models, no files."""
