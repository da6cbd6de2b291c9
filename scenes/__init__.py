"""Small rendered scenes with exact ground truth from a seed: labels, masks, depth, matches, captions and questions."""
