"""A runnable demonstration of eupe, and the assets that it uses."""
