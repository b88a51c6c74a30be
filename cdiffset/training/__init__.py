"""Training, beside the loop in train.py: batches, weights, state, validation, logs."""
