"""Data: readers, data sets, the token store, groups, batches."""
