"""From a diffusion or flow model to a generator of one or a few steps."""
