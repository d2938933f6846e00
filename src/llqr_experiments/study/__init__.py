"""Methods side by side, on functions and on flatness."""
