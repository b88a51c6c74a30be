"""From files to files: options, batches, the translator, where σ² is read."""
