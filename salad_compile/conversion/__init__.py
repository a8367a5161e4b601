"""convert(model) and what changes a converted model afterwards."""
