"""Small rendered scenes with exact truth: labels, masks, depth, correspondences, captions and questions from a seed."""
