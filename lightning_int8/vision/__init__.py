"""Real images, small networks and one training recipe: what the command ``train`` and the accuracy benchmark run."""
