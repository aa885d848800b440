"""One trainer for every network of the suite: objectives, conditioning, the loop, checkpoints."""
