"""Runnable demonstration of eupe, and the assets it uses."""
