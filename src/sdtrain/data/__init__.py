"""Images and captions: where they come from, what is kept of them, and the batches that training sees."""
