"""Records to batches: reading, splits, the epoch table, feeding and on-device augmentation."""
