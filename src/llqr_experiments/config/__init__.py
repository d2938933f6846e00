"""From options to what they become."""
