"""Which tensor gets which format: scheme parser, presets, roles, plan."""
