"""What is trained on what."""
