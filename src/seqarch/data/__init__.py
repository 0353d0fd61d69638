"""Data for the chapters: every loader returns tensors and says what they mean. Import a family by name."""
