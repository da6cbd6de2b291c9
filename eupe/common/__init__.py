"""What all parts use: files and storage, locks, signals, processors, progress."""
